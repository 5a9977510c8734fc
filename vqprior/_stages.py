"""Several quantizers as one list, each stored once however often it appears."""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from vqprior._interfaces import Codebook, Quantizer
from vqprior._tokens import columns, stack_columns


class Stages(nn.Module):
    """Holds quantizers in order, and knows which columns of the indices belong to which.

    A quantizer that is passed repeatedly is one submodule: its state is saved once.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        super().__init__()
        if not quantizers:
            raise ValueError("`quantizers` must hold at least one quantizer, got none.")
        unique: list[Quantizer] = []
        self._order: list[int] = []
        for quantizer in quantizers:
            if not isinstance(quantizer, Quantizer):
                raise TypeError(
                    f"`quantizers` must hold quantizers, got {type(quantizer).__name__}. A texture "
                    "quantizer goes outside."
                )
            if not quantizer.tokenwise:
                raise ValueError(
                    "`quantizers` must have indices for each token, got "
                    f"{type(quantizer).__name__}. Put this wrapper inside it."
                )
            known = [number for number, one in enumerate(unique) if one is quantizer]
            if not known:
                unique.append(quantizer)
            self._order.append(known[0] if known else len(unique) - 1)
        self.unique = nn.ModuleList(unique)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> Quantizer:
        return cast("Quantizer", self.unique[self._order[number]])

    def __iter__(self) -> Iterator[Quantizer]:
        return (self[number] for number in range(len(self)))

    @property
    def counts(self) -> list[int]:
        """Number of indices of each."""
        return [stage.num_codebooks for stage in self]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Those of all, in order."""
        return tuple(size for stage in self for size in stage.codebook_sizes)

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Those of all, in order."""
        return tuple(codebook for stage in self for codebook in stage.codebooks)

    def split(self, indices: Tensor) -> list[Tensor]:
        """Splits indices ``(..., q)`` into those of each."""
        return columns(indices, self.counts)

    def join(self, indices: list[Tensor]) -> Tensor:
        """Joins the indices of each to ``(..., q)``."""
        return stack_columns(indices, self.counts)
