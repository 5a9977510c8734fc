"""Exponential moving average of the vectors that chose each code."""

from typing import final

import torch
from torch import nn

from vqprior import _distributed
from vqprior._checks import check_at_least, check_interval
from vqprior._interfaces import QuantizerBase
from vqprior._results import QuantizerOutput
from vqprior._rules import UpdateRule
from vqprior.codebooks._shared._averages import Averages
from vqprior.codebooks._shared._fused import move_fused_
from vqprior.functional._statistics import sums_and_counts


@final
class CodebookEMA(UpdateRule):
    """Sets each code to the exponential moving average of the inputs that chose it.

    With ``c`` and ``s`` the count and the sum of the inputs that chose a code in this step,
    count ``n`` and mass ``m`` follow ``n <- decay n + (1 - decay) c`` and likewise ``m`` and
    ``s``; the code becomes ``m / n'``, where ``n'`` is ``n`` after Laplace smoothing. Counts
    start at 1. Codes that no input chose in a step do not change.

    The codebook leaves gradient training for good: its parameters become buffers of the same
    names, which no optimizer, ``requires_grad_`` or weight decay reaches. To train it by gradient
    again, load its ``state_dict`` into a new quantizer. A code that was changed otherwise since
    the last step (by ``CodebookRevival``, ``initialize_codebooks_`` or a checkpoint) is kept, with
    a count of 1; ``advice`` tells if that happens all the time. Statistics are float32, summed
    over ranks with one collective.

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
        for number, codebook in enumerate(self.codebooks):
            _take_over(codebook)
            codes = codebook.codes().detach().to(torch.float32, copy=True)
            self.register_buffer(f"counts_{number}", torch.ones_like(codes[:, 0]))
            self.register_buffer(f"codes_{number}", codes)
            self.register_buffer(f"written_{number}", codes.clone())
            self.register_buffer(f"restarts_{number}", torch.zeros_like(codes[:, 0]))

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
        codebooks = self.codebooks
        averages = [self._averages(number) for number in range(len(codebooks))]
        if move_fused_(codebooks, averages, groups, self.decay, self.eps):
            return
        statistics = []
        for codebook, selections in zip(codebooks, groups, strict=True):
            parts = [sums_and_counts(s.inputs, s.indices, codebook.num_codes) for s in selections]
            for same in zip(*parts, strict=True):  # the sums, then the counts
                joint = same[0] if len(same) == 1 else torch.stack(same).sum(dim=0)
                statistics.append(joint.float())
        joint = _distributed.all_reduce_sums(statistics)
        for number, codebook in enumerate(codebooks):
            sums, hits = joint[2 * number : 2 * number + 2]
            averages[number].move_(codebook, sums, hits, self.decay, self.eps)
            _take_over(codebook)  # what another class of codebook may have made parameters again

    @torch.no_grad()
    def advice(self) -> str | None:
        """Returns a sentence if averages do not last or codes are not used, otherwise None.

        Averages do not last if half of the codes are rewritten between steps, over the last
        hundred steps. Codes are not used if less than half were chosen lately; one was not if its
        moving count is below 1 % of the mean count.
        """
        for number in range(len(self._borrowed)):
            if self.get_buffer(f"restarts_{number}").mean() > 0.5:
                return (
                    f"Codebook {number}: codes are rewritten between steps, so that their averages "
                    "start again each time. Step one `CodebookEMA` per codebook, and keep "
                    "everything else from writing to it."
                )
        counts = [self.get_buffer(f"counts_{number}") for number in range(len(self._borrowed))]
        chosen = [int((count > 0.01 * count.mean()).sum()) for count in counts]
        worst = min(range(len(counts)), key=lambda number: chosen[number] / len(counts[number]))
        if 2 * chosen[worst] >= len(counts[worst]):
            return None
        return (
            f"Codebook {worst}: {chosen[worst]} of {len(counts[worst])} codes were chosen lately. "
            "`CodebookRevival` brings unused codes back; if it is stepped already, use fewer codes."
        )

    def _averages(self, number: int) -> Averages:
        return Averages(
            counts=getattr(self, f"counts_{number}"),
            codes=getattr(self, f"codes_{number}"),
            written=getattr(self, f"written_{number}"),
            restarts=getattr(self, f"restarts_{number}"),
        )


def _take_over(codebook: nn.Module) -> None:
    """Turns parameters into buffers: ``requires_grad`` is for anyone to change, being one is not.

    They are copies, so that an optimizer that was built before writes to what nobody reads.
    """
    if next(codebook.parameters(), None) is None:
        return
    for module in codebook.modules():
        for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            delattr(module, name)
            module.register_buffer(name, parameter.detach().clone())
