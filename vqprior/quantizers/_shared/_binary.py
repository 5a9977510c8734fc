"""What lookup-free and binary spherical quantization share: one bit for each feature."""

import abc

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_index_range, check_positive
from vqprior._interfaces import QuantizerOutput
from vqprior.functional import (
    bit_entropy_loss,
    join_indices,
    masked_mean_square,
    split_indices,
    straight_through,
)
from vqprior.quantizers._shared._codebook_free import CodebookFree
from vqprior.quantizers._shared._inputs import check_indices
from vqprior.quantizers._shared._outputs import make_output

_MAX_BITS = 62  # so that every index is an int64


class BinaryQuantizer(CodebookFree):
    """Keeps the sign of each feature; subclasses say of what, and how long a code is."""

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
                f"`num_bits` must be at most {_MAX_BITS}, got {num_bits}. For more, put several in "
                "`GroupedQuantizer`."
            )
        check_at_least("commitment_weight", commitment_weight, 0.0)
        check_at_least("sample_entropy_weight", sample_entropy_weight, 0.0)
        check_at_least("batch_entropy_weight", batch_entropy_weight, 0.0)
        check_positive("temperature", temperature)
        check_at_least("group_size", group_size, 1)
        if group_size > 20:
            raise ValueError(
                f"`group_size` must be at most 20, got {group_size}. A group of `g` bits has "
                "`2**g` codes."
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
        """Absolute value of each feature of a code."""

    @property
    def dim(self) -> int:
        """One feature for each bit."""
        return self.num_bits

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """One index, for all patterns of bits."""
        return (2**self.num_bits,)

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return (
            f"{self.num_bits}, commitment_weight={self.commitment_weight}, "
            f"sample_entropy_weight={self.sample_entropy_weight}, "
            f"batch_entropy_weight={self.batch_entropy_weight}, "
            f"temperature={self.temperature}, group_size={self.group_size}"
        )

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes named by ``indices``: ``(...) -> (..., bits)``; -1 gives zeros.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If an index on the CPU names no code.
        """
        check_indices(indices, 1)
        check_index_range("indices", indices, self.codebook_size)
        bits = split_indices(indices.long(), (2,) * self.num_bits)
        signs = torch.where(bits < 0, 0, 2 * bits - 1)
        return signs.to(torch.float32) * self.scale

    def _indices(self, prepared: Tensor, valid: Tensor) -> Tensor:
        bits = (prepared > 0).long()
        return torch.where(valid, join_indices(bits, (2,) * self.num_bits), -1)

    def _result(
        self, x: Tensor, prepared: Tensor, valid: Tensor, indices: Tensor
    ) -> QuantizerOutput:
        codes = self.decode(indices)
        quantized = straight_through(prepared.to(x.dtype), codes.to(x.dtype))
        terms = {}
        if self.commitment_weight > 0:
            distance = masked_mean_square(prepared - codes, valid)
            terms["commitment"] = self.commitment_weight * distance
        if self.sample_entropy_weight > 0 or self.batch_entropy_weight > 0:
            terms["entropy"] = bit_entropy_loss(
                # The log-odds of a bit if a code's logit is minus its squared distance.
                4 * self.scale / self.temperature * prepared,
                mask=valid,
                sample_weight=self.sample_entropy_weight,
                batch_weight=self.batch_entropy_weight,
                group_size=self.group_size,
                across_ranks=self.training,
            )
        return make_output(torch.where(valid.unsqueeze(-1), quantized, 0.0), indices, terms)
