"""Exponential moving average of the vectors that chose each code."""

from typing import final

import torch
from torch import Tensor

from vqprior import _distributed
from vqprior._checks import check_at_least, check_interval
from vqprior._interfaces import QuantizerBase, UpdateRule
from vqprior._results import QuantizerOutput
from vqprior.functional import code_sums_and_counts


@final
class CodebookEMA(UpdateRule):
    """Sets each code to the exponential moving average of the inputs that chose it.

    With ``c`` and ``s`` the count and the sum of the inputs that chose a code in this step,
    count ``n`` and mass ``m`` follow ``n <- decay n + (1 - decay) c`` and likewise ``m`` and
    ``s``; the code becomes ``m / n'``, where ``n'`` is ``n`` after Laplace smoothing. Counts
    start at 1. Codes that no input chose in a step do not change.

    The codebook is taken out of gradient training (``requires_grad_(False)``). A code that was
    changed otherwise since the last step (by ``CodebookRevival``, ``initialize_codebooks_`` or a
    checkpoint) is kept, with a count of 1. Statistics are float32, summed over ranks with one
    collective.

    Args:
        quantizer: The quantizer whose codebooks learn, or any wrapper around it. Pass ``step``
            the results of what is passed here.
        decay: Share of the statistics kept in a step, in ``[0, 1)``.
        eps: Laplace smoothing of the counts, at least 0.

    Raises:
        ValueError: If ``decay`` or ``eps`` is out of range or ``quantizer`` has no codebook.

    Shape:
        - no tensors in the constructor

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017, appendix A.1. <https://arxiv.org/abs/1711.00937>. Deviations: counts start
        at 1 instead of 0, and codes that no input chose are not divided by their vanishing
        count.

    Examples:
        >>> import torch
        >>> from vqprior import CodebookEMA, VectorQuantizer
        >>> vq = VectorQuantizer(dim=4, codebook_size=16)
        >>> ema = CodebookEMA(vq, decay=0.9)
        >>> x = torch.randn(100, 4)
        >>> before = vq(x).terms["commitment"]
        >>> for _ in range(20):
        ...     ema.step(vq(x))
        >>> bool(vq(x).terms["commitment"] < before)
        True
    """

    def __init__(self, quantizer: QuantizerBase, *, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__(quantizer)
        check_interval("decay", decay, 0.0, 1.0)
        check_at_least("eps", eps, 0.0)
        self.decay = decay
        self.eps = eps
        for number, codebook in enumerate(self._codebooks):
            codebook.requires_grad_(requires_grad=False)
            codes = codebook.codes().detach().to(torch.float32, copy=True)
            self.register_buffer(f"counts_{number}", torch.ones_like(codes[:, 0]))
            self.register_buffer(f"codes_{number}", codes)
            self.register_buffer(f"written_{number}", codes.clone())

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return f"decay={self.decay}, eps={self.eps}"

    @torch.no_grad()
    def step(self, *outs: QuantizerOutput) -> None:
        """Updates the codebooks from results of the quantizer, joined into one step.

        Raises:
            TypeError: If a codebook is sharded over ranks.
            ValueError: If a result does not come from the rule's quantizer.
        """
        if not outs:
            return
        groups = self._selections_by_codebook(*outs)
        statistics = []
        for codebook, selections in zip(self._codebooks, groups, strict=True):
            _distributed.check_whole(codebook)
            parts = [
                code_sums_and_counts(s.inputs, s.indices, codebook.num_codes) for s in selections
            ]
            joint = parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
            statistics.append(joint.float())
        for number, joint in enumerate(_distributed.all_reduce_sums(statistics)):
            self._update(number, joint)

    @torch.no_grad()
    def advice(self) -> str | None:
        """Returns a sentence if less than half of the codes were chosen lately, otherwise None.

        A code was not chosen lately if its moving count is below 1 % of the mean count.
        """
        counts = [self.get_buffer(f"counts_{number}") for number in range(len(self._codebooks))]
        chosen = [int((count > 0.01 * count.mean()).sum()) for count in counts]
        worst = min(range(len(counts)), key=lambda number: chosen[number] / len(counts[number]))
        if 2 * chosen[worst] >= len(counts[worst]):
            return None
        return (
            f"Codebook {worst}: {chosen[worst]} of {len(counts[worst])} codes were chosen lately. "
            "`CodebookRevival` brings unused codes back; if it is stepped already, use fewer codes."
        )

    def _update(self, number: int, statistics: Tensor) -> None:
        codebook = self._codebooks[number]
        counts: Tensor = self.get_buffer(f"counts_{number}")
        codes: Tensor = self.get_buffer(f"codes_{number}")
        written: Tensor = self.get_buffer(f"written_{number}")
        current = codebook.codes()
        # Compared in the narrower of the two dtypes: only there were they ever equal.
        kept = written.to(current.dtype).to(written.dtype)
        sums, hits = statistics[:, :-1], statistics[:, -1]
        any_hit = hits.sum() > 0
        rewritten = (kept != current.to(written.dtype)).any(dim=1) & any_hit
        codes.copy_(torch.where(rewritten.unsqueeze(1), current, codes))
        counts.copy_(torch.where(rewritten, 1.0, counts))

        # Keeping the codes in place of the mass loses nothing: the mass is their product.
        mass = codes * self._smooth(counts).unsqueeze(1)
        counts.copy_(torch.where(any_hit, counts.lerp(hits, 1 - self.decay), counts))
        mass = mass.lerp(sums, 1 - self.decay)
        chosen = hits > 0
        # Where nothing chose a code its smoothed count can be 0; the quotient is not used there.
        moved = mass / torch.where(chosen, self._smooth(counts), 1.0).unsqueeze(1)
        codes.copy_(torch.where(chosen.unsqueeze(1), moved, codes))
        codebook.set_codes_(codes, chosen)
        # Not always what was assigned: a normalized codebook keeps the direction alone.
        written.copy_(torch.where(any_hit, codebook.codes().to(written.dtype), written))

    def _smooth(self, counts: Tensor) -> Tensor:
        total = counts.sum()
        return (counts + self.eps) * (total / (total + counts.shape[0] * self.eps))
