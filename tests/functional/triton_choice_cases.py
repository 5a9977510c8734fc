"""What the kernels of a choice by logits compute, against definitions in float64.

`test_triton_choice.py` runs this file in processes of its own, as `test_triton.py` runs the cases
of the search.
"""

import itertools

import numpy
import pytest
import torch
from torch.testing import assert_close

from tests.functional.triton_cases import DEVICE, LOW, exactly, integers
from vqprior.functional._kernels import _triton_choice_gradient
from vqprior.functional._kernels._triton_choice import choose
from vqprior.functional._kernels._triton_choice_gradient import gradient, plan_gradient

DTYPES = [torch.float32, *LOW]
# (n, k, d): no size a multiple of a block: one block and several of rows, codes and features, which
# are loaded once, twice (above 32) or block by block (above 64).
SIZES = [
    (0, 5, 3),
    (1, 1, 1),
    (3, 7, 4),
    (17, 70, 5),
    (70, 130, 33),
    (5, 1100, 20),
    (65, 65, 70),
    (2, 2100, 129),
    (3, 20, 4096),
]


def problem(n, k, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(*size, generator=generator) for size in ((n, k), (k, d), (n, d)))
    return [tensor.to(dtype) for tensor in made]


def by_definition(grad, logits, codes, temperature):
    finite = codes.double().isfinite().all(dim=1, keepdim=True)
    value = grad.double() @ torch.where(finite, codes.double(), 0.0).T
    p = (logits.double() / temperature).softmax(dim=-1)
    return p * (value - (p * value).sum(dim=-1, keepdim=True)) / temperature


def computed(grad, logits, codes, temperature):
    arguments = [tensor.to(DEVICE) for tensor in (grad, logits, codes, logits.argmax(dim=-1))]
    return gradient(*arguments, temperature).cpu()


def close(actual, expected, grad, codes):
    """Up to roundings of what is summed, and one of the result to its dtype."""
    size = (grad.double().abs() @ codes.double().abs().T).max() if expected.numel() else 0.0
    atol = float(size) * (codes.shape[1] + 8) * 2.0**-23
    eps = torch.finfo(actual.dtype).eps
    tiny = torch.finfo(actual.dtype).tiny if actual.dtype == torch.float16 else 0
    assert_close(actual.double(), expected, rtol=max(eps, 1e-5), atol=atol + tiny * eps)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_choice_is_the_first_maximum_and_its_code(size, dtype):
    logits, codes = integers(*size[:2]).to(dtype), problem(*size, dtype)[1]
    indices, vectors = choose(logits.to(DEVICE), codes.to(DEVICE))
    expected = torch.from_numpy(logits.float().numpy().argmax(axis=-1))  # the first of equals
    exactly(indices, expected)
    exactly(vectors, codes[expected])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_logits_are_ordered_as_in_torch(dtype):
    """Zeros are equal, NaN with either sign is largest, and minus infinity can be chosen."""
    inf, nan = torch.inf, torch.nan
    rows = [
        [-0.0, 0.0, -1.0],
        [0.0, -0.0, -1.0],
        [-inf, -inf, -inf],
        [-inf, -1e4, -inf],
        [1.0, inf, inf],
        [inf, nan, nan],
        [-5.0, -nan, inf],
        [-2.0, -1.0, -3.0],
        [1e-7, 0.0, 5e-8],
    ]
    logits = torch.tensor(rows, dtype=dtype)
    indices, _ = choose(logits.to(DEVICE), torch.zeros(3, 2, device=DEVICE))
    exactly(indices, torch.from_numpy(logits.float().numpy().argmax(axis=-1)))


def test_the_first_maximum_wins_across_blocks():
    logits = torch.zeros(4, 3000)
    for row, places in enumerate([(2999,), (5, 1029), (1030, 6), (1023, 1024)]):
        logits[row, list(places)] = 1
    indices, _ = choose(logits.to(DEVICE), torch.zeros(3000, 1, device=DEVICE))
    exactly(indices, torch.tensor([2999, 5, 6, 1023]))
    many = torch.zeros(1, 2**18 - 1)
    many[0, -2:] = 1
    indices, _ = choose(many.to(DEVICE), torch.zeros(2**18 - 1, 1, device=DEVICE))
    exactly(indices, torch.tensor([2**18 - 3]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_gradient_matches_the_definition(size, temperature):
    logits, codes, grad = problem(*size)
    actual = computed(grad, logits, codes, temperature)
    close(actual, by_definition(grad, logits, codes, temperature), grad, codes)


@pytest.mark.parametrize("of_codes", DTYPES, ids=str)
@pytest.mark.parametrize("of_logits", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(17, 70, 5), (70, 96, 40), (20, 33, 129)], ids=str)
def test_low_precision_is_computed_in_float32(size, of_logits, of_codes):
    logits, codes, grad = problem(*size)
    logits, codes, grad = logits.to(of_logits), codes.to(of_codes), grad.to(of_codes)
    actual = computed(grad, logits, codes, 0.7)
    assert actual.dtype == of_logits
    close(actual, by_definition(grad, logits, codes, 0.7), grad, codes)


@pytest.mark.parametrize("programs", [1, 2, 7, 256])
@pytest.mark.parametrize("size", [(5, 1000, 3), (70, 300, 40)], ids=str)
def test_shares_of_codes_do_not_change_the_gradient(monkeypatch, programs, size):
    monkeypatch.setattr(_triton_choice_gradient, "_PROGRAMS", programs)
    logits, codes, grad = problem(*size)
    actual = computed(grad, logits, codes, 1.0)
    close(actual, by_definition(grad, logits, codes, 1.0), grad, codes)


def test_a_plan_covers_all_codes_and_starts_no_idle_program():
    ranges = (1, 16, 17, 1000, 10**6), (1, 16, 63, 1000, 2**18), (1, 16, 33, 65, 4096)
    for n, k, d in itertools.product(*ranges):
        plan = plan_gradient(n, k, d)
        share = plan.blocks * plan.codes
        assert (plan.splits - 1) * share < k <= plan.splits * share
    assert plan_gradient(4096, 8192, 64).splits == 4
    assert plan_gradient(64, 2**18, 64).splits == 64
    assert plan_gradient(10**6, 8192, 64).splits == 1


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_extreme_logits_do_not_overflow(scale):
    logits, codes, grad = problem(20, 70, 5)
    logits *= scale
    actual = computed(grad, logits, codes, 1.0)
    close(actual, by_definition(grad, logits, codes, 1.0), grad, codes)


def test_forbidden_codes_get_no_gradient_even_a_whole_block_of_them():
    logits, codes, grad = problem(20, 200, 5)
    logits[:, 60:] = -torch.inf
    actual = computed(grad, logits, codes, 1.0)
    close(actual, by_definition(grad, logits, codes, 1.0), grad, codes)
    assert not actual[:, 60:].any()


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_rows_without_a_softmax_are_nan_and_harm_no_other(value):
    logits, codes, grad = problem(20, 70, 5)
    expected = by_definition(grad, logits, codes, 1.0)
    logits[3] = value
    expected[3] = torch.nan
    with numpy.errstate(all="ignore"):  # the interpreter computes by numpy
        actual = computed(grad, logits, codes, 1.0)
    assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("d", [5, 70])
def test_codes_that_are_not_finite_count_as_zeros(value, d):
    logits, codes, grad = problem(20, 70, d)
    codes[5, 1] = codes[33, d - 1] = value
    actual = computed(grad, logits, codes, 1.0)
    expected = by_definition(grad, logits, codes, 1.0)
    close(actual, expected, grad, codes.nan_to_num(0.0, 0.0, 0.0))


VIEWS = [
    lambda tensor: tensor[::2],
    lambda tensor: tensor[:, 1:-1],
    lambda tensor: tensor.T,
    lambda tensor: tensor[:1].expand(len(tensor), -1),
    lambda tensor: tensor[:, ::3],
]


@pytest.mark.parametrize("view", VIEWS, ids=["rows", "columns", "transposed", "repeated", "steps"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["logits", "codes", "grad"])
def test_any_strides_are_read_in_place(view, which):
    viewed = view(problem(40, 40, 1)[0].to(DEVICE))
    rows, columns = viewed.shape
    sizes = [(rows, columns, 6), (19, rows, columns), (rows, 19, columns)]
    tensors = [tensor.to(DEVICE) for tensor in problem(*sizes[which], seed=1)]
    tensors[which] = viewed
    logits, codes, grad = tensors
    indices, vectors = choose(logits, codes)
    exactly(indices, logits.argmax(dim=-1).cpu())
    exactly(vectors, codes.cpu()[indices.cpu()])
    expected = by_definition(grad.cpu(), logits.cpu(), codes.cpu(), 1.0)
    close(gradient(grad, logits, codes, indices, 1.0).cpu(), expected, grad.cpu(), codes.cpu())


def test_two_calls_give_the_same_bits():
    logits, codes, grad = problem(70, 300, 40)
    exactly(computed(grad, logits, codes, 0.7), computed(grad, logits, codes, 0.7))
