"""Helpers for the indices ``(..., q)`` of several codebooks."""

import torch
from torch import Tensor, nn


def has_any_index(indices: Tensor, num_codebooks: int) -> Tensor:
    """Returns which tokens have at least one index that is not -1: ``(...)``."""
    named = indices >= 0
    return named if num_codebooks == 1 else named.any(dim=-1)


def mask_indices(indices: Tensor, valid: Tensor, num_codebooks: int) -> Tensor:
    """Returns ``indices`` as ``int64``, with -1 for tokens that are not valid."""
    kept = valid if num_codebooks == 1 else valid.unsqueeze(-1)
    return torch.where(kept, indices.long(), -1)


def columns(indices: Tensor, num_codebooks: list[int]) -> list[Tensor]:
    """Splits ``(..., q)`` into the indices of several quantizers."""
    if sum(num_codebooks) == 1:
        return [indices]
    return [
        part.squeeze(-1) if count == 1 else part
        for part, count in zip(indices.split(num_codebooks, dim=-1), num_codebooks, strict=True)
    ]


def stack_columns(parts: list[Tensor], num_codebooks: list[int]) -> Tensor:
    """Joins the indices of several quantizers; the inverse of ``columns``."""
    if sum(num_codebooks) == 1:
        return parts[0]
    wide = [
        part.unsqueeze(-1) if count == 1 else part
        for part, count in zip(parts, num_codebooks, strict=True)
    ]
    return torch.cat(wide, dim=-1)


def stack_logits(parts: list[Tensor], num_codebooks: list[int]) -> Tensor:
    """Stacks ``(..., [q,] k)`` to ``(..., q, k)``; smaller codebooks are padded with ``-inf``."""
    size = max(part.shape[-1] for part in parts)
    wide = [
        part.unsqueeze(-2) if count == 1 else part
        for part, count in zip(parts, num_codebooks, strict=True)
    ]
    padded = [
        nn.functional.pad(part, (0, size - part.shape[-1]), value=-torch.inf) for part in wide
    ]
    stacked = torch.cat(padded, dim=-2)
    return stacked.squeeze(-2) if sum(num_codebooks) == 1 else stacked
