"""The codes of chosen indices, and the losses between them and their inputs, in one node."""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqprior.functional._kernels._operators import with_signature


class LookedUp(NamedTuple):
    """What a token saw and got.

    Attributes:
        inputs: The vectors, with zeros for invalid tokens.
        codes: The codes, with zeros for invalid tokens.
        indices: The indices, -1 for invalid tokens.
        commitment: Weighted mean squared error, with a gradient to the inputs.
        codebook: The same for the codes, by its own weight.
    """

    inputs: Tensor
    codes: Tensor
    indices: Tensor
    commitment: Tensor
    codebook: Tensor


def zero_on(device: torch.device) -> Tensor:
    """Returns a zero without dimensions, which costs no launch as a number in ``where`` does."""
    return _number_on(device, 0.0)


@functools.cache
def _number_on(device: torch.device, value: float) -> Tensor:
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(mode=False):
        return torch.tensor(value, device=device)


def look_up(
    x: Tensor, valid: Tensor, codes: Tensor, chosen: Tensor, weights: tuple[float, float]
) -> LookedUp:
    """Looks up ``chosen`` ``(n,)`` among ``codes`` ``(k, d)`` for ``x`` ``(n, d)``.

    ``valid`` ``(n,)`` is True for tokens that count, and ``weights`` are those of the losses that
    pull inputs toward codes and codes toward inputs. Only for the CPU, where tensors have values.
    """
    return LookedUp(*_LookUp.apply(x, codes, valid, chosen, *weights))


@with_signature
class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, codes: Tensor, valid: Tensor, chosen: Tensor, on_inputs: float, on_codes: float
    ) -> tuple[Tensor, ...]:
        kept, zero = valid.unsqueeze(1), zero_on(x.device)
        inputs = torch.where(kept, x, zero)
        found = torch.where(kept, codes.index_select(0, chosen), zero)
        indices = torch.where(valid, chosen, _number_on(x.device, -1))
        error = _difference(inputs, found).square_().sum()
        count = _count(valid, x)
        return inputs, found, indices, error * (on_inputs / count), error * (on_codes / count)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
        x, codes, valid, _, *weights = inputs
        ctx.save_for_backward(output[0], output[1], output[2], valid)
        ctx.slopes = [2 * weight / _count(valid, x) for weight in weights]
        ctx.num_codes = len(codes)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        of_inputs: Tensor | None,
        of_codes: Tensor | None,
        _: None,
        commitment: Tensor | None,
        codebook: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        inputs, codes, indices, valid = ctx.saved_tensors
        difference = None
        if commitment is not None or codebook is not None:
            difference = _difference(inputs, codes)
        grad_x = grad_codes = None
        if ctx.needs_input_grad[0]:
            grad_x = _add(of_inputs, difference, commitment, ctx.slopes[0], inputs.dtype)
            if of_inputs is not None and grad_x is not None:
                grad_x = torch.where(valid.unsqueeze(1), grad_x, zero_on(inputs.device))
        if ctx.needs_input_grad[1]:
            rows = _add(of_codes, difference, codebook, -ctx.slopes[1], codes.dtype)
            if rows is not None:
                # Rows of invalid tokens are added to an extra row.
                grad_codes = rows.new_zeros(ctx.num_codes + 1, rows.shape[1])
                grad_codes = grad_codes.index_add(0, indices % (ctx.num_codes + 1), rows)[:-1]
        return grad_x, grad_codes, None, None, None, None


def _add(
    grad: Tensor | None, difference: Tensor | None, loss: Tensor | None, slope: float, dtype: torch.dtype
) -> Tensor | None:
    """Adds the gradient of a loss to one that came from elsewhere."""
    if difference is None or loss is None:
        return grad
    pull = (difference * (loss * slope)).to(dtype)
    return pull if grad is None else grad + pull


def _difference(inputs: Tensor, codes: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(inputs.dtype, codes.dtype), torch.float32)
    return inputs.to(dtype) - codes.to(dtype)


def _count(valid: Tensor, x: Tensor) -> int:
    """Returns the number of numbers that count, at least 1."""
    return max(1, int(np.count_nonzero(valid.numpy())) * x.shape[1])
