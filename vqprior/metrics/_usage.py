"""How much of a codebook is in use."""

import dataclasses
from typing import final

import torch
from torch import Tensor, nn

from vqprior import _distributed
from vqprior._checks import check_at_least, check_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsageSummary:
    """What ``CodebookUsage`` has seen.

    Attributes:
        perplexity: The number of equally frequent codes of the same entropy, from 1 to ``k``; 0
            before the first token.
        entropy_bits: Entropy of the index distribution, in bits: what an index costs after
            entropy coding with these frequencies.
        usage: Fraction of the codes that were chosen at least once.
        dead_codes: Number of codes that were never chosen.
        num_tokens: Number of indices counted.
    """

    perplexity: float
    entropy_bits: float
    usage: float
    dead_codes: int
    num_tokens: int


@final
class CodebookUsage(nn.Module):
    """Counts how often each code is chosen.

    Counts are int64 buffers. ``update`` reads nothing back to the host; ``compute`` sums over
    ranks without changing the counts, so every rank must call it.

    Args:
        codebook_size: Number of codes ``k``.

    Raises:
        ValueError: If ``codebook_size`` is below 1.

    Shape:
        - ``update(indices)``: any shape

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017 (perplexity of the codebook). <https://arxiv.org/abs/1711.00937>

    Examples:
        >>> import torch
        >>> from vqprior.metrics import CodebookUsage
        >>> meter = CodebookUsage(4)
        >>> meter.update(torch.tensor([[0, 1], [1, 0], [-1, -1]]))
        >>> summary = meter.compute()
        >>> summary.perplexity, summary.usage, summary.dead_codes, summary.num_tokens
        (2.0, 0.5, 2, 4)
    """

    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        check_at_least("codebook_size", codebook_size, 1)
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64))

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Counts ``indices`` of any shape; -1 is left out.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
        """
        check_integer("indices", indices)
        flat = indices.reshape(-1).long()
        counted = (flat >= 0).to(torch.int64)
        self.counts.index_add_(0, flat.clamp_min(0), counted)

    def compute(self) -> UsageSummary:
        """Summarizes what all ranks have counted since the last reset."""
        counts = _distributed.all_reduce_sum_(self.counts.clone()).double()
        total = counts.sum()
        shares = counts / total.clamp_min(1)
        entropy = -torch.special.xlogy(shares, shares).sum()
        dead = int((counts == 0).sum())
        return UsageSummary(
            perplexity=float(entropy.exp()) if total > 0 else 0.0,
            entropy_bits=float(entropy / torch.log(torch.tensor(2.0, dtype=torch.float64))),
            usage=1 - dead / len(counts),
            dead_codes=dead,
            num_tokens=int(total),
        )

    def reset(self) -> None:
        """Forgets everything."""
        self.counts.zero_()
