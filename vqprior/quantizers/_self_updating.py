"""Quantizers that step their own rules."""

from typing import cast, final

from torch import Tensor, nn

from vqprior._interfaces import Quantizer, QuantizerOutput, UpdateRule
from vqprior.quantizers._shared._wrapper import QuantizerWrapper


@final
class SelfUpdating(QuantizerWrapper):
    """Steps rules at the end of each forward in training mode, as batch norm does.

    For training loops that cannot be edited. Everywhere else an explicit ``rule.step(out)``
    is better: activation checkpointing, for one, runs a forward twice and would step twice.
    The rules are submodules, so their statistics travel with the ``state_dict``. Other methods step
    nothing; a stage of a beam search is assigned its codes, so put this outside of it.

    Args:
        quantizer: The quantizer that is called.
        *rules: Rules that were built on ``quantizer``, stepped in this order.

    Raises:
        ValueError: If a rule was built on another quantizer.

    Shape:
        - input, output: those of ``quantizer``

    Examples:
        >>> import torch
        >>> from vqprior import CodebookEMA, SelfUpdating, VectorQuantizer
        >>> vq = VectorQuantizer(dim=4, codebook_size=16)
        >>> learning = SelfUpdating(vq, CodebookEMA(vq))
        >>> x = torch.randn(100, 4)
        >>> before = learning(x).loss  # the codebook moves after this was computed
        >>> bool(learning(x).loss < before)
        True
    """

    def __init__(self, quantizer: Quantizer, *rules: UpdateRule) -> None:
        super().__init__(quantizer)
        known = {id(codebook) for codebook in quantizer.codebooks}
        for rule in rules:
            if {id(codebook) for codebook in rule.codebooks} != known:
                raise ValueError(
                    "`rules` must be built on `quantizer`, got a "
                    f"{type(rule).__name__} of other codebooks. Build it on the quantizer that is "
                    "passed here."
                )
        self.rules = nn.ModuleList(rules)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes, then, in training mode, steps the rules; the result is from before."""
        out = self.quantizer(x, mask)
        if self.training:
            for rule in self.rules:
                cast("UpdateRule", rule).step(out)
        return out
