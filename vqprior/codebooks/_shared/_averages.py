"""How moving averages move the codes of one codebook: by operators, and faster on a CPU."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqprior._interfaces import Codebook
from vqprior.functional._kernels._host import is_on_host

_Array = npt.NDArray[np.float32]
_LASTING = 0.01  # share of one step in how often rows were rewritten lately


@dataclasses.dataclass(frozen=True, kw_only=True)
class Averages:
    """The statistics of one codebook, float32.

    Attributes:
        counts: Moving count of what chose each code.
        codes: The codes, which a codebook of another dtype rounds.
        written: What the codebook held after the last step.
        restarts: How often each code was rewritten by others lately.

    Shape:
        - ``codes``, ``written``: ``(k, d)``
        - ``counts``, ``restarts``: ``(k,)``
    """

    counts: Tensor
    codes: Tensor
    written: Tensor
    restarts: Tensor

    def move_(
        self, codebook: Codebook, sums: Tensor, hits: Tensor, decay: float, eps: float
    ) -> None:
        """Moves a codebook by the ``sums`` ``(k, d)`` and ``hits`` ``(k, 1)`` of a step."""
        table = codebook._table()
        if table is not None and self._is_plain(table[0], sums, hits):
            self._move_in_place(*table, sums, hits, decay, eps)
        else:
            self._move(codebook, sums, hits.squeeze(1), decay, eps)

    def _is_plain(self, weight: Tensor, *others: Tensor) -> bool:
        """Whether codes of float32 are on the CPU: then they need no second copy to learn from."""
        tensors = (weight.detach(), self.counts, self.codes, self.written, self.restarts, *others)
        return is_on_host(*tensors) and {tensor.dtype for tensor in tensors} == {torch.float32}

    def _move(
        self, codebook: Codebook, sums: Tensor, hits: Tensor, decay: float, eps: float
    ) -> None:
        counts, codes, written = self.counts, self.codes, self.written
        current = codebook.codes()
        # Compared in the narrower of the two dtypes: only there were they ever equal.
        kept = written.to(current.dtype).to(written.dtype)
        any_hit = hits.any()
        rewritten = (kept != current.to(written.dtype)).any(dim=1) & any_hit
        torch.where(rewritten.unsqueeze(1), current.to(codes.dtype), codes, out=codes)
        counts.masked_fill_(rewritten, 1.0)
        self.restarts.lerp_(rewritten.to(self.restarts.dtype), _LASTING * any_hit)

        # Keeping the codes in place of the mass loses nothing: the mass is their product.
        mass = codes * _smooth(counts, eps).unsqueeze(1)
        counts.lerp_(hits, (1 - decay) * any_hit)
        mass.lerp_(sums, 1 - decay)
        chosen = hits > 0
        # Where nothing chose a code its smoothed count can be 0; the quotient is not used there.
        mass.div_(_smooth(counts, eps).masked_fill(~chosen, 1.0).unsqueeze(1))
        torch.where(chosen.unsqueeze(1), mass, codes, out=codes)
        codebook.set_codes_(codes, chosen)
        # Not always what was assigned: a normalized codebook keeps the direction alone.
        torch.where(any_hit, codebook.codes().to(written.dtype), written, out=written)

    def _move_in_place(
        self, weight: Tensor, gain: float, sums: Tensor, hits: Tensor, decay: float, eps: float
    ) -> None:
        """Computes what ``_move`` does with rates for each code, and the rates by numpy."""
        chose = hits.squeeze(1).numpy()
        if not chose.any():
            return
        weight = weight.detach()
        current = weight if gain == 1.0 else weight * gain
        counts, restarts = self.counts.numpy(), self.restarts.numpy()
        restarts *= 1 - _LASTING
        differs = self.written.numpy() != current.numpy()
        if differs.any():
            rewritten = differs.any(axis=1)
            counts[rewritten] = 1.0
            restarts[rewritten] += _LASTING
        keep, add = _rates(counts, chose, decay, eps)
        weight.mul_(torch.from_numpy(keep)).addcmul_(sums, torch.from_numpy(add / np.float32(gain)))
        self.codes.copy_(torch.mul(weight, gain, out=self.written))


def _smooth(counts: Tensor, eps: float) -> Tensor:
    total = counts.sum()
    return (counts + eps) * (total / (total + counts.shape[0] * eps))


def _rates(counts: _Array, chose: _Array, decay: float, eps: float) -> tuple[_Array, _Array]:
    """Steps ``counts`` and returns the shares of a code and of a sum in the next code.

    ``(decay * before * code + (1 - decay) * sum) / after``, of smoothed counts, is the next code;
    codes that nothing chose stay as they are.
    """
    before = _smoothed(counts, eps)
    counts += (chose - counts) * np.float32(1 - decay)
    chosen = chose > 0
    after = np.where(chosen, _smoothed(counts, eps), np.float32(1.0))
    keep: _Array = np.where(chosen, before / after * np.float32(decay), np.float32(1.0))
    add: _Array = np.where(chosen, np.float32(1 - decay) / after, np.float32(0.0))
    return keep[:, None], add[:, None]


def _smoothed(counts: _Array, eps: float) -> _Array:
    total = counts.sum()
    return (counts + np.float32(eps)) * np.float32(total / (total + len(counts) * eps))
