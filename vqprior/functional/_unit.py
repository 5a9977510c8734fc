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
    if is_traced(x) or forward_ad._current_level >= 0 or not x.requires_grad:
        return _divide(x)[0]
    unit: Tensor = _ToUnitLength.apply(x)
    return unit


class _ToUnitLength(torch.autograd.Function):
    """Computes the gradient from the unit vectors: autograd would go back through each division."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        unit, largest, length = _divide(x)
        ctx.save_for_backward(x, unit, largest, length)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        x, unit, largest, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # for derivatives of higher order
            return torch.autograd.grad(_divide(x)[0], x, grad, create_graph=True)[0]
        along = (unit * grad).sum(dim=-1, keepdim=True)
        result: Tensor = torch.addcmul(grad, unit, along, value=-1).div_(length).div_(largest)
        return result


def _divide(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns unit vectors, and the length as two factors, whose product may overflow.

    The largest feature of a zero vector is taken for infinite: whatever it divides is zero.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest == 0, torch.inf)
    scaled = x / largest
    # At least 1, but for zero vectors.
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp_min(1)
    return scaled / length, largest, length
