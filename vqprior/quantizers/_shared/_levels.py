"""Levels of features: how they are bounded, rounded, and what gradient passes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vqprior._transforms import with_batch_of
from vqprior.functional._kernels import _triton
from vqprior.functional._kernels._operators import apply, is_traced, with_signature


class Bounds(NamedTuple):
    """What bounds each feature, in rows ``(d,)``.

    With ``t = tanh(x + shift)``, the digit is ``half * t + start``, rounded up, at most ``last``,
    and the gradient of the code is that of ``slope * t``. ``middle`` maps digits to codes.
    """

    shift: Tensor
    half: Tensor
    start: Tensor
    last: Tensor
    middle: Tensor
    slope: Tensor
    zero: Tensor


def round_digits(inner: Tensor, bounds: Bounds) -> Tensor:
    """Returns the nearest digits, from 0 to ``levels - 1``."""
    # Ties go to the lower level; `round` would choose the even one.
    # With more than 1000 levels, the bound exceeds the outermost by over half a level: clamp.
    nearest = torch.addcmul(bounds.start, inner, bounds.half).ceil()
    return nearest.clamp(bounds.zero, bounds.last)


def pass_scaled(inner: Tensor, codes: Tensor, valid: Tensor, bounds: Bounds) -> Tensor:
    """Returns the codes, zeros for invalid tokens, with the gradient of ``slope * inner``."""
    zero = bounds.zero.to(codes.dtype)
    passed: Tensor = apply(_PassScaled, inner, codes, valid, zero, bounds.slope)
    return passed


def can_fuse(x: Tensor, mask: Tensor | None) -> bool:
    """Whether one kernel may do all of it."""
    return (
        not is_traced(x)
        and _triton.is_usable(x)
        and (mask is None or mask.device == x.device)
        and forward_ad._current_level < 0
    )


def round_fused(
    x: Tensor,
    mask: Tensor | None,
    bounds: Tensor,
    strides: Tensor,
    symmetric: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    """Returns codes ``(..., d)`` with their gradient, and indices ``(...)``, by one kernel."""
    flat = x.reshape(-1, x.shape[-1])
    flat_mask = None if mask is None else mask.reshape(-1)
    codes, indices = _RoundFused.apply(flat, flat_mask, bounds, strides, symmetric)
    return codes.view(x.shape), indices.view(x.shape[:-1])


class _RoundFused(torch.autograd.Function):
    """One kernel forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        mask: Tensor | None,
        bounds: Tensor,
        strides: Tensor,
        symmetric: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor]:
        from vqprior.functional._kernels._triton_levels import round_to_levels  # needs Triton

        codes, indices = round_to_levels(x, mask, bounds, strides, symmetric)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, indices, bounds)
        return codes, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, indices, bounds = ctx.saved_tensors
        found = None
        if grad is not None and torch.is_grad_enabled():  # for derivatives of higher order
            valid, rows = (indices >= 0).unsqueeze(-1), Bounds(*bounds.unbind())
            inner = (torch.where(valid, x, 0.0).to(bounds.dtype) + rows.shift).tanh()
            passed = grad * rows.slope * (1 - inner.square())
            found = torch.where(valid, passed, 0.0).to(x.dtype)
        elif grad is not None:
            from vqprior.functional._kernels._triton_levels import levels_gradient  # needs Triton

            found = levels_gradient(grad, x, indices, bounds)
        return found, None, None, None, None


@with_signature
class _PassScaled(torch.autograd.Function):
    """Returns the codes, zeros for invalid tokens, with the gradient of ``slope * inner``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inner: Tensor, codes: Tensor, valid: Tensor, zero: Tensor, slope: Tensor) -> Tensor:
        return with_batch_of(inner, torch.where(valid.unsqueeze(-1), codes, zero))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(inputs[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return grad * ctx.saved_tensors[-1], None, None, None, None

    @staticmethod
    def tangent(ctx: Any, tangent: Tensor, of_codes: Tensor, *_: object) -> Tensor:  # noqa: ANN401
        *_, zero, slope = ctx.saved_tensors
        scaled: Tensor = tangent * slope
        return scaled.to(zero.dtype)
