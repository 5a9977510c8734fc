"""The codes of chosen indices, and the losses between them and their inputs, in one node.

For eager calls on the CPU, where each operator costs microseconds and reading a value costs none.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class LookedUp(NamedTuple):
    """What tokens saw and got; losses are None if their weight is 0.

    Attributes:
        inputs: The vectors, with zeros for invalid tokens.
        codes: The codes, with zeros for invalid tokens.
        indices: The indices, -1 for invalid tokens.
        commitment: Weighted mean squared error, with a gradient to the inputs.
        codebook: The same with a gradient to the codes.
        unused: Weighted mean squared error between unused codes and tokens that they could have.
    """

    inputs: Tensor
    codes: Tensor
    indices: Tensor
    commitment: Tensor | None
    codebook: Tensor | None
    unused: Tensor | None


def look_up(
    x: Tensor, valid: Tensor, codes: Tensor, chosen: Tensor, weights: dict[str, float]
) -> LookedUp:
    """Looks up ``chosen`` ``(n,)`` among ``codes`` ``(k, d)`` for ``x`` ``(n, d)``.

    ``valid`` ``(n,)`` is True for tokens that count. ``weights`` are those of the losses, by name.
    """
    return LookedUp(
        *_LookUp.apply(
            x, codes, valid, chosen, tuple(weights[name] for name in LookedUp._fields[3:])
        )
    )


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        codes: Tensor,
        valid: Tensor,
        chosen: Tensor,
        weights: tuple[float, float, float],
    ) -> tuple[Tensor | None, ...]:
        inputs, found, indices = x, codes.index_select(0, chosen), chosen
        ctx.blank = not valid.numpy().all()
        if ctx.blank:
            inputs = torch.where(valid.unsqueeze(1), x, 0.0)
            found = torch.where(valid.unsqueeze(1), found, 0.0)
            indices = torch.where(valid, chosen, -1)
        ctx.weights, ctx.count = weights, _count(valid, x)
        commitment = codebook = unused = ctx.pairs = None
        if weights[0] > 0 or weights[1] > 0:
            mean = _difference(inputs, found).square_().sum() / ctx.count
            commitment = weights[0] * mean if weights[0] > 0 else None
            codebook = weights[1] * mean if weights[1] > 0 else None
        if weights[2] > 0:
            squares, ctx.pairs = _pair_up(inputs, codes, valid, chosen)
            unused = squares.sum() / codes.numel() * weights[2]
        ctx.save_for_backward(inputs, found, codes, valid, chosen)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices)
        return inputs, found, indices, commitment, codebook, unused

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        inputs, found, codes, valid, chosen = ctx.saved_tensors
        of_inputs, of_found, _, commitment, codebook, unused = grads
        kept, difference = valid.unsqueeze(1), None
        grad_x = grad_codes = None
        if commitment is not None or codebook is not None:
            difference = _difference(inputs, found)
        if ctx.needs_input_grad[0]:
            slope = 2 * ctx.weights[0] / ctx.count
            grad_x = _total(of_inputs, difference, commitment, slope)
            if grad_x is not None:
                grad_x = torch.where(kept, grad_x, 0.0) if ctx.blank else grad_x
                grad_x = grad_x.to(inputs.dtype)
        if ctx.needs_input_grad[1]:
            rows = _total(of_found, difference, codebook, -2 * ctx.weights[1] / ctx.count)
            pulls = None
            if unused is not None:
                pairs = _difference(
                    codes.index_select(0, ctx.pairs[0]), _rows(inputs, ctx.pairs[1])
                )
                pulls = pairs * (unused * (2 * ctx.weights[2] / codes.numel()))
            grad_codes = _add_rows(codes, (chosen, rows), (ctx.pairs and ctx.pairs[0], pulls))
        return grad_x, grad_codes, None, None, None


def _pair_up(
    inputs: Tensor, codes: Tensor, valid: Tensor, chosen: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gives each unused code a token as ``unused_code_loss`` does: squared distances, and pairs."""
    places = np.flatnonzero(valid.numpy())
    used = np.zeros(len(codes), dtype=bool)
    used[chosen.numpy()[places]] = True
    unused = np.flatnonzero(~used) if len(places) else places
    tokens = places[unused * len(places) // len(codes)]
    while True:
        pairs = torch.from_numpy(unused), torch.from_numpy(tokens)
        difference = _difference(codes.index_select(0, pairs[0]), _rows(inputs, pairs[1]))
        squares = difference.square_().sum(dim=1)
        finite = np.isfinite(squares.numpy())
        if finite.all():
            return squares, pairs
        unused, tokens = unused[finite], tokens[finite]


def _rows(inputs: Tensor, places: Tensor) -> Tensor:
    return inputs.detach().index_select(0, places)


def _total(
    grad: Tensor | None, difference: Tensor | None, loss: Tensor | None, slope: float
) -> Tensor | None:
    """Adds the gradient of a squared error to one that comes from elsewhere."""
    if difference is None or loss is None:
        return grad
    pull = difference * (loss * slope)
    return pull if grad is None else grad + pull


def _add_rows(codes: Tensor, *parts: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """Adds rows to those of a gradient of zeros; None if there are no rows."""
    total: Tensor | None = None
    for places, rows in parts:
        if places is not None and rows is not None:
            if total is None:
                total = rows.new_zeros(codes.shape)
            total = total.index_add_(0, places, rows)
    return None if total is None else total.to(codes.dtype)


def _difference(inputs: Tensor, codes: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(inputs.dtype, codes.dtype), torch.float32)
    return inputs.to(dtype) - codes.to(dtype)


def _count(valid: Tensor, x: Tensor) -> int:
    """Returns how many numbers count, at least 1."""
    return max(1, int(np.count_nonzero(valid.numpy())) * x.shape[1])
