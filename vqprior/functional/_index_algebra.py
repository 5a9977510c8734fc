"""Conversion between indices and mixed-radix digits."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_integer
from vqprior.functional._kernels._operators import is_traced

_MAX_PRODUCT = 1 << 62  # leaves room for one more symbol in int64


def join_indices(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """Combines several digits into one index, in mixed radix with the first digit fastest.

    ``index = digits[0] + levels[0] * (digits[1] + levels[1] * (digits[2] + ...))``, in exact
    int64 arithmetic. A token with a negative digit gets the index -1. Digits at or above their
    level are not checked: that would synchronize the device.

    Args:
        digits: The digits of each token; -1 for masked tokens.
        levels: Number of values of each digit, at least 1; their product is at most ``2**62``.

    Returns:
        Indices in ``[-1, product of levels)``, as ``int64``.

    Raises:
        TypeError: If ``digits`` is not an integer tensor.
        ValueError: If ``levels`` is empty, contains a level below 1 or has too large a product,
            or the last dimension of ``digits`` is not ``len(levels)``.

    Shape:
        - ``digits``: ``(..., len(levels))``
        - returns: ``(...)``

    Examples:
        >>> import torch
        >>> from vqprior.functional import join_indices
        >>> join_indices(torch.tensor([[2, 0], [0, 1], [2, 4], [-1, 3]]), levels=(3, 5))
        tensor([ 2,  3, 14, -1])
    """
    check_integer("digits", digits)
    _check_levels(levels)
    if digits.ndim == 0 or digits.shape[-1] != len(levels):
        raise ValueError(
            f"`digits` must have shape (..., {len(levels)}), one entry for each level, "
            f"got {tuple(digits.shape)}."
        )
    strides, _ = _places(digits, tuple(levels))
    joined = (digits.long() * strides).sum(dim=-1)
    return torch.where((digits >= 0).all(dim=-1), joined, -1)


def split_indices(indices: Tensor, levels: Sequence[int]) -> Tensor:
    """Splits each index into mixed-radix digits: the inverse of ``join_indices``.

    A negative index gives -1 in every digit. Indices at or above the product of the levels are
    not checked: that would synchronize the device.

    Args:
        indices: Indices in ``[-1, product of levels)``.
        levels: Number of values of each digit, at least 1; their product is at most ``2**62``.

    Returns:
        The digits of each index, the fastest first, as ``int64``.

    Raises:
        TypeError: If ``indices`` is not an integer tensor.
        ValueError: If ``levels`` is empty, contains a level below 1 or has too large a product.

    Shape:
        - ``indices``: ``(...)``
        - returns: ``(..., len(levels))``

    Examples:
        >>> import torch
        >>> from vqprior.functional import split_indices
        >>> split_indices(torch.tensor([2, 3, 14, -1]), levels=(3, 5))
        tensor([[ 2,  0],
                [ 0,  1],
                [ 2,  4],
                [-1, -1]])

        An 18-bit index as two 9-bit digits, for a predictor with two small heads:

        >>> split_indices(torch.tensor(200_000), levels=(512, 512))
        tensor([320, 390])
    """
    check_integer("indices", indices)
    _check_levels(levels)
    strides, sizes = _places(indices, tuple(levels))
    index = indices.long().unsqueeze(-1)
    return torch.where(index >= 0, index.div(strides, rounding_mode="floor") % sizes, -1)


def _check_levels(levels: Sequence[int]) -> None:
    if len(levels) == 0:
        raise ValueError("`levels` must hold at least one level, got none.")
    check_at_least("levels", min(levels), 1)
    if math.prod(levels) > _MAX_PRODUCT:
        raise ValueError(
            f"`levels` must have a product of at most 2**62, got {math.prod(levels)}. Join fewer "
            "digits, or keep them separate."
        )


def _places(like: Tensor, levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns what a 1 in each digit adds to an index, and the levels, where ``like`` is."""
    make = _make_places if is_traced(like) else _remembered_places
    return make(levels, like.device)


def _make_places(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    strides = [math.prod(levels[:place]) for place in range(len(levels))]
    both = torch.tensor([strides, levels], dtype=torch.int64, device=device)
    return both[0], both[1]


@functools.lru_cache(maxsize=256)
def _remembered_places(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # A copy to a GPU in every call would make the host wait. Tensors made in inference mode could
    # not be used in training later.
    with torch.inference_mode(mode=False):
        return _make_places(levels, device)
