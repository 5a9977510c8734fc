"""The search on the CPU for codebooks that need no care: around 0 and of usual size."""

import numpy as np
import torch
from torch import Tensor

from vqprior.functional._kernels._search_blocks import search_around_zero
from vqprior.functional._location import step_of
from vqprior.functional._unit import to_unit_length

# Squares of codes between these bounds neither over- nor underflow, nor do products with tokens.
_SMALLEST, _LARGEST = 2.0**-80, 2.0**80


def search_usual(x: Tensor, codes: Tensor, metric: str) -> Tensor | None:
    """Finds the nearest codes, or returns None if precision asks for a shift or a scale.

    ``(n, d), (k, d) -> (n,)`` on the CPU, both in float32 or both in float64. A shift by 0 and a
    scale by 1 would pass over all vectors for nothing. Values are on the host already, so reading
    them costs no wait.
    """
    if metric == "euclidean" and _is_off_center(codes):
        return None
    keys = to_unit_length(codes) if metric == "cosine" else codes
    squares = keys.square().sum(dim=1)
    lengths = squares.numpy()
    median = np.median(lengths[:: step_of(len(lengths))])
    # NaN is not below the bound either.
    if not (lengths.max() < _LARGEST and median > _SMALLEST):
        return None
    bias = squares if metric == "euclidean" else torch.zeros_like(squares)
    return search_around_zero(x, keys, bias)


def _is_off_center(codes: Tensor) -> bool:
    """Whether the center of ``_location`` is not 0."""
    ordered = np.sort(codes[:: step_of(len(codes))].numpy(), axis=0)
    size = len(ordered)
    spread = ordered[3 * size // 4] - ordered[size // 4]
    return bool((np.abs(ordered[size // 2]) > spread).any())
