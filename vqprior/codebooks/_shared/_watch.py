"""How much each code of a codebook is used, and which codes are to move."""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from vqprior import _distributed
from vqprior._results import Selection
from vqprior.functional._kernels._host import is_on_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What is counted of one codebook.

    Attributes:
        uses: How often each code was chosen in the window that is open, float32.
        tokens: Number of tokens in that window, float32.
        steps: Number of steps that counted a token, int64.
        windows: Number of windows that were closed, int64.

    Shape:
        - ``uses``: ``(k,)``
        - others: ``()``
    """

    uses: Tensor
    tokens: Tensor
    steps: Tensor
    windows: Tensor

    def count_here_(
        self, selections: list[Selection], vectors: Tensor, threshold: float, patience: float
    ) -> tuple[Tensor, Tensor | None] | None:
        """Does what ``count_`` does by numpy; None if no code moves, as in most steps.

        Call it where ``is_readable`` says so.
        """
        size = len(vectors)
        names = [s.indices.numpy().reshape(-1) + 1 for s in selections]
        counts = sum(np.bincount(one, minlength=size + 1)[1:] for one in names)
        total = int(np.sum(counts))
        if total == 0:
            return None
        uses, tokens = self.uses.numpy(), self.tokens.numpy()
        uses += counts
        tokens += total
        self.steps.numpy()[...] += 1
        wanted = np.zeros(size, dtype=np.bool_)
        closes = bool(tokens >= patience * size)
        if closes:
            wanted = uses < tokens * np.float32(threshold / size)
        if self.windows.numpy() == 0 and size > 1:
            expected = -size * math.expm1(float(tokens) * math.log1p(-1 / size))
            if (uses > 0).sum() < 0.25 * expected:
                wanted |= uses == 0
        if closes:
            uses[...] = 0.0
            tokens[...] = 0.0
            self.windows.numpy()[...] += 1
        # The sum is not finite if one of its terms is not.
        if not np.isfinite(vectors.sum(dtype=torch.float32).numpy()):
            return torch.from_numpy(wanted), _broken(vectors)
        return (torch.from_numpy(wanted), None) if wanted.any() else None

    def is_readable(self, selections: list[Selection], vectors: Tensor) -> bool:
        """Whether ``count_here_`` can be called; ranks count together, so none can tell alone."""
        state = (self.uses, self.tokens, self.steps, self.windows)
        indices = [s.indices for s in selections]
        return not _distributed.is_active() and is_on_host(vectors, *state, *indices)

    def count_(
        self, hits: Tensor, vectors: Tensor, threshold: float, patience: float
    ) -> tuple[Tensor, Tensor]:
        """Counts a step; returns which codes should move, and which must.

        Args:
            hits: How often each code was chosen.
            vectors: The codes.
            threshold: Fraction of the mean use below which a code counts as dead.
            patience: Length of a window in tokens per code.

        Shape:
            - ``hits``, returns: ``(k,)``
            - ``vectors``: ``(k, d)``
        """
        total, size = hits.sum(), len(vectors)
        uses, tokens = self.uses.add_(hits), self.tokens.add_(total)
        self.steps.add_(total > 0)
        closes = tokens >= patience * size
        rare = closes & (uses < tokens * (threshold / size))
        starts = (self.windows == 0) & _has_collapsed((uses > 0).sum(), tokens, size)
        wanted = rare | (starts & (uses == 0))
        broken = _broken(vectors) & (total > 0)
        uses.masked_fill_(closes, 0.0)
        tokens.masked_fill_(closes, 0.0)
        self.windows.add_(closes)
        return wanted, broken


def _broken(vectors: Tensor) -> Tensor:
    """Whether a code has a NaN or an infinity, which is no number times 0 either."""
    return (vectors * 0).sum(dim=1) != 0


def _has_collapsed(used: Tensor, tokens: Tensor, size: int) -> Tensor:
    """Whether few codes are in use, compared with as many tokens spread evenly over the codes."""
    if size == 1:
        return tokens < 0
    return used < -0.25 * size * torch.expm1(tokens * math.log1p(-1 / size))
