"""Code-level supervision against its formulas, with soft targets written out in float64."""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.contracts.observers import LargestTensor, NoHostSync
from vqprior.functional import distance_cross_entropy, index_cross_entropy


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_cross_entropy_is_that_of_torch(leading, label_smoothing):
    logits, indices = torch.randn(*leading, 5), torch.randint(0, 5, leading)
    expected = F.cross_entropy(
        logits.reshape(-1, 5), indices.reshape(-1), label_smoothing=label_smoothing
    )
    assert_close(index_cross_entropy(logits, indices, label_smoothing=label_smoothing), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_cross_entropy_leaves_minus_one_out(label_smoothing, value):
    logits, indices = torch.randn(6, 5), torch.tensor([0, -1, 4, 2, -1, 1])
    valid = indices >= 0
    expected = index_cross_entropy(logits[valid], indices[valid], label_smoothing=label_smoothing)
    logits[~valid] = value
    logits.requires_grad_()
    loss = index_cross_entropy(logits, indices, label_smoothing=label_smoothing)
    assert_close(loss, expected)
    loss.backward()
    assert not logits.grad[~valid].any()
    assert logits.grad[valid].isfinite().all()


@pytest.mark.parametrize("n", [0, 3])
def test_cross_entropy_without_a_token_is_0(n):
    logits = torch.randn(n, 5, requires_grad=True)
    loss = index_cross_entropy(logits, torch.full((n,), -1))
    assert_close(loss, torch.zeros(()))
    loss.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32], ids=str)
def test_cross_entropy_takes_any_integer_dtype(dtype):
    logits, indices = torch.randn(6, 5), torch.tensor([0, -1, 4, 2, -1, 1])
    expected = index_cross_entropy(logits, indices)
    assert_close(index_cross_entropy(logits, indices.to(dtype)), expected, rtol=0, atol=0)


def test_cross_entropy_of_low_precision_is_float32():
    logits = torch.randn(6, 5).bfloat16()
    indices = torch.arange(6) % 5
    loss = index_cross_entropy(logits, indices)
    assert_close(loss, F.cross_entropy(logits.float(), indices))


@pytest.mark.parametrize(
    ("logits", "indices", "options", "error", "message"),
    [
        (
            torch.zeros(2, 3).long(),
            torch.zeros(2).long(),
            {},
            TypeError,
            "`logits` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2),
            {},
            TypeError,
            "`indices` must be an integer tensor, got torch.float32.",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(3).long(),
            {},
            ValueError,
            "`indices` must have shape (2,), got (3,).",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"label_smoothing": 1.0},
            ValueError,
            "`label_smoothing` must be in [0.0, 1.0), got 1.0.",
        ),
    ],
)
def test_cross_entropy_rejects_wrong_arguments(logits, indices, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        index_cross_entropy(logits, indices, **options)


def soft_targets(indices, codes, temperature):
    """Rows of ``exp(-|e_j - e_t|^2 / temperature)``, normalized, in float64."""
    codes = codes.detach().double()
    distances = (codes[indices].unsqueeze(-2) - codes).square().sum(-1)
    weights = (-distances / temperature).exp()
    return weights / weights.sum(-1, keepdim=True)


def distance_by_definition(logits, indices, codes, temperature):
    targets = soft_targets(indices, codes, temperature)
    return -(targets * logits.double().log_softmax(-1)).sum(-1).mean()


def distance_case(leading=(7,), k=5, dtype=torch.float64):
    logits = torch.randn(*leading, k, dtype=dtype, requires_grad=True)
    codes = torch.randn(k, 3, dtype=dtype, requires_grad=True)
    return logits, torch.randint(0, k, leading), codes


@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("leading", [(3,), (4, 5), (), (5,), (6,)])  # k = 5: both tables
def test_distance_matches_its_definition(leading, temperature):
    logits, indices, codes = distance_case(leading)
    loss = distance_cross_entropy(logits, indices, codes, temperature=temperature)
    expected = distance_by_definition(logits, indices, codes, temperature)
    assert_close(loss, expected)
    actual = torch.autograd.grad(loss, [logits, codes], allow_unused=True)
    assert_close(actual[0], torch.autograd.grad(expected, logits)[0])
    assert actual[1] is None


@pytest.mark.parametrize("n", [3, 50])
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_distance_approaches_cross_entropy_as_the_temperature_falls(n, temperature):
    logits, indices, codes = distance_case((n,), dtype=torch.float32)
    loss = distance_cross_entropy(logits, indices, codes, temperature=temperature)
    assert_close(loss, index_cross_entropy(logits, indices))


def test_distance_at_a_high_temperature_has_uniform_targets():
    logits, indices, codes = distance_case()
    loss = distance_cross_entropy(logits, indices, codes, temperature=1e30)
    assert_close(loss, -logits.log_softmax(-1).mean())


@pytest.mark.parametrize("n", [3, 50])
def test_distance_survives_a_common_offset(n):
    logits, indices, codes = distance_case((n,), dtype=torch.float32)
    codes = (codes.detach() * 64).round() / 64 + 4096  # exact in float32
    loss = distance_cross_entropy(logits, indices, codes)
    expected = distance_by_definition(logits, indices, codes, 1.0)
    assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [3, 50])
def test_distance_of_low_precision_is_computed_in_float32(low, n):
    logits, indices, codes = (t.detach() for t in distance_case((n,), dtype=torch.float32))
    logits, codes = (10 * logits).to(low), (10 * codes).to(low)
    expected = distance_by_definition(logits, indices, codes, 50.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distance_cross_entropy(logits, indices, codes, temperature=50.0)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_distance_of_large_logits_is_finite(scale):
    logits, indices, codes = distance_case(dtype=torch.float32)
    loss = distance_cross_entropy(scale * logits, indices, codes)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_distance_lets_excluded_codes_be():
    """A logit of minus infinity where the target underflows to 0 costs nothing."""
    codes = torch.tensor([[0.0], [1.0], [100.0]])
    logits = torch.tensor([[0.5, 0.2, -torch.inf]], requires_grad=True)
    loss = distance_cross_entropy(logits, torch.tensor([0]), codes)
    assert_close(loss, distance_cross_entropy(logits[:, :2], torch.tensor([0]), codes[:2]))
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("n", "k"), [(40, 20), (20, 40)])
def test_distance_needs_no_more_memory_than_logits(n, k):
    logits, codes = torch.randn(n, k, requires_grad=True), torch.randn(k, 3)
    with LargestTensor() as largest, NoHostSync():
        distance_cross_entropy(logits, torch.randint(0, k, (n,)), codes).backward()
    assert largest.numel <= n * k


@pytest.fixture(params=["code", "distance"])
def cross_entropy(request):
    """Both losses as functions of logits, indices and weights, for codes of five."""
    if request.param == "code":
        return index_cross_entropy
    codes = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
    return lambda logits, indices, **options: distance_cross_entropy(
        logits, indices, codes, **options
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_weights_make_a_weighted_mean(cross_entropy, value):
    logits, indices = torch.randn(6, 5), torch.tensor([0, -1, 4, 2, 3, 1])
    weights = torch.tensor([0.5, torch.nan, 2.0, 0.0, 1.0, 3.0])
    valid = (indices >= 0) & (weights > 0)
    single = torch.stack([cross_entropy(a, b) for a, b in zip(logits, indices, strict=True)])
    expected = (single * weights)[valid].sum() / 6.5
    logits[~valid] = value
    logits.requires_grad_()
    loss = cross_entropy(logits, indices, weights=weights)
    assert_close(loss, expected)
    loss.backward()
    assert not logits.grad[~valid].any()
    assert logits.grad[valid].isfinite().all()


def test_equal_weights_change_nothing(cross_entropy):
    logits, indices = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    weights = torch.full((2, 3), 7.0, dtype=torch.float16)
    assert_close(cross_entropy(logits, indices, weights=weights), cross_entropy(logits, indices))


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("index", [-1, 2])
def test_without_weight_the_loss_is_0(cross_entropy, n, index):
    logits = torch.randn(n, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((n,), index), weights=torch.zeros(n))
    assert_close(loss, torch.zeros(()))
    loss.backward()
    assert not logits.grad.any()


def test_compiles_in_one_graph(cross_entropy):
    torch.compiler.reset()
    logits, indices, weights = torch.randn(9, 5), torch.randint(-1, 5, (9,)), torch.rand(9)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    with NoHostSync():
        expected = cross_entropy(logits, indices, weights=weights)
    assert_close(compiled(logits, indices, weights=weights), expected)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            torch.ones(2).long(),
            TypeError,
            "`weights` must be a floating-point tensor, got torch.int64.",
        ),
        (torch.ones(3), ValueError, "`weights` must have shape (2,), got (3,)."),
    ],
)
def test_wrong_weights(cross_entropy, weights, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        cross_entropy(torch.zeros(2, 5), torch.zeros(2).long(), weights=weights)


@pytest.mark.parametrize(
    ("logits", "codes", "temperature", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3),
            1.0,
            ValueError,
            "`codes` must have shape (k, d) with k and d at least 1, got (3,).",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(4, 1),
            1.0,
            ValueError,
            "`logits` must have shape (..., 4), one entry for each code, got (2, 3).",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(3, 1),
            0.0,
            ValueError,
            "`temperature` must be greater than 0, got 0.0.",
        ),
        (
            torch.zeros(2, 3).long(),
            torch.zeros(3, 1),
            1.0,
            TypeError,
            "`logits` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.zeros(5, 3),
            torch.zeros(3, 1),
            1.0,
            ValueError,
            "`indices` must have shape (5,), got (2,).",
        ),
    ],
)
def test_distance_rejects_wrong_arguments(logits, codes, temperature, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        distance_cross_entropy(logits, torch.zeros(2).long(), codes, temperature=temperature)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_broken_code_is_no_neighbor(value):
    codes, logits, indices = torch.randn(6, 3), torch.randn(20, 6), torch.randint(0, 5, (20,))
    logits[:, 5] = -torch.inf
    expected = distance_cross_entropy(logits[:, :5], indices, codes[:5])
    codes[5] = value
    assert_close(distance_cross_entropy(logits, indices, codes), expected)
