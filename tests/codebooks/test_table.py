"""`Table`: a matrix of codes and how it is written to."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior import Table


def test_the_default_start_is_normal_of_length_about_one():
    codes = Table(1000, 50).vectors().detach() * 50**0.5
    # Standard errors over 50,000 standard normal draws: 4 times 1 / sqrt(n), 4 times sqrt(2 / n).
    assert abs(codes.mean()) < 4 / 50_000**0.5
    assert abs(codes.var() - 1) < 4 * (2 / 50_000) ** 0.5


def test_init_fills_the_parameter():
    table = Table(3, 2, init=nn.init.zeros_)
    assert_close(table.vectors().detach(), torch.zeros(3, 2))
    assert table.vectors() is table.codes
    assert (table.num_codes, table.dim, table.codes.requires_grad) == (3, 2, True)
    assert repr(table) == "Table(3, 2)"


def test_from_vectors_copies():
    vectors = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    table = Table.from_vectors(vectors)
    assert_close(table.vectors().detach(), vectors.detach(), rtol=0, atol=0)
    assert table.codes.is_leaf
    with torch.no_grad():
        vectors.zero_()
    assert table.vectors().abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_assign_overwrites_the_chosen_rows_alone(dtype):
    table = Table(4, 2).to(dtype)
    parameter, before = table.codes, table.codes.detach().clone()
    where = torch.tensor([True, False, False, True])
    table.assign_(torch.full((4, 2), 7.0), where)
    assert table.codes is parameter  # optimizers keep their reference
    assert_close(table.codes.detach()[where], torch.full((2, 2), 7.0, dtype=dtype))
    assert_close(table.codes.detach()[~where], before[~where], rtol=0, atol=0)


def test_assign_ignores_what_rejected_rows_hold():
    table, where = Table(2, 1, init=nn.init.zeros_), torch.tensor([True, False])
    table.assign_(torch.tensor([[1.0], [torch.nan]]), where)
    assert_close(table.codes.detach(), torch.tensor([[1.0], [0.0]]))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^`num_codes` must be at least 1, got 0\.$"):
        Table(0, 2)
    with pytest.raises(ValueError, match=r"^`dim` must be at least 1, got -1\.$"):
        Table(2, -1)
    with pytest.raises(ValueError, match=r"^`vectors` must have shape \(k, d\) with k and d at"):
        Table.from_vectors(torch.zeros(3))
    with pytest.raises(TypeError, match=r"^`vectors` must be a floating-point tensor, got torch\."):
        Table.from_vectors(torch.zeros(3, 2).long())
    table = Table(3, 2)
    with pytest.raises(ValueError, match=r"^`vectors` must have shape \(3, 2\), got \(3, 1\)\.$"):
        table.assign_(torch.zeros(3, 1), torch.ones(3) > 0)
    with pytest.raises(ValueError, match=r"^`where` must have shape \(3,\), got \(2,\)\.$"):
        table.assign_(torch.zeros(3, 2), torch.ones(2) > 0)
