"""Scores of all codes for each vector, as a differentiable matrix, and their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from vqprior._precision import without_autocast
from vqprior.functional._location import find_center, sizes_of
from vqprior.functional._unit import to_unit_length


class Keys(NamedTuple):
    """What scores need of a codebook, computed once for all blocks of vectors.

    Attributes:
        metric: What is scored.
        codes: The codes ``(k, d)``, zeros for those that are not finite.
        center: What is subtracted from vectors and codes, ``(d,)``; None if nothing is.
        keys: What placed vectors are multiplied with, ``(k, d)``.
        bias: Subtracted from the products, ``(k,)``; infinite for codes that are not finite.
    """

    metric: str
    codes: Tensor
    center: Tensor | None
    keys: Tensor
    bias: Tensor

    def place(self, x: Tensor) -> Tensor:
        """Returns the vectors that are multiplied with the keys."""
        if self.metric == "cosine":
            return to_unit_length(x)
        return x if self.center is None else x - self.center

    def score(self, placed: Tensor) -> Tensor:
        """Scores all codes for placed vectors, ``(..., d) -> (..., k)``."""
        with without_autocast(placed.device.type):
            placed = 2 * placed if self.metric == "euclidean" else placed
            return placed @ self.keys.T - self.bias

    def gradients(self, grad: Tensor, x: Tensor, placed: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``(n, d)`` of ``x`` and ``(k, d)`` of codes for ``grad`` ``(n, k)`` of scores.

        Rows of ``grad`` must sum to 0, as they do after a softmax.
        """
        of_placed, of_keys = grad @ self.keys, grad.T @ placed
        if self.metric == "dot":
            return of_placed, of_keys
        if self.metric == "euclidean":
            # Doubled here and not in `grad`, which is larger.
            return 2 * of_placed, 2 * (of_keys - grad.sum(dim=0).unsqueeze(1) * self.keys)
        return (
            _normalize_backward(of_placed, placed, x),
            _normalize_backward(of_keys, self.keys, self.codes),
        )


def prepare_keys(codes: Tensor, metric: str) -> Keys:
    """Prepares codes ``(k, d)`` for scores."""
    finite = sizes_of(codes) < torch.inf
    codes = torch.where(finite.unsqueeze(1), codes, 0.0)
    center, keys = None, codes
    with without_autocast(codes.device.type):
        if metric == "cosine":
            keys = to_unit_length(codes)
        elif metric == "euclidean":
            center = find_center(codes)  # keeps precision if both share an offset
            keys = codes - center
        bias = keys.square().sum(dim=1) if metric == "euclidean" else codes.new_zeros(len(codes))
    return Keys(metric, codes, center, keys, torch.where(finite, bias, torch.inf))


def score_codes(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Scores codes: minus the squared distance, cosine or dot product; higher is better.

    ``(..., d), (k, d) -> (..., k)``, in the dtype of the inputs, also under autocast. Squared
    distances are correct up to a constant per vector. Codes that are not finite get minus infinity.
    """
    keys = prepare_keys(codes, metric)
    with without_autocast(x.device.type):
        return keys.score(keys.place(x))


def _normalize_backward(grad: Tensor, unit: Tensor, x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True)
    tangent = grad - unit * (unit * grad).sum(dim=-1, keepdim=True)
    return torch.where(length > 0, tangent / torch.where(length > 0, length, 1.0), 0.0)
