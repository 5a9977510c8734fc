"""`L2Norm`: unit vectors, zero, and the Jacobian of the projection onto the sphere."""

import pytest
import torch
from torch.testing import assert_close

from vqprior.nn import L2Norm


@pytest.mark.parametrize("shape", [(5,), (7, 3), (2, 3, 4), (0, 4)])
def test_each_vector_is_divided_by_its_length(shape):
    x = 9 * torch.randn(shape)
    expected = [
        row / sum(value**2 for value in row) ** 0.5 for row in x.double().reshape(-1, shape[-1])
    ]
    expected = torch.stack(expected).reshape(shape) if expected else x.double()
    assert_close(L2Norm()(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_zero_stays_zero_with_a_gradient_of_zero():
    x = torch.zeros(2, 4, requires_grad=True)
    y = L2Norm()(x)
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()


def test_the_gradient_is_the_jacobian_of_the_projection():
    x = torch.randn(4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(L2Norm(), x)
    u = x / x.norm()
    expected = (torch.eye(4, dtype=torch.float64) - torch.outer(u, u)) / x.norm()
    assert_close(jacobian, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype):
    assert L2Norm()(torch.randn(3, 4).to(dtype)).dtype == dtype


def test_it_has_no_state():
    assert not L2Norm().state_dict()
    assert not list(L2Norm().parameters())
