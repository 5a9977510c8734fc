"""Moving averages by kernels, where all codebooks of a rule allow it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqprior import _distributed
from vqprior._interfaces import Codebook
from vqprior._results import Selection
from vqprior.codebooks._averages import Averages
from vqprior.functional._kernels import _triton
from vqprior.functional._kernels._operators import is_traced

if TYPE_CHECKING:
    from vqprior.functional._kernels._triton_averages import Step


def move_fused_(
    codebooks: Sequence[Codebook],
    averages: list[Averages],
    groups: list[list[Selection]],
    decay: float,
    eps: float,
) -> bool:
    """Steps all codebooks by kernels; False, and nothing is done, if one of them needs operators.

    Codebooks of one size share their launches.
    """
    alike: dict[object, list[int]] = {}
    for number, codebook in enumerate(codebooks):
        table = codebook._table()
        if table is None or not _fits(table[0], averages[number], groups[number]):
            return False
        weight, gain = table
        alike.setdefault((weight.shape, weight.dtype, weight.device, gain), []).append(number)
    steps = [_sum_up(numbers, codebooks, averages, groups) for numbers in alike.values()]
    if _distributed.is_active():
        joint = _distributed.all_reduce_sums([step.joint() for step in steps])
        for step, totals in zip(steps, joint, strict=True):
            step.totals = totals
    for step in steps:
        step.move_(decay, eps)
    return True


def _fits(weight: Tensor, averages: Averages, selections: list[Selection]) -> bool:
    held = (weight.detach(), *_state(averages))
    seen = [tensor.detach() for s in selections for tensor in (s.inputs, s.indices)]
    return (
        _triton.is_usable(*held, *seen)
        and not torch.are_deterministic_algorithms_enabled()
        and not is_traced(*held, *seen)
        and all(tensor.is_contiguous() for tensor in held)
    )


def _state(averages: Averages) -> tuple[Tensor, ...]:
    return averages.codes, averages.written, averages.counts, averages.restarts


def _sum_up(
    numbers: list[int],
    codebooks: Sequence[Codebook],
    averages: list[Averages],
    groups: list[list[Selection]],
) -> "Step":
    from vqprior.functional._kernels._triton_averages import Step  # needs Triton

    tables = [codebooks[number]._table() for number in numbers]
    weights = [table[0].detach() for table in tables if table is not None]
    gain = next(table[1] for table in tables if table is not None)
    most = max(sum(s.indices.numel() for s in groups[number]) for number in numbers)
    step = Step(weights, [_state(averages[number]) for number in numbers], gain, most)
    for place, number in enumerate(numbers):
        for s in groups[number]:
            step.add_(place, s.inputs.detach().flatten(0, -2), s.indices.flatten())
    return step
