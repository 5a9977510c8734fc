"""Several rules as one."""

from collections.abc import Iterator
from typing import cast, final

from torch import nn

from vqprior._borrowed import BorrowedCodebooks
from vqprior._interfaces import UpdateRule
from vqprior._results import QuantizerOutput


@final
class ChainedRules(UpdateRule):
    """Steps several rules of one quantizer, in the order given.

    The rules are its submodules, numbered from 0. Without rules, a step does nothing.

    Args:
        *rules: What is stepped, all built on the same quantizer.

    Raises:
        TypeError: If one of ``rules`` is not an ``UpdateRule``.

    Shape:
        - no tensors in the constructor

    Examples:
        >>> import torch
        >>> from vqprior import ChainedRules, CodebookEMA, CodebookRevival, VectorQuantizer
        >>> vq = VectorQuantizer(dim=4, codebook_size=16)
        >>> rules = ChainedRules(CodebookEMA(vq, decay=0.9), CodebookRevival(vq))
        >>> rules.step(vq(torch.randn(100, 4)))
    """

    def __init__(self, *rules: UpdateRule) -> None:
        nn.Module.__init__(self)  # that of UpdateRule is for rules that set codes themselves
        for number, rule in enumerate(rules):
            if not isinstance(rule, UpdateRule):
                raise TypeError(
                    f"`rules` must be update rules, got {type(rule).__name__}. For example "
                    "`CodebookEMA(quantizer)`."
                )
            self.add_module(str(number), rule)
        unique = {id(codebook): codebook for rule in rules for codebook in rule.codebooks}
        self._borrowed = BorrowedCodebooks(tuple(unique.values()))

    def __len__(self) -> int:
        """Number of rules."""
        return len(self._modules)

    def __iter__(self) -> Iterator[UpdateRule]:
        """The rules in order."""
        return iter(cast("list[UpdateRule]", list(self._modules.values())))

    def __getitem__(self, number: int) -> UpdateRule:
        """The rule of this number."""
        return list(self)[number]

    def step(self, *outs: QuantizerOutput) -> None:
        """Steps every rule with the same results.

        Raises:
            ValueError: If a result does not come from the rules' quantizer.
        """
        for rule in self:
            rule.step(*outs)

    def advice(self) -> str | None:
        """Returns the first advice that one of the rules has."""
        return next((advice for rule in self if (advice := rule.advice()) is not None), None)
