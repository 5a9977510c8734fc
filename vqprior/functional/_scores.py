"""Scores of all codes for each vector, as a differentiable matrix, and their gradients."""

import torch
from torch import Tensor
from torch.nn import functional as F


def score_codes(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Scores codes: minus the squared distance, cosine or dot product; higher is better.

    ``(..., d), (k, d) -> (..., k)``, in the dtype of the inputs, also under autocast. Squared
    distances are correct up to a constant per vector.
    """
    with torch.autocast(x.device.type, enabled=False):
        if metric == "cosine":
            return F.normalize(x, dim=-1) @ F.normalize(codes, dim=-1).T
        if metric == "dot":
            # Copied, so that a rule may change the codebook before the backward pass.
            return x @ codes.clone().T
        center = codes.mean(dim=0).detach()  # keeps precision if both share an offset
        x, codes = x - center, codes - center
        return 2 * x @ codes.T - codes.square().sum(dim=1)


def score_gradients(grad: Tensor, x: Tensor, codes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Gradients ``(n, d)`` and ``(k, d)`` of ``score_codes`` for ``grad`` ``(n, k)``.

    Rows of ``grad`` must sum to 0, as they do after a softmax.
    """
    if metric == "dot":
        return grad @ codes, grad.T @ x
    if metric == "euclidean":
        center = codes.mean(dim=0)
        x, codes = x - center, codes - center
        return 2 * grad @ codes, 2 * (grad.T @ x - grad.sum(dim=0).unsqueeze(1) * codes)
    unit_x, unit_codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
    return (
        _normalize_backward(grad @ unit_codes, unit_x, x),
        _normalize_backward(grad.T @ unit_x, unit_codes, codes),
    )


def _normalize_backward(grad: Tensor, unit: Tensor, x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True)
    tangent = grad - unit * (unit * grad).sum(dim=-1, keepdim=True)
    return torch.where(length > 0, tangent / torch.where(length > 0, length, 1.0), 0.0)
