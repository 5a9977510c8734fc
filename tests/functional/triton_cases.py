"""What the Triton kernels compute, against definitions in float64.

`test_triton.py` runs this file in processes of its own: Triton decides when a kernel is defined
whether it is interpreted, on the CPU, or compiled for a GPU.
"""

import itertools
import os

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE = torch.device("cpu")
elif torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from tests.contracts.observers import NoHostSync
from vqprior import CodebookEMA, VectorQuantizer
from vqprior.functional import code_sums_and_counts, nearest_indices
from vqprior.functional._kernels import _triton, _triton_search, _triton_statistics
from vqprior.functional._kernels._triton_prepare import prepare_table
from vqprior.functional._kernels._triton_search import plan_search, search_table
from vqprior.functional._kernels._triton_statistics import add_statistics_
from vqprior.functional._search import _prepare as prepare_codes

LOW = [torch.float16, torch.bfloat16]
# No size a multiple of a block: one block and several of rows, codes and features, which are
# loaded once, twice (above 32) or block by block (above 64).
SIZES = [
    (1, 1, 1, 1),
    (1, 0, 5, 3),
    (1, 3, 1, 4),
    (2, 70, 130, 5),
    (3, 17, 33, 16),
    (1, 65, 65, 33),
    (1, 3, 200, 64),
    (2, 20, 100, 70),
    (1, 130, 20, 129),
]


def exactly(actual, expected):
    assert_close(actual.cpu(), expected, rtol=0, atol=0)


def integers(*shape, seed=0):
    """Exact in every dtype and in every order of additions, so that ties are real ties."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def problem(q, n, k, d):
    """Integers ``x``, ``keys``, ``bias`` and ``shift``, and a different power of two each."""
    tensors = (integers(q, n, d), integers(q, k, d, seed=1), integers(q, k, seed=2))
    return *tensors, integers(q, d, seed=3), 2.0 ** -torch.arange(q)


def scores(x, keys, bias, shift, scale):
    rest = ((x.double() - shift.double().unsqueeze(1)) * scale.double()[:, None, None]).clamp(
        -1e30, 1e30
    )
    return bias.double().unsqueeze(1) - 2 * rest @ keys.double().mT


def by_definition(*arguments):
    return scores(*arguments).argsort(dim=-1, stable=True)[..., 0]


def nearest(x, keys, bias, shift, scale):
    """The search among any keys, padded to the blocks of its plan."""
    plan = plan_search(*x.shape[:2], *keys.shape[1:])
    more = (0, -keys.shape[1] % plan.codes)
    table = F.pad(keys.mT, (*more, 0, -keys.shape[2] % plan.features)).contiguous()
    return search_table(x, table, F.pad(bias, more, value=torch.inf), shift, scale, plan)


def search(*arguments):
    return nearest(*(tensor.to(DEVICE) for tensor in arguments))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_the_search_matches_the_definition_ties_included(size, dtype):
    x, *others = problem(*size)
    exactly(search(x.to(dtype), *others), by_definition(x, *others))


@pytest.mark.parametrize("size", SIZES[3:], ids=str)
def test_reals_are_compared_as_exactly_as_float32_can(size):
    q, n, k, d = size
    x, keys, bias, shift = (torch.randn(s) for s in [(q, n, d), (q, k, d), (q, k), (q, d)])
    scale = torch.rand(q) + 0.5
    expected = scores(x, keys, bias, shift, scale)
    found = search(x, keys, bias, shift, scale).cpu().unsqueeze(2)
    excess = expected.gather(2, found).squeeze(2) - expected.amin(dim=2)
    # Two scores, each of d products and d + 4 roundings of at most 2^-24 of what is added up.
    sizes = scores(x.abs(), -keys.abs(), bias.abs(), -shift.abs(), scale)
    assert (excess <= 2 * (d + 4) * 2**-24 * sizes.amax(dim=2)).all()


@pytest.mark.parametrize("programs", [1, 2, 3, 256])
@pytest.mark.parametrize("size", [(1, 5, 300, 3), (2, 70, 300, 40)], ids=str)
def test_shares_of_codes_do_not_change_the_result(monkeypatch, programs, size):
    monkeypatch.setattr(_triton_search, "_PROGRAMS", programs)
    arguments = problem(*size)
    exactly(search(*arguments), by_definition(*arguments))


@pytest.mark.parametrize("programs", [1, 2, 256])
@pytest.mark.parametrize("copies", [(0, 299), (63, 64), (5, 69, 133), (250, 299)], ids=str)
def test_the_first_of_equal_codes_wins_wherever_they_are(monkeypatch, programs, copies):
    """On a GPU every column of a product is computed alike, so that any equal codes tie. Some
    libraries of CPUs, which the interpreter multiplies with, round columns differently: there the
    numbers are exact."""
    monkeypatch.setattr(_triton_search, "_PROGRAMS", programs)
    x, keys = torch.randn(1, 20, 70), torch.zeros(1, 300, 70)
    if DEVICE.type == "cpu":
        x = integers(1, 20, 70)
    keys[:, list(copies)] = x[:, 0]
    bias = torch.full((1, 300), 1e4)
    bias[:, list(copies)] = 0
    found = search(x, keys, bias, torch.zeros(1, 70), torch.ones(1))
    exactly(found, torch.full((1, 20), copies[0]))


def test_all_codes_equal_give_the_first():
    x, keys = torch.randn(2, 70, 3), torch.zeros(2, 200, 3)
    found = search(x, keys, torch.zeros(2, 200), torch.zeros(2, 3), torch.ones(2))
    exactly(found, torch.zeros(2, 70).long())


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("bits", [12, 23])
def test_the_product_rounds_no_factor(dtype, bits):
    """TF32, as tensor cores take it, keeps 10 bits: the codes would tie, and the first win."""
    keys = torch.ones(1, 2, 20)
    keys[0, 1, 7] += 2.0**-bits
    x = torch.zeros(1, 3, 20, dtype=dtype)
    x[:, :, 7] = 1
    found = search(x, keys, torch.zeros(1, 2), torch.zeros(1, 20), torch.ones(1))
    exactly(found, torch.ones(1, 3).long())


def test_shift_and_scale_are_applied_before_the_product():
    """Without the shift, products of 1e8 would leave no digit for differences of 1/4."""
    rest, keys = integers(1, 70, 4) / 4, integers(1, 33, 4, seed=1) / 4
    shift, scale = torch.full((1, 4), 1e4), torch.full((1,), 2.0**-9)
    arguments = rest + 1e4, keys, (keys.square().sum(dim=2) * scale), shift, scale
    exactly(search(*arguments), (rest.unsqueeze(2) - keys.unsqueeze(1)).norm(dim=3).argmin(dim=2))


@pytest.mark.parametrize("odd", [1e6, 1e20, torch.inf, torch.nan])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_odd_codes_cost_the_others_no_accuracy(odd, offset):
    x, codes = offset + integers(1, 70, 4) / 4, offset + integers(1, 33, 4, seed=1) / 4
    codes[0, 5:9, 1] = odd
    prepared = [part.contiguous() for part in prepare_codes(codes, "euclidean")]
    distances = (
        x.double().unsqueeze(2) - codes.nan_to_num(torch.inf).double().unsqueeze(1)
    ).square()
    exactly(search(x, *prepared), distances.sum(dim=3).argmin(dim=2))


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 70, 20), (1, 33, 70)], ids=str)
@pytest.mark.parametrize(("odd", "offset"), [(0.0, 0.0), (1e6, 1e3), (torch.inf, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_prepared_as_by_plain_operators(size, odd, offset, dtype):
    (_, k, d), codes = size, (offset + torch.randn(size)).to(dtype)
    codes[:, k // 3, 0] += odd
    ok = codes.isfinite().all(dim=2)
    for metric in ("euclidean", "dot"):
        keys, bias, *expected = prepare_codes(codes.float(), metric)
        table, lengths, *found = prepare_table(
            codes.to(DEVICE), euclidean=metric == "euclidean", scale=None, block=64, features=32
        )
        exactly(found[0], expected[0])
        exactly(found[1], expected[1])
        exactly(table[:, :d, :k].mT[ok], keys[ok])
        assert_close(lengths[:, :k].cpu(), bias, rtol=1e-5, atol=0)
        assert not table[:, d:].any()
        assert (lengths[:, k:] == torch.inf).all()


def test_a_row_far_away_is_clamped():
    x = torch.tensor([[[3e38, 0.0, 0.0], [0.0, 3e38, 0.0], [-1e38, -1e38, 3e38]]])
    found = search(x, torch.eye(3)[None], torch.ones(1, 3), torch.zeros(1, 3), torch.ones(1))
    exactly(found, torch.tensor([[0, 1, 2]]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("programs", [1, 256])
@pytest.mark.parametrize("d", [4, 70])
def test_non_finite_rows_get_a_valid_index_and_harm_no_other(monkeypatch, value, programs, d):
    monkeypatch.setattr(_triton_search, "_PROGRAMS", programs)
    x, *others = problem(1, 20, 130, d)
    expected = by_definition(x, *others)
    x[0, 3, 1] = value
    found = search(x, *others).cpu()
    assert ((found >= 0) & (found < 130)).all()
    kept = torch.arange(20) != 3
    exactly(found[:, kept], expected[:, kept])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::3],
        lambda x: x[:, :, 2:],
        lambda x: x.transpose(0, 1),
        lambda x: x.mT,
        lambda x: x[:, :1].expand(-1, 20, -1),
        lambda x: x[:, 1:, 1::2],
    ],
    ids=["rows", "columns", "codebooks", "features", "repeated", "all"],
)
def test_any_strides_are_read_in_place(view):
    x = view(integers(3, 25, 37).to(DEVICE))
    q, _, d = x.shape
    _, *others = problem(q, 1, 70, d)
    found = nearest(x, *(tensor.to(DEVICE) for tensor in others))
    exactly(found, by_definition(x.cpu(), *others))


def test_a_plan_covers_all_codes_and_starts_no_idle_program():
    ranges = (1, 3), (1, 16, 17, 64, 1000, 10**6), (1, 16, 63, 1000, 65536), (1, 16, 33, 65, 4096)
    for q, n, k, d in itertools.product(*ranges):
        plan = plan_search(q, n, k, d)
        share = plan.blocks * plan.codes
        assert (plan.splits - 1) * share < k <= plan.splits * share


def test_few_vectors_share_the_codes_and_many_do_not():
    assert plan_search(1, 64, 65536, 64).splits == 256
    assert plan_search(8, 64, 65536, 64).splits == 32
    assert plan_search(1, 10**6, 65536, 64).splits == 1


def test_nothing_waits_for_the_device():
    arguments = [tensor.to(DEVICE) for tensor in problem(2, 20, 100, 4)]
    x, indices = arguments[0][0], torch.zeros(20, dtype=torch.int64, device=DEVICE)
    totals = torch.zeros(3, 5, device=DEVICE)
    with NoHostSync():
        nearest(*arguments)
        add_statistics_(totals, x, indices)


def statistics(x, indices, k):
    totals = torch.zeros(k, x.shape[1] + 1, device=DEVICE)
    add_statistics_(totals, x.to(DEVICE), indices.to(DEVICE))
    return totals


def sums_by_definition(x, indices, k):
    valid = indices >= 0
    rows = torch.cat([x.double(), torch.ones(len(x), 1).double()], dim=1)[valid]
    totals = torch.zeros(k, x.shape[1] + 1, dtype=torch.float64)
    return totals.index_add_(0, indices[valid], rows).float()


def choices(n, k):
    return torch.randint(-1, k, (n,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(0, 2, 3), (1, 1, 1), (300, 5, 0), (3000, 7, 1), (100, 7, 5), (70, 3, 128), (33, 2, 150)],
)
def test_statistics_match_the_definition(n, k, d, dtype):
    x, indices = integers(n, d), choices(n, k)
    exactly(statistics(x.to(dtype), indices, k), sums_by_definition(x, indices, k))


def test_statistics_of_reals_are_sums_in_float32():
    x, indices = torch.randn(500, 9), choices(500, 4)
    assert_close(statistics(x, indices, 4).cpu(), sums_by_definition(x, indices, 4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 5.0])
def test_minus_one_is_left_out_whatever_it_holds(value):
    x, indices = integers(50, 4), choices(50, 3)
    expected = sums_by_definition(x, indices, 3)
    x[indices < 0] = value
    exactly(statistics(x, indices, 3), expected)


def test_an_index_that_names_no_code_writes_nowhere():
    storage = torch.zeros(4, 3, device=DEVICE)
    indices = torch.tensor([0, 2, 3, -2], device=DEVICE)
    add_statistics_(storage[:2], torch.ones(4, 2, device=DEVICE), indices)
    exactly(storage, torch.tensor([[1.0, 1.0, 1.0], *[[0.0, 0.0, 0.0]] * 3]))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_summed_in_float32(dtype):
    """In float16 the sum of 5000 ones sticks at 2048, in bfloat16 at 256."""
    totals = statistics(torch.ones(5000, 1, dtype=dtype), torch.zeros(5000).long(), 1)
    exactly(totals, torch.full((1, 2), 5000.0))


def test_statistics_are_added_to_what_is_there():
    totals = torch.full((2, 2), 10.0, device=DEVICE)
    indices = torch.tensor([1, 1], device=DEVICE)
    add_statistics_(totals, torch.ones(2, 1, device=DEVICE), indices)
    exactly(totals, torch.tensor([[10.0, 10.0], [12.0, 12.0]]))


@pytest.mark.parametrize(
    "view",
    [lambda x: x[::2], lambda x: x[:, 1:], lambda x: x.T, lambda x: x[:1].expand(30, -1)],
    ids=["rows", "columns", "transposed", "repeated"],
)
def test_statistics_take_any_strides(view):
    x = view(integers(40, 20).to(DEVICE))
    indices = choices(2 * len(x), 5)[::2]
    exactly(statistics(x, indices, 5), sums_by_definition(x.cpu(), indices, 5))


@pytest.fixture
def kernels(monkeypatch):
    """Makes the public functions take the kernels, on the CPU too; the calls they get."""
    calls = []
    watched_ones = [(_triton_search, "nearest_codes"), (_triton_statistics, "add_statistics_")]
    for module, name in watched_ones:
        kernel = getattr(module, name)

        def watched(*arguments, kernel=kernel, **options):
            calls.append(kernel.__name__)
            return kernel(*arguments, **options)

        monkeypatch.setattr(module, name, watched)
    monkeypatch.setattr(_triton, "is_usable", lambda *tensors: True)
    return calls


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("q", [None, 3])
def test_the_public_search_takes_the_kernel(kernels, metric, q):
    lead = () if q is None else (q,)
    codes = torch.randn(*lead, 40, 5, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(7, 9, *lead, 5, generator=torch.Generator().manual_seed(1)).double()
    expected = nearest_indices(x, codes, metric=metric, num_nearest=2)[..., 0]
    assert not kernels  # more than one of the nearest is left to plain operators
    narrow = (x.float().to(DEVICE), codes.float().to(DEVICE))
    exactly(nearest_indices(*narrow, metric=metric), expected)
    assert kernels == ["nearest_codes"]


def test_the_public_search_takes_codes_with_any_strides(kernels):
    codes = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).T
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    expected = torch.cdist(x.double(), codes.double()).argsort(dim=-1, stable=True)[:, 0]
    exactly(nearest_indices(x.to(DEVICE), codes.to(DEVICE)), expected)
    assert kernels == ["nearest_codes"]


def test_the_public_statistics_take_the_kernel_where_order_is_free(kernels):
    x, indices = integers(6, 5, 4), choices(30, 3).view(6, 5)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            totals = code_sums_and_counts(x.to(DEVICE), indices.to(DEVICE), 3)
        finally:
            torch.use_deterministic_algorithms(mode=False)
        exactly(totals, sums_by_definition(x.flatten(0, 1), indices.flatten(), 3))
    assert kernels == ["add_statistics_"]


def test_a_quantizer_learns_by_the_kernels(kernels, monkeypatch):
    vq = VectorQuantizer(4, 8).to(DEVICE)
    twin = VectorQuantizer(4, 8).double()
    twin.load_state_dict(vq.state_dict())
    x, mask = integers(2, 20, 4), torch.arange(20) % 3 > 0
    for quantizer, dtype in ((twin, torch.float64), (vq, torch.float32)):
        used, ema = len(kernels), CodebookEMA(quantizer)
        usable = dtype == torch.float32
        monkeypatch.setattr(_triton, "is_usable", lambda *tensors, usable=usable: usable)
        tokens = x.to(quantizer.codebook.weight.device, dtype)
        ema.step(quantizer(tokens, mask.expand(2, -1).to(tokens.device)))
        assert len(kernels) - used == (1 if usable else 0)  # of those that are watched
    assert_close(vq.codebook.weight.detach().cpu().double(), twin.codebook.weight.detach().cpu())
