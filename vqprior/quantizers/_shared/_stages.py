"""A list of quantizers that stores each one once."""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from vqprior._interfaces import Codebook, Quantizer
from vqprior.quantizers._shared._columns import columns, stack_columns
from vqprior.quantizers._shared._inputs import check_index_per_token, know_layout


class Stages(nn.Module):
    """Holds quantizers in order, and splits and joins their indices.

    A quantizer that is passed several times is one submodule, so its state is saved once.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        super().__init__()
        if not isinstance(quantizers, Sequence | nn.ModuleList):
            raise TypeError(
                f"`quantizers` must be a sequence, got {type(quantizers).__name__}. Put it in a "
                "list."
            )
        if not quantizers:
            raise ValueError("`quantizers` must hold at least one quantizer, got none.")
        unique: list[Quantizer] = []
        self._order: list[int] = []
        for number, quantizer in enumerate(quantizers):
            check_index_per_token(f"quantizers[{number}]", quantizer)
            known = [place for place, one in enumerate(unique) if one is quantizer]
            if not known:
                unique.append(quantizer)
            self._order.append(known[0] if known else len(unique) - 1)
        self.unique = nn.ModuleList(unique)
        know_layout(unique)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> Quantizer:
        return cast("Quantizer", self.unique[self._order[number]])

    def __iter__(self) -> Iterator[Quantizer]:
        return (self[number] for number in range(len(self)))

    @property
    def counts(self) -> list[int]:
        """Number of indices per token of each quantizer."""
        return [stage.num_codebooks for stage in self]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codebook sizes of all quantizers, in order."""
        return tuple(size for stage in self for size in stage.codebook_sizes)

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Codebooks of all quantizers, in order."""
        return tuple(codebook for stage in self for codebook in stage.codebooks)

    @property
    def _learns_from_result(self) -> bool:
        """Whether any quantizer learns from the result."""
        return any(stage._learns_from_result for stage in self)

    def split(self, indices: Tensor) -> list[Tensor]:
        """Splits indices ``(..., q)`` into those of each quantizer."""
        return columns(indices, self.counts)

    def join(self, indices: list[Tensor]) -> Tensor:
        """Joins the indices of each quantizer into ``(..., q)``."""
        return stack_columns(indices, self.counts)
