"""The interface of rules, by which codebooks change other than by gradient."""

import abc
import logging

import torch
from torch import nn

from vqprior import _distributed
from vqprior._borrowed import BorrowedCodebooks
from vqprior._checks import check_codes, check_instance
from vqprior._interfaces import Codebook, QuantizerBase
from vqprior._precision import KeepsDtypes
from vqprior._results import QuantizerOutput, Selection

_logger = logging.getLogger("vqprior")


class UpdateRule(KeepsDtypes, abc.ABC):
    """How codebooks change other than by gradient: ``step(out)`` after a quantizer's call.

    Several results are joined into one step: ``step(*outs)`` after the micro-batches of one
    optimizer step does what one call on the whole batch would. A rule changes the codebooks that
    can be set and leaves the others to their gradient.

    A rule is a module: make it a member of the model, and its statistics, float32 buffers whatever
    the dtype of the model, are saved and restored with the model's ``state_dict``. Several go into
    ``ChainedRules``, not into a plain list. A rule refers to the quantizer without owning it: the
    parameters of the quantizer are not parameters of the rule. Copy both in one ``deepcopy`` or
    ``pickle``: a rule copied alone raises in ``step``.

    Laws: a step without a single counted token leaves rule and codebooks as they were; every
    rank reaches every collective; nothing is read back to the host in ``step``.
    """

    def __init__(self, quantizer: QuantizerBase) -> None:
        super().__init__()
        check_instance("quantizer", quantizer, QuantizerBase, "For example a `VectorQuantizer`.")
        if not quantizer.codebooks:
            raise ValueError(
                f"`quantizer` must have a codebook that can learn, got {type(quantizer).__name__} "
                "without one. Train it without rules."
            )
        unique = {id(codebook): codebook for codebook in quantizer.codebooks}
        to_set = {key: codebook for key, codebook in unique.items() if codebook.can_be_set}
        for codebook in (to_set or unique).values():
            _distributed.check_whole(codebook)
            vectors = codebook.codes().detach()
            check_codes("codebook.codes()", vectors)  # a flat shard is no matrix
            nowhere = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
            codebook.set_codes_(vectors, nowhere)  # raises now if the codes cannot be set
        self._borrowed = BorrowedCodebooks(tuple(to_set.values()))
        self._owner_of_selection = [
            list(to_set).index(id(c)) if id(c) in to_set else None for c in quantizer.codebooks
        ]
        self._advised = False
        self.register_state_dict_pre_hook(_log_advice)

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """The codebooks that this rule changes, each once.

        Raises ``RuntimeError`` in a copy that was made without the quantizer.
        """
        return self._borrowed.get()

    @abc.abstractmethod
    def step(self, *outs: QuantizerOutput) -> None:
        """Updates statistics and codebooks from results of the quantizer, joined into one step."""

    def advice(self) -> str | None:
        """Returns a sentence if the codebooks are hardly used, otherwise None.

        Reads statistics back to the host. It is logged once, when a ``state_dict`` is taken.
        """
        return None

    def _selections_by_codebook(self, *outs: QuantizerOutput) -> list[list[Selection]]:
        """Sorts the selections of all results by the codebook they were made from.

        Call it first in ``step``: it raises before any collective, on all ranks alike.
        """
        self._borrowed.check_whole()
        groups: list[list[Selection]] = [[] for _ in range(len(self._borrowed))]
        for out in outs:
            check_instance("out", out, QuantizerOutput, "Pass what the quantizer returned.")
            if len(out.selections) != len(self._owner_of_selection):
                raise ValueError(
                    f"`out` must hold {len(self._owner_of_selection)} selections, one for each "
                    f"codebook of this rule's quantizer, got {len(out.selections)}. Pass the "
                    "result of the quantizer that the rule was built on."
                )
        for position, owner in enumerate(self._owner_of_selection):
            if owner is not None:
                groups[owner].append(_join([out.selections[position] for out in outs]))
        return groups


def _join(selections: list[Selection]) -> Selection:
    """Returns the selection of one call with all tokens; that of each rank stays together."""
    if len(selections) == 1:
        return selections[0]
    return Selection(
        inputs=torch.cat([s.inputs.reshape(-1, s.inputs.shape[-1]) for s in selections]),
        codes=torch.cat([s.codes.reshape(-1, s.codes.shape[-1]) for s in selections]),
        indices=torch.cat([s.indices.reshape(-1) for s in selections]),
        mask=torch.cat([s.mask.reshape(-1) for s in selections]),
    )


def _log_advice(rule: nn.Module, _prefix: str, _keep_vars: bool) -> None:  # noqa: FBT001
    """Logs the advice of a rule, once, when its state is saved."""
    if any(buffer.is_meta for buffer in rule.buffers()):
        return  # there are no statistics to read
    if isinstance(rule, UpdateRule) and not rule._advised and _distributed.rank() == 0:
        advice = rule.advice()
        if advice is not None:
            rule._advised = True
            _logger.warning(advice)
