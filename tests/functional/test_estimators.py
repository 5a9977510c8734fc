"""Estimators: exact in value, correct in gradient."""

import pytest
import torch
from torch.testing import assert_close

from vqprior.functional import straight_through


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_straight_through_is_exact_in_value(low):
    """``x + (codes - x)`` would lose every digit of the codes here."""
    x, codes = (1e4 * torch.randn(1000)).to(low), (1e-3 * torch.randn(1000)).to(low)
    assert_close(straight_through(x, codes), codes, rtol=0, atol=0)


def test_straight_through_has_the_gradient_of_the_identity():
    x, codes = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    weight = torch.randn(5)
    (weight * straight_through(x, codes)).sum().backward()
    assert_close(x.grad, weight, rtol=0, atol=0)
    assert codes.grad is None


def test_straight_through_does_not_broadcast():
    with pytest.raises(ValueError, match=r"^`codes` must have shape \(3, 4\), got \(4,\)\.$"):
        straight_through(torch.zeros(3, 4), torch.zeros(4))
