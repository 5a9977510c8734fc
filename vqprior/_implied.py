"""Quantizers whose codes follow from the features alone: there is no codebook to look up."""

import abc

import torch
from torch import Tensor

from vqprior._interfaces import Codebook, Quantizer, QuantizerOutput
from vqprior._tokens import admit, admit_assigned, leave_out


class ImpliedCodes(Quantizer):
    """Prepares the features, reads an index off them, and puts the result together."""

    @abc.abstractmethod
    def _prepared(self, x: Tensor) -> Tensor:
        """What is rounded, in float32 or wider."""

    @abc.abstractmethod
    def _indices(self, prepared: Tensor, counted: Tensor) -> Tensor:
        """The indices ``(...)`` of what was prepared, -1 where it does not count."""

    @abc.abstractmethod
    def _result(
        self, x: Tensor, prepared: Tensor, counted: Tensor, indices: Tensor
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
        x, counted = admit(x, mask, self.dim)
        prepared = self._prepared(x)
        return self._result(x, prepared, counted, self._indices(prepared, counted))

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the index of each vector: ``(..., d) -> (...)``."""
        x, counted = admit(x, mask, self.dim)
        return self._indices(self._prepared(x), counted)

    def assign(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result for indices ``(...)`` chosen elsewhere."""
        x, counted = admit_assigned(x, indices, self.dim, self.codebook_sizes)
        return self._result(x, self._prepared(x), counted, leave_out(indices, counted, 1))
