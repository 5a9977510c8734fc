"""Quantizers that step their own rules."""

from typing import final

from torch import Tensor

from vqprior._default_rules import default_rules
from vqprior._interfaces import Quantizer
from vqprior._results import QuantizerOutput
from vqprior._rules import UpdateRule
from vqprior._transforms import is_transforming
from vqprior.codebooks._chained import ChainedRules
from vqprior.quantizers._shared._wrapper import QuantizerWrapper


@final
class SelfUpdating(QuantizerWrapper):
    """Updates its codebooks at the end of each forward in training mode, as BatchNorm does.

    The statistics of the rules travel with the ``state_dict``. Put it inside of
    ``TextureQuantizer`` and outside of the other wrappers. In eval mode nothing is updated, nor by
    ``encode``, ``decode`` and the other methods in any mode.

    Where you can edit the training loop, ``rule.step(out)`` after ``optimizer.step()`` does the
    same and keeps calls pure: activation checkpointing, for one, runs a forward twice and would
    update twice.

    Args:
        quantizer: The quantizer that is called.
        *rules: Rules built on ``quantizer``, stepped in this order; ``default_rules(quantizer)``
            if there are none.

    Raises:
        TypeError: If one of ``rules`` is not an ``UpdateRule``.
        ValueError: If a rule was built on another quantizer.

    Shape:
        - input, output: those of ``quantizer``

    Examples:
        >>> import torch
        >>> from vqprior import SelfUpdating, VectorQuantizer
        >>> vq = SelfUpdating(VectorQuantizer(dim=4, codebook_size=16))
        >>> x = 100 + torch.randn(1000, 4)  # far from where the codebook starts
        >>> before = vq(x).loss
        >>> bool(vq(x).loss < 0.01 * before)
        True
        >>> vq.encode(x).unique().numel()
        16

        With other rules:

        >>> from vqprior import CodebookEMA
        >>> vq = VectorQuantizer(dim=4, codebook_size=16)
        >>> vq = SelfUpdating(vq, CodebookEMA(vq, decay=0.9))
    """

    def __init__(self, quantizer: Quantizer, *rules: UpdateRule) -> None:
        super().__init__(quantizer)
        self.rules = ChainedRules(*rules) if rules else default_rules(quantizer)
        known = {id(codebook) for codebook in quantizer.codebooks}
        for rule in self.rules:
            if not {id(codebook) for codebook in rule.codebooks} <= known:
                raise ValueError(
                    "`rules` must be built on `quantizer`, got a "
                    f"{type(rule).__name__} of other codebooks. Build it on the quantizer that is "
                    "passed here."
                )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes, then, in training mode, steps the rules; the result is from before.

        Raises:
            ValueError: In training mode inside ``torch.func``, which cannot change a state.
        """
        if self.training and is_transforming():
            raise ValueError(
                "`training` must be False inside `torch.func`, which cannot change the state of a "
                "module, got True. Call `.eval()`, and step the rules outside of the transform."
            )
        out = self.quantizer(x, mask)
        if self.training:
            self.rules.step(out)
        return out
