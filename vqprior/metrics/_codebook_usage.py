"""Codebook usage: perplexity, entropy and unused codes."""

import dataclasses
import math
from typing import final

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_index_range, check_integer
from vqprior._distributed import all_reduce_sum_
from vqprior._precision import to_float64
from vqprior.metrics._accumulator import Accumulator

_MAX_SIZE = 2**24  # 128 MiB of counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsageSummary:
    """Usage of a codebook of ``k`` codes.

    Attributes:
        perplexity: ``2 ** entropy_bits``: the number of equally frequent codes that would carry
            as much information, between 1 and ``k``; 0 without any token.
        usage: Fraction of the codes that were chosen at least once, in ``[0, 1]``.
        entropy_bits: Entropy of the code frequencies, between 0 and ``log2(k)``: the bits that an
            ideal entropy coder spends on one index; 0 without tokens.
        dead_codes: Number of codes that were never chosen.
        num_tokens: Number of indices counted.
        skipped_tokens: Number of indices that were -1: masked, not finite or dropped.

    Examples:
        >>> import torch
        >>> from vqprior.metrics import CodebookUsage
        >>> meter = CodebookUsage(4)
        >>> meter.update(torch.tensor([0, 1, -1]))
        >>> meter.compute()
        UsageSummary(perplexity=2.0, usage=0.5, entropy_bits=1.0, dead_codes=2, num_tokens=2,
                     skipped_tokens=1)
    """

    perplexity: float
    usage: float
    entropy_bits: float
    dead_codes: int
    num_tokens: int
    skipped_tokens: int


@final
class CodebookUsage(Accumulator):
    """Counts how often each code is chosen.

    Counts are exact (int64), also after a cast of the module. ``update`` does not synchronize the
    device; ``compute`` adds up the counts of all ranks. Indices of several codebooks are counted
    together: for one of them, update with ``indices[..., i]``.

    Args:
        codebook_size: Number of codes ``k``, at least 1.

    Raises:
        ValueError: If ``codebook_size`` is below 1 or above ``2**24``: a count for each code would
            take too much memory.

    Shape:
        - ``indices``: any

    Examples:
        >>> import torch
        >>> from vqprior.metrics import CodebookUsage
        >>> meter = CodebookUsage(8)
        >>> meter.update(torch.tensor([[0, 1], [0, -1]]))
        >>> meter.update(torch.tensor([1]))
        >>> summary = meter.compute()
        >>> summary.perplexity, summary.usage, summary.num_tokens, summary.skipped_tokens
        (2.0, 0.25, 4, 1)
    """

    counts: Tensor
    skipped: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        check_at_least("codebook_size", codebook_size, 1)
        if codebook_size > _MAX_SIZE:
            raise ValueError(
                f"`codebook_size` must be at most 2**24, got {codebook_size}. Count parts of the "
                "indices: one meter for each digit of `functional.split_indices`."
            )
        self.codebook_size = codebook_size
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """Shows the size in ``repr``."""
        return f"{self.codebook_size}"

    def update(self, indices: Tensor) -> None:
        """Counts the indices; those that are -1, masked or dropped, are counted as skipped.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If another index on the CPU names no code; a GPU reports it late, as an
                error of its own.
        """
        check_integer("indices", indices)
        check_index_range("indices", indices, self.codebook_size)
        flat = indices.reshape(-1).long()
        skipped = flat == -1
        # A -1 adds nothing to code 0; anything lower stays out of range.
        self.counts.scatter_add_(0, flat + skipped, (~skipped).long())
        self.skipped += skipped.sum()

    def compute(self) -> UsageSummary:
        """Returns the usage by all ranks since ``reset``.

        Every rank must call, and gets the same summary; what each rank counted stays as it is.
        """
        joint = all_reduce_sum_(torch.cat([self.counts, self.skipped.reshape(1)]))
        counts = to_float64(joint[:-1])
        num_tokens = counts.sum()
        frequency = counts / num_tokens.clamp_min(1)
        entropy_bits = -torch.special.xlogy(frequency, frequency).sum() / math.log(2)
        used = int((counts > 0).sum())
        return UsageSummary(
            perplexity=float(entropy_bits.exp2()) if used else 0.0,
            usage=used / self.codebook_size,
            entropy_bits=float(entropy_bits.abs()),
            dead_codes=self.codebook_size - used,
            num_tokens=int(num_tokens),
            skipped_tokens=int(joint[-1]),
        )

    def advice(self) -> str | None:
        """Returns a sentence if few codes are in use, otherwise None.

        Few are less than half of those that as many tokens would use if all codes were equally
        likely. Every rank must call, as for ``compute``.
        """
        summary = self.compute()
        size, tokens = self.codebook_size, summary.num_tokens
        expected = size * -math.expm1(tokens * math.log1p(-1 / size)) if size > 1 else 1.0
        used = size - summary.dead_codes
        if tokens == 0 or used >= expected / 2:
            return None
        return (
            f"{used} of {size} codes are in use ({tokens} tokens, perplexity "
            f"{summary.perplexity:.1f}). Wrap the quantizer in `SelfUpdating`, step "
            "`default_rules(quantizer)`, or use fewer codes."
        )
