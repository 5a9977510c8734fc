"""Base of the quantizers that keep one bit per feature, its sign."""

import abc

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_positive
from vqprior._interfaces import Codebook, Quantizer
from vqprior._results import QuantizerOutput
from vqprior.functional import (
    bit_entropy_loss,
    join_indices,
    masked_mean_square,
    split_indices,
    straight_through,
)
from vqprior.quantizers._shared._columns import mask_indices
from vqprior.quantizers._shared._inputs import (
    validate_assignment,
    validate_indices,
    validate_input,
    warn_of_channels_first,
)
from vqprior.quantizers._shared._outputs import make_output

_MAX_BITS = 62  # so that every index is an int64
_MAX_GROUP = 20


class BinaryQuantizer(Quantizer):
    """Keeps the sign of each feature; subclasses define the input scaling and that of the codes.

    Codes are never listed. Bit ``i`` of an index is the sign of feature ``i``.
    """

    def __init__(
        self,
        num_bits: int,
        *,
        commitment_weight: float,
        sample_entropy_weight: float,
        batch_entropy_weight: float,
        temperature: float,
        group_size: int,
    ) -> None:
        super().__init__()
        check_at_least("num_bits", num_bits, 1)
        if num_bits > _MAX_BITS:
            raise ValueError(
                f"`num_bits` must be at most {_MAX_BITS}, got {num_bits}. For more bits, combine "
                "several in a `GroupedQuantizer`."
            )
        check_at_least("commitment_weight", commitment_weight, 0.0)
        check_at_least("sample_entropy_weight", sample_entropy_weight, 0.0)
        check_at_least("batch_entropy_weight", batch_entropy_weight, 0.0)
        check_positive("temperature", temperature)
        check_at_least("group_size", group_size, 1)
        if group_size > _MAX_GROUP:
            raise ValueError(
                f"`group_size` must be at most {_MAX_GROUP}, got {group_size}. Use smaller "
                "groups: a group of `g` bits has `2**g` codes."
            )
        self.num_bits = num_bits
        self.commitment_weight = commitment_weight
        self.sample_entropy_weight = sample_entropy_weight
        self.batch_entropy_weight = batch_entropy_weight
        self.temperature = temperature
        self.group_size = group_size

    @property
    @abc.abstractmethod
    def scale(self) -> float:
        """Absolute value of every feature of a code."""

    @abc.abstractmethod
    def _prepare(self, x: Tensor) -> Tensor:
        """Returns the vectors whose signs are kept, in float32 or wider."""

    @property
    def dim(self) -> int:
        """Number of features, one per bit."""
        return self.num_bits

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """One codebook with all bit patterns."""
        return (2**self.num_bits,)

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Empty: nothing is learned."""
        return ()

    @property
    def _learns_from_result(self) -> bool:
        """False: there are no parameters."""
        return False

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return (
            f"{self.num_bits}, commitment_weight={self.commitment_weight}, "
            f"sample_entropy_weight={self.sample_entropy_weight}, "
            f"batch_entropy_weight={self.batch_entropy_weight}, "
            f"temperature={self.temperature}, group_size={self.group_size}"
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If ``x`` or ``mask`` has the wrong shape.
        """
        x, valid = validate_input(x, mask, self.dim)
        warn_of_channels_first(self, x)
        prepared = self._prepare(x)
        indices = torch.where(valid, self._index(prepared), -1)
        return self._output(prepared, indices, valid, x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the index of each vector: ``(..., d) -> (...)``."""
        x, valid = validate_input(x, mask, self.dim)
        return torch.where(valid, self._index(self._prepare(x)), -1)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes named by ``indices``: ``(...) -> (..., d)``; -1 decodes to zeros.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If an index on the CPU names no code.
        """
        validate_indices(indices, self.codebook_sizes)
        bits = split_indices(indices.long(), (2,) * self.num_bits)
        dtype = self.dtype
        signs = torch.where(bits < 0, 0, 2 * bits - 1)
        return (signs.to(torch.promote_types(dtype, torch.float32)) * self.scale).to(dtype)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` ``(...)`` had been chosen."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        return self._output(self._prepare(x), mask_indices(indices, valid, 1), valid, x.dtype)

    def _index(self, prepared: Tensor) -> Tensor:
        bits = (prepared > 0).long()
        return join_indices(bits, (2,) * self.num_bits)

    def _output(
        self, prepared: Tensor, indices: Tensor, valid: Tensor, dtype: torch.dtype
    ) -> QuantizerOutput:
        codes = self.decode(indices)
        terms = {}
        if self.commitment_weight > 0:
            distance = masked_mean_square(prepared - codes, valid)
            terms["commitment"] = self.commitment_weight * distance
        if self.sample_entropy_weight > 0 or self.batch_entropy_weight > 0:
            terms["entropy"] = bit_entropy_loss(
                # The log-odds of a bit if the logit of a code is its negative squared distance.
                4 * self.scale / self.temperature * prepared,
                mask=valid,
                sample_weight=self.sample_entropy_weight,
                batch_weight=self.batch_entropy_weight,
                group_size=self.group_size,
                across_ranks=self.training,
            )
        quantized = straight_through(prepared.to(dtype), codes.to(dtype))
        return make_output(torch.where(valid.unsqueeze(-1), quantized, 0.0), indices, terms)
