"""Quantizers whose codes follow from the features alone: there is no codebook to look up."""

import abc

import torch
from torch import Tensor

from vqprior._interfaces import Codebook, Quantizer, QuantizerOutput
from vqprior.quantizers._shared._columns import mask_indices
from vqprior.quantizers._shared._inputs import validate_assignment, validate_input


class CodebookFree(Quantizer):
    """Prepares the features, reads an index off them, and puts the result together."""

    @abc.abstractmethod
    def _prepare(self, x: Tensor) -> Tensor:
        """Returns what is rounded, in float32 or wider."""

    @abc.abstractmethod
    def _index(self, prepared: Tensor) -> Tensor:
        """Returns the indices ``(...)`` of what was prepared."""

    @abc.abstractmethod
    def _output(
        self, prepared: Tensor, indices: Tensor, valid: Tensor, dtype: torch.dtype
    ) -> QuantizerOutput:
        """Returns the result for these indices, -1 where a token is not valid, in ``dtype``."""

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """None: nothing learns."""
        return ()

    @property
    def _learns_from_result(self) -> bool:
        """False: there is no parameter."""
        return False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: On a wrong shape.
        """
        x, valid = validate_input(x, mask, self.dim)
        prepared = self._prepare(x)
        indices = torch.where(valid, self._index(prepared), -1)
        return self._output(prepared, indices, valid, x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the index of each vector: ``(..., d) -> (...)``."""
        x, valid = validate_input(x, mask, self.dim)
        return torch.where(valid, self._index(self._prepare(x)), -1)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result for indices ``(...)`` chosen elsewhere."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        return self._output(self._prepare(x), mask_indices(indices, valid, 1), valid, x.dtype)
