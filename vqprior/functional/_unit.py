"""L2 normalization of vectors of any finite length."""

import torch
from torch import Tensor


def to_unit_length(x: Tensor) -> Tensor:
    """Divides each vector ``(..., d)`` by its length; zero stays zero, with a gradient of zero.

    Divides by the largest feature first, because squares could overflow or underflow.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    nonzero = largest > 0
    x = torch.where(nonzero, x / torch.where(nonzero, largest, 1.0), 0.0)
    length: Tensor = torch.where(nonzero, x, 1.0).norm(dim=-1, keepdim=True)
    return x / length
