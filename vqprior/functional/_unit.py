"""L2 normalization of vectors of any finite length."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vqprior.functional._kernels._operators import is_traced


def to_unit_length(x: Tensor) -> Tensor:
    """Divides each vector ``(..., d)`` by its length; zero stays zero, with a gradient of zero.

    Divides by the largest feature first, because squares could overflow or underflow.
    """
    if is_traced(x) or forward_ad._current_level >= 0:
        return _by_autograd(x)
    unit: Tensor = _ToUnitLength.apply(x)
    return unit


class _ToUnitLength(torch.autograd.Function):
    """Computes the gradient from the unit vectors: autograd would go back through each division."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        largest = x.abs().amax(dim=-1, keepdim=True)
        # A zero vector stays zero if divided by infinity, and its gradient becomes zero.
        largest.masked_fill_(largest == 0, torch.inf)
        unit = x / largest
        length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min_(1)
        unit.div_(length)
        ctx.save_for_backward(x, unit, largest, length)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        x, unit, largest, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # for derivatives of higher order
            plain: Tensor = torch.autograd.grad(_by_autograd(x), x, grad, create_graph=True)[0]
            return plain
        along = (unit * grad).sum(dim=-1, keepdim=True)
        result: Tensor = torch.addcmul(grad, unit, along, value=-1).div_(length).div_(largest)
        return result


def _by_autograd(x: Tensor) -> Tensor:
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    nonzero = largest > 0
    x = torch.where(nonzero, x / torch.where(nonzero, largest, 1.0), 0.0)
    length: Tensor = torch.where(nonzero, x, 1.0).norm(dim=-1, keepdim=True)
    return x / length
