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
    def _prepared(self, x: Tensor) -> Tensor:
        """What is rounded, in float32 or wider."""

    @abc.abstractmethod
    def _indices(self, prepared: Tensor, valid: Tensor) -> Tensor:
        """The indices ``(...)`` of what was prepared, -1 where it does not count."""

    @abc.abstractmethod
    def _result(
        self, x: Tensor, prepared: Tensor, valid: Tensor, indices: Tensor
    ) -> QuantizerOutput:
        """The result for these indices."""

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """None: codes are implied, nothing learns."""
        return ()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: On a wrong shape.
        """
        x, valid = validate_input(x, mask, self.dim)
        prepared = self._prepared(x)
        return self._result(x, prepared, valid, self._indices(prepared, valid))

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the index of each vector: ``(..., d) -> (...)``."""
        x, valid = validate_input(x, mask, self.dim)
        return self._indices(self._prepared(x), valid)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result for indices ``(...)`` chosen elsewhere."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        return self._result(x, self._prepared(x), valid, mask_indices(indices, valid, 1))
