"""`nearest_indices` against brute force in float64, written from the definition."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.contracts.observers import LargestTensor, NoHostSync
from vqprior.functional import nearest_indices
from vqprior.functional._kernels import _search_blocks

NO_TABLE = (
    "`codes` must have shape (k, d), or (q, k, d) for q codebooks, with sizes at least 1, got "
)
METRICS = ["euclidean", "cosine", "dot"]
sizes = {"n": st.integers(1, 17), "k": st.integers(1, 9), "d": st.integers(1, 6)}


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def scores_by_definition(x, codes, metric):
    """What is minimized, in float64, one pair at a time in the arithmetic."""
    x, codes = x.double().unsqueeze(-2), codes.double()
    if metric == "euclidean":
        return (x - codes).square().sum(-1)
    product = (x * codes).sum(-1)
    return -product if metric == "dot" else -product / codes.norm(dim=-1).clamp_min(1e-300)


def nearest_by_definition(x, codes, metric="euclidean", num_nearest=1):
    order = scores_by_definition(x, codes, metric).argsort(dim=-1, stable=True)
    return order[..., 0] if num_nearest == 1 else order[..., :num_nearest]


def integers(*shape, generator, low=-3, high=4):
    """Exact in floating point, so that ties are real ties on both sides."""
    return torch.randint(low, high, shape, generator=generator).float()


@given(**sizes, seed=st.integers(0, 999), metric=st.sampled_from(["euclidean", "dot"]))
def test_integers_match_the_definition_ties_included(n, k, d, seed, metric):
    generator = torch.Generator().manual_seed(seed)
    x, codes = integers(n, d, generator=generator), integers(k, d, generator=generator)
    exactly(nearest_indices(x, codes, metric=metric), nearest_by_definition(x, codes, metric))


@given(**sizes, seed=st.integers(0, 999), metric=st.sampled_from(METRICS), m=st.integers(1, 9))
def test_reals_match_the_definition(n, k, d, seed, metric, m):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    codes = torch.randn(k, d, generator=generator, dtype=torch.float64)
    if metric == "cosine" and d == 1:
        return  # every code of one feature is as similar as its sign: all ties
    expected = nearest_by_definition(x, codes, metric, num_nearest=min(m, k))
    exactly(nearest_indices(x, codes, metric=metric, num_nearest=min(m, k)), expected)


@given(seed=st.integers(0, 999), m=st.integers(2, 8))
def test_several_nearest_break_ties_by_index(seed, m):
    generator = torch.Generator().manual_seed(seed)
    x, codes = integers(20, 2, generator=generator), integers(8, 2, generator=generator)
    expected = nearest_by_definition(x, codes, num_nearest=m)
    exactly(nearest_indices(x, codes, num_nearest=m), expected)


@pytest.mark.parametrize("entries", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("block_codes", [1, 3, 8, 16, 17])
@pytest.mark.parametrize("group", [1, 4, 5])
@pytest.mark.parametrize("num_nearest", [1, 5])
def test_block_sizes_do_not_change_the_result(
    monkeypatch, entries, block_codes, group, num_nearest
):
    generator = torch.Generator().manual_seed(0)
    x, codes = integers(33, 3, generator=generator), integers(16, 3, generator=generator)
    monkeypatch.setattr(_search_blocks, "_MAX_BLOCK_ENTRIES", entries)
    monkeypatch.setattr(_search_blocks, "_MAX_BLOCK_CODES", block_codes)
    monkeypatch.setattr(_search_blocks, "_GROUP", group)
    expected = nearest_by_definition(x, codes, num_nearest=num_nearest)
    exactly(nearest_indices(x, codes, num_nearest=num_nearest), expected)


def test_more_codes_than_one_block_holds():
    size = _search_blocks._MAX_BLOCK_CODES
    codes = torch.arange(2.0 * size + 5).unsqueeze(1)
    x = torch.tensor([0.2, size - 0.6, size + 0.4, 2 * size + 0.3, 99999.0]).unsqueeze(1)
    exactly(nearest_indices(x, codes), torch.tensor([0, size - 1, size, 2 * size, 2 * size + 4]))


@pytest.mark.parametrize("metric", METRICS)
def test_several_nearest_are_all_different(metric):
    found = nearest_indices(torch.randn(50, 4), torch.randn(12, 4), metric=metric, num_nearest=12)
    exactly(found.sort(dim=1).values, torch.arange(12).expand(50, -1))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_a_common_offset_costs_no_accuracy(offset):
    """Without the shift, squares of 1e8 would leave no digit for distances of about 1."""
    generator = torch.Generator().manual_seed(0)
    # Quarters: the offset is added without rounding.
    x = offset + integers(500, 4, generator=generator, low=-16, high=17) / 4
    codes = offset + integers(64, 4, generator=generator, low=-16, high=17) / 4
    exactly(nearest_indices(x, codes), nearest_by_definition(x, codes))


ODD_CODES = [1e4, 1e6, -1e12, 1e20, 3e38, torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("num_odd", [1, 10])
@pytest.mark.parametrize("odd", ODD_CODES)
def test_distant_or_broken_codes_cost_the_others_no_accuracy(offset, num_odd, odd):
    """A shift by the mean code would take the digits of all others with it."""
    generator = torch.Generator().manual_seed(0)
    x = offset + integers(500, 4, generator=generator, low=-16, high=17) / 4
    codes = offset + integers(64, 4, generator=generator, low=-16, high=17) / 4
    codes[3 : 3 + 6 * num_odd : 6, 1] = odd
    for m in (1, 5):
        expected = nearest_by_definition(x, codes.nan_to_num(torch.inf), num_nearest=m)
        exactly(nearest_indices(x, codes, num_nearest=m), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_codes_that_are_not_finite_are_never_chosen(metric, value):
    x, codes = torch.randn(200, 4), torch.randn(16, 4)
    kept = torch.tensor([code for code in range(16) if code not in (0, 5)])
    codes[0, 2] = codes[5] = value
    expected = kept[nearest_by_definition(x, codes[kept], metric, num_nearest=14)]
    exactly(nearest_indices(x, codes, metric=metric), expected[:, 0])
    found = nearest_indices(x, codes, metric=metric, num_nearest=16)
    exactly(found, torch.cat([expected, expected[:, :1].expand(-1, 2)], dim=1))


def test_equal_distances_stay_equal_around_zero():
    """A shift that rounds would decide by chance between a code and its mirror image."""
    codes = torch.randn(50, 3) + 0.4
    codes[20], codes[30] = codes[0] / 8, -codes[0] / 8
    exactly(nearest_indices(torch.zeros(2, 3), codes), torch.tensor([20, 20]))
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    exactly(nearest_indices(torch.zeros(4, 2), codes), torch.zeros(4).long())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exponent", [-100, -60, -20, 0, 20, 60, 97])
def test_a_common_scale_changes_nothing(metric, exponent):
    x, codes = torch.randn(200, 4), torch.randn(32, 4)
    expected = nearest_by_definition(x, codes, metric)
    scale = 2.0**exponent  # without rounding
    exactly(nearest_indices(x * scale, codes * scale, metric=metric), expected)


def test_a_token_far_away_does_not_overflow():
    codes = torch.eye(3)
    x = torch.tensor([[3e38, 0.0, 0.0], [0.0, 3e38, 0.0], [-1e38, -1e38, 3e38]])
    exactly(nearest_indices(x, codes), torch.tensor([0, 1, 2]))
    # Here the products of one code are infinite of either sign, and their sum would be NaN.
    codes = torch.tensor([[2.0, -2.0], [2.0, 2.0], [-2.0, -1.0]])
    exactly(nearest_indices(torch.tensor([[3e38, 2e38]]), codes), torch.tensor([1]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_nearest", [1, 3])
def test_non_finite_vectors_get_a_valid_index_and_harm_no_other(value, num_nearest):
    x, codes = torch.randn(20, 4), torch.randn(6, 4)
    expected = nearest_indices(x, codes, num_nearest=num_nearest)
    x[3, 1] = value
    found = nearest_indices(x, codes, num_nearest=num_nearest)
    assert ((found >= 0) & (found < 6)).all()
    others = torch.arange(20) != 3
    exactly(found[others], expected[others])


def test_a_zero_vector_is_equally_similar_to_all():
    exactly(
        nearest_indices(torch.zeros(2, 3), torch.randn(5, 3), metric="cosine"),
        torch.zeros(2).long(),
    )


def test_cosine_ignores_lengths():
    x, codes = torch.randn(100, 4), torch.randn(16, 4)
    lengths = torch.rand(16, 1) * 100 + 0.01
    found = nearest_indices(x, codes * lengths, metric="cosine")
    exactly(found, nearest_by_definition(x, codes, "cosine"))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_compared_in_float32(low):
    """In low precision both squared norms round to the same and the wrong row would win."""
    codes = torch.tensor([[256.0, 4.0], [256.0, 0.0]])
    x = torch.tensor([[256.0, 0.0]])
    exactly(nearest_indices(x.to(low), codes.to(low)), torch.tensor([1]))
    # The dot products of the tokens with both codes are 65536 + 4 and 65536.
    exactly(nearest_indices(x.to(low) + 1, codes.to(low).flip(0), metric="dot"), torch.tensor([1]))


def test_mixed_dtypes_are_compared_in_the_wider():
    codes = torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64)
    exactly(nearest_indices(torch.tensor([[5.0]]), codes), torch.tensor([1]))


@pytest.mark.parametrize("metric", METRICS)
def test_autocast_does_not_change_the_result(metric):
    x, codes = torch.randn(512, 16), torch.randn(512, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nearest_indices(x, codes, metric=metric)
    exactly(inside, nearest_indices(x, codes, metric=metric))


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("num_nearest", [1, 2])
def test_leading_dimensions_are_free(leading, num_nearest):
    found = nearest_indices(torch.randn(*leading, 4), torch.randn(5, 4), num_nearest=num_nearest)
    assert found.shape == (leading if num_nearest == 1 else (*leading, num_nearest))
    assert found.dtype == torch.int64


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("num_nearest", [1, 3])
@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 0)])
def test_several_codebooks_are_searched_as_one_after_the_other(metric, num_nearest, leading):
    # Of different scales and offsets: each has a shift and a scale of its own.
    codes = (torch.randn(3, 9, 4) + 5) * torch.tensor([1.0, 1e30, 1e-30]).view(3, 1, 1)
    x = (torch.randn(*leading, 3, 4) + 5) * torch.tensor([1.0, 1e30, 1e-30]).view(3, 1)
    found = nearest_indices(x, codes, metric=metric, num_nearest=num_nearest)
    parts = [nearest_indices(x[..., i, :], codes[i], metric=metric, num_nearest=num_nearest)
             for i in range(3)]  # fmt: skip
    exactly(found, torch.stack(parts, dim=len(leading)))


def test_a_transposed_input_is_searched_like_a_copy():
    x, codes = torch.randn(2, 4, 9), torch.randn(6, 4)
    exactly(nearest_indices(x.mT, codes), nearest_indices(x.mT.contiguous(), codes))


def test_no_gradient_and_no_graph():
    x, codes = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    assert not nearest_indices(x, codes).requires_grad


def test_memory_beyond_the_result_is_one_block():
    x, codes = torch.randn(30000, 2), torch.randn(2000, 2)
    with LargestTensor() as largest, NoHostSync():
        nearest_indices(x, codes)
    assert largest.numel <= _search_blocks._MAX_BLOCK_ENTRIES < 30000 * 2000


@pytest.mark.parametrize("q", [None, 5])
def test_the_operator_is_registered_correctly(q):
    codes = torch.randn(6, 4) if q is None else torch.randn(q, 6, 4)
    arguments = (torch.randn(3, 5, 4), codes, "euclidean", 2)
    torch.library.opcheck(torch.ops.vqprior.nearest_indices.default, arguments)


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (
            torch.zeros(0, 4),
            ValueError,
            NO_TABLE + "(0, 4).",
        ),
        (
            torch.zeros(4),
            ValueError,
            NO_TABLE + "(4,).",
        ),
        (
            torch.zeros(3, 0),
            ValueError,
            NO_TABLE + "(3, 0).",
        ),
        (
            torch.zeros(3, 6, 4),
            ValueError,
            "`x` must have shape (..., 3, 4), one vector for each codebook, got (2, 4).",
        ),
        (
            torch.zeros(3, 5),
            ValueError,
            "`x` must have shape (..., 5), got (2, 4). Features come last: for feature maps "
            "(b, d, h, w), wrap the quantizer in `ChannelsFirst`.",
        ),
        (
            torch.zeros(3, 4).long(),
            TypeError,
            "`codes` must be a floating-point tensor, got torch.int64.",
        ),
    ],
)
def test_wrong_codes(codes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        nearest_indices(torch.zeros(2, 4), codes)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (
            torch.zeros(2, 4).long(),
            {},
            TypeError,
            "`x` must be a floating-point tensor, got torch.int64.",
        ),
        (torch.tensor(1.0), {}, ValueError, "`x` must have shape (..., 4), got ()."),
        (
            torch.zeros(2, 4),
            {"metric": "l1"},
            ValueError,
            "`metric` must be one of 'cosine', 'dot', 'euclidean', got 'l1'.",
        ),
        (
            torch.zeros(2, 4),
            {"num_nearest": 0},
            ValueError,
            "`num_nearest` must be at least 1, got 0.",
        ),
        (
            torch.zeros(2, 4),
            {"num_nearest": 4},
            ValueError,
            "`num_nearest` must be at most the number of codes, 3, got 4.",
        ),
    ],
)
def test_wrong_arguments(x, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        nearest_indices(x, torch.zeros(3, 4), **options)
