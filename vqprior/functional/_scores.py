"""Scores of all codes for each vector, as a differentiable matrix, and their gradients."""

import torch
from torch import Tensor

from vqprior.functional._location import find_center, sizes_of
from vqprior.functional._unit import to_unit_length


def score_codes(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Scores codes: minus the squared distance, cosine or dot product; higher is better.

    ``(..., d), (k, d) -> (..., k)``, in the dtype of the inputs, also under autocast. Squared
    distances are correct up to a constant per vector. Codes that are not finite get minus infinity.
    """
    finite = sizes_of(codes) < torch.inf
    codes = torch.where(finite.unsqueeze(1), codes, 0.0)
    with torch.autocast(x.device.type, enabled=False):
        if metric == "cosine":
            scores = to_unit_length(x) @ to_unit_length(codes).T
        elif metric == "dot":
            scores = x @ codes.T
        else:
            center = find_center(codes)  # keeps precision if both share an offset
            x, codes = x - center, codes - center
            scores = 2 * x @ codes.T
        bias = codes.square().sum(dim=1) if metric == "euclidean" else codes.new_zeros(len(codes))
        return scores - torch.where(finite, bias, torch.inf)


def score_gradients(grad: Tensor, x: Tensor, codes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Gradients ``(n, d)`` and ``(k, d)`` of ``score_codes`` for ``grad`` ``(n, k)``.

    Rows of ``grad`` must sum to 0, as they do after a softmax; codes must be finite.
    """
    if metric == "dot":
        return grad @ codes, grad.T @ x
    if metric == "euclidean":
        center = find_center(codes)
        x, codes = x - center, codes - center
        return 2 * grad @ codes, 2 * (grad.T @ x - grad.sum(dim=0).unsqueeze(1) * codes)
    unit_x, unit_codes = to_unit_length(x), to_unit_length(codes)
    return (
        _normalize_backward(grad @ unit_codes, unit_x, x),
        _normalize_backward(grad.T @ unit_x, unit_codes, codes),
    )


def _normalize_backward(grad: Tensor, unit: Tensor, x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True)
    tangent = grad - unit * (unit * grad).sum(dim=-1, keepdim=True)
    return torch.where(length > 0, tangent / torch.where(length > 0, length, 1.0), 0.0)
