"""The layout of the indices of several scales in one dimension."""

import dataclasses
import math

import torch
from torch import Tensor

from vqprior._checks import check_integer, check_shape


@dataclasses.dataclass(frozen=True)
class ScaleLayout:
    """Layout of indices ``(..., n)`` or ``(..., n, q)``, in which one scale follows the other."""

    scales: list[tuple[int, ...]]
    num_codebooks: int

    @property
    def counts(self) -> list[int]:
        """Number of positions of each scale."""
        return [math.prod(scale) for scale in self.scales]

    def join(self, parts: list[Tensor], leading: torch.Size) -> Tensor:
        """Joins a tensor ``(b, *scale, ...)`` per scale into ``(*leading, n, ...)``."""
        spatial = len(self.scales[-1])
        flat = torch.cat([part.flatten(1, spatial) for part in parts], dim=1)
        return flat.reshape(*leading, *flat.shape[1:])

    def split(self, indices: Tensor) -> tuple[list[Tensor], torch.Size]:
        """Returns ``(b, *scale)`` or ``(b, *scale, q)`` per scale, and the leading sizes."""
        check_integer("indices", indices)
        last = () if self.num_codebooks == 1 else (self.num_codebooks,)
        tail = (sum(self.counts), *last)
        if tuple(indices.shape[-len(tail) :]) != tail:
            raise ValueError(
                f"`indices` must have shape (..., {', '.join(map(str, tail))}), the positions of "
                f"all scales, got {tuple(indices.shape)}. Use -1 for unknown indices."
            )
        leading = indices.shape[: -len(tail)]
        parts = indices.reshape(-1, *tail).split(self.counts, dim=1)
        shaped = zip(parts, self.scales, strict=True)
        return [part.reshape(part.shape[0], *scale, *last) for part, scale in shaped], leading

    def split_for(self, indices: Tensor, leading: torch.Size) -> list[Tensor]:
        """Splits indices and checks that their leading sizes are ``leading``."""
        parts, own = self.split(indices)
        check_shape("indices", indices, (*leading, *indices.shape[len(own) :]))
        return parts
