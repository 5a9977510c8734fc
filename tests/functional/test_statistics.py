"""`code_sums_and_counts` against the one-hot product that it replaces."""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.contracts.observers import LargestTensor, NoHostSync
from vqprior.functional import code_sums_and_counts


def test_matches_the_one_hot_product():
    x, indices = torch.randn(6, 50, 3, dtype=torch.float64), torch.randint(0, 7, (6, 50))
    one_hot = F.one_hot(indices.reshape(-1), 7).double()
    statistics = code_sums_and_counts(x, indices, 7)
    assert_close(statistics[:, :3], one_hot.T @ x.reshape(-1, 3))
    assert_close(statistics[:, 3], one_hot.sum(dim=0), rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 5.0])
def test_minus_one_is_left_out_whatever_it_holds(value):
    x, indices = torch.ones(3, 2), torch.tensor([1, -1, 1])
    x[1] = value
    expected = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    assert_close(code_sums_and_counts(x, indices, 2), expected, rtol=0, atol=0)


def test_counts_without_features():
    counts = code_sums_and_counts(torch.empty(5, 0), torch.tensor([0, 2, 2, -1, 2]), 3)
    assert_close(counts, torch.tensor([[1.0], [0.0], [3.0]]), rtol=0, atol=0)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_summed_in_float32(low):
    """In float16 the sum of 5000 ones sticks at 2048, in bfloat16 at 256."""
    statistics = code_sums_and_counts(torch.ones(5000, 1, dtype=low), torch.zeros(5000).long(), 1)
    assert_close(statistics, torch.full((1, 2), 5000.0), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_any_integer_dtype_names_codes(dtype):
    statistics = code_sums_and_counts(torch.ones(2, 1), torch.tensor([1, -1], dtype=dtype), 2)
    assert_close(statistics, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), rtol=0, atol=0)


def test_empty_input_gives_zeros():
    assert_close(
        code_sums_and_counts(torch.empty(0, 3), torch.empty(0).long(), 2), torch.zeros(2, 4)
    )


def test_no_one_hot_and_no_host_sync():
    with LargestTensor() as largest, NoHostSync():
        code_sums_and_counts(torch.randn(500, 3), torch.randint(0, 400, (500,)), 400)
    assert largest.numel <= 500 * 4


@pytest.mark.parametrize(
    ("x", "indices", "num_codes", "error", "message"),
    [
        (
            torch.ones(2, 1).long(),
            torch.zeros(2).long(),
            1,
            TypeError,
            "`x` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.ones(2, 1),
            torch.zeros(2),
            1,
            TypeError,
            "`indices` must be an integer tensor, got torch.float32.",
        ),
        (
            torch.ones(2, 1),
            torch.zeros(2, 1).long(),
            1,
            ValueError,
            "`indices` must have shape (2,), got (2, 1).",
        ),
        (
            torch.ones(2, 1),
            torch.zeros(2).long(),
            0,
            ValueError,
            "`num_codes` must be at least 1, got 0.",
        ),
    ],
)
def test_wrong_arguments(x, indices, num_codes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        code_sums_and_counts(x, indices, num_codes)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_massive_vector_costs_other_codes_no_accuracy(offset):
    x, indices = offset + torch.randn(5000, 3), torch.randint(0, 7, (5000,))
    expected = code_sums_and_counts(x.double(), torch.where(indices == 2, -1, indices), 7)
    x[indices == 2] = 1e30
    found = code_sums_and_counts(x, indices, 7).double()
    found[2] = 0
    assert_close(found, expected, rtol=1e-5, atol=1e-3)
