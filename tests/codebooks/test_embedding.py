"""`EmbeddingCodebook`: a matrix of codes and how it is written to."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior import EmbeddingCodebook


def test_the_default_start_is_normal_of_length_about_one():
    codes = EmbeddingCodebook(1000, 50).codes().detach() * 50**0.5
    # Standard errors over 50,000 standard normal draws: 4 times 1 / sqrt(n), 4 times sqrt(2 / n).
    assert abs(codes.mean()) < 4 / 50_000**0.5
    assert abs(codes.var() - 1) < 4 * (2 / 50_000) ** 0.5


def test_init_fills_the_parameter():
    table = EmbeddingCodebook(3, 2, init=nn.init.zeros_)
    assert_close(table.codes().detach(), torch.zeros(3, 2))
    assert table.codes() is table.weight
    assert (table.num_codes, table.dim, table.weight.requires_grad) == (3, 2, True)
    assert repr(table) == "EmbeddingCodebook(3, 2)"


def test_from_codes_copies():
    vectors = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    table = EmbeddingCodebook.from_codes(vectors)
    assert_close(table.codes().detach(), vectors.detach(), rtol=0, atol=0)
    assert table.weight.is_leaf
    with torch.no_grad():
        vectors.zero_()
    assert table.codes().abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_assign_overwrites_the_chosen_rows_alone(dtype):
    table = EmbeddingCodebook(4, 2).to(dtype)
    parameter, before = table.weight, table.weight.detach().clone()
    where = torch.tensor([True, False, False, True])
    table.set_codes_(torch.full((4, 2), 7.0), where)
    assert table.weight is parameter  # optimizers keep their reference
    assert_close(table.weight.detach()[where], torch.full((2, 2), 7.0, dtype=dtype))
    assert_close(table.weight.detach()[~where], before[~where], rtol=0, atol=0)


def test_assign_ignores_what_rejected_rows_hold():
    table, where = EmbeddingCodebook(2, 1, init=nn.init.zeros_), torch.tensor([True, False])
    table.set_codes_(torch.tensor([[1.0], [torch.nan]]), where)
    assert_close(table.weight.detach(), torch.tensor([[1.0], [0.0]]))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^`num_codes` must be at least 1, got 0\.$"):
        EmbeddingCodebook(0, 2)
    with pytest.raises(ValueError, match=r"^`dim` must be at least 1, got -1\.$"):
        EmbeddingCodebook(2, -1)
    with pytest.raises(ValueError, match=r"^`codes` must have shape \(k, d\) with k and d at"):
        EmbeddingCodebook.from_codes(torch.zeros(3))
    with pytest.raises(TypeError, match=r"^`codes` must be a floating-point tensor, got torch\."):
        EmbeddingCodebook.from_codes(torch.zeros(3, 2).long())
    table = EmbeddingCodebook(3, 2)
    with pytest.raises(ValueError, match=r"^`codes` must have shape \(3, 2\), got \(3, 1\)\.$"):
        table.set_codes_(torch.zeros(3, 1), torch.ones(3) > 0)
    with pytest.raises(ValueError, match=r"^`where` must have shape \(3,\), got \(2,\)\.$"):
        table.set_codes_(torch.zeros(3, 2), torch.ones(2) > 0)


def test_a_gain_makes_codes_move_faster():
    """Adam moves a parameter by the learning rate at first; the code moves by four of it."""
    table = EmbeddingCodebook(2, 3, init=nn.init.ones_, gain=4.0)
    assert_close(table.codes().detach(), torch.ones(2, 3), rtol=0, atol=0)
    assert_close(table.weight.detach(), torch.full((2, 3), 0.25), rtol=0, atol=0)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.01)
    table.codes().sum().backward()
    optimizer.step()
    assert_close(table.codes().detach(), torch.full((2, 3), 1 - 0.04))
    table.set_codes_(torch.full((2, 3), 3.0), torch.tensor([True, False]))
    assert_close(table.codes().detach()[:, 0], torch.tensor([3.0, 0.96]))
    assert repr(table) == "EmbeddingCodebook(2, 3, gain=4.0)"
    with pytest.raises(ValueError, match=r"^`gain` must be greater than 0"):
        EmbeddingCodebook(2, 3, gain=0.0)
