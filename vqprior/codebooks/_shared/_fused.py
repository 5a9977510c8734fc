"""Rules by kernels, where their codebooks allow it."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vqprior import _distributed
from vqprior._interfaces import Codebook
from vqprior._results import Selection
from vqprior.codebooks._shared._averages import Averages
from vqprior.codebooks._shared._watch import Watch
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
        seen = [t.detach() for s in groups[number] for t in (s.inputs, s.indices)]
        if table is None or not _fit((table[0].detach(), *_state(averages[number])), tuple(seen)):
            return False
        weight, gain = table
        alike.setdefault((weight.shape, weight.dtype, weight.device, gain), []).append(number)
        increment_version(weight)  # as in-place operators do
    steps = [_sum_up(numbers, codebooks, averages, groups) for numbers in alike.values()]
    if _distributed.is_active():
        joint = _distributed.all_reduce_sums([step.joint() for step in steps])
        for step, totals in zip(steps, joint, strict=True):
            step.totals = totals
    for step in steps:
        step.move_(decay, eps)
    return True


def revive_fused_(
    codebook: Codebook,
    watch: Watch,
    selections: list[Selection],
    seed: int,
    threshold: float,
    patience: float,
) -> Tensor | None:
    """Steps a revival by kernels; returns which codes moved, or None if it needs operators.

    Ranks draw from the tokens of all, and a codebook with several uses from the tokens of each.
    """
    table = codebook._table()
    if table is None or len(selections) > 1 or _distributed.is_active():
        return None
    weight, gain = table[0].detach(), table[1]
    seen = selections[0].detach()
    counted = (watch.uses, watch.tokens, watch.steps, watch.windows)
    held = (weight, *counted)
    vectors = (seen.inputs, seen.codes)
    if seen.mask.numel() == 0 or not _fit(held, (*vectors, seen.indices)):
        return None
    from vqprior.functional._kernels._triton_revival import Revival  # needs Triton

    revival = Revival(
        weight=weight,
        gain=gain,
        uses=watch.uses,
        tokens=watch.tokens,
        steps=watch.steps,
        windows=watch.windows,
        seed=seed,
        threshold=threshold,
        patience=patience,
    )
    inputs, codes = (vector.flatten(0, -2) for vector in vectors)
    moved = revival.step_(inputs, codes, seen.indices.flatten(), seen.mask.flatten())
    increment_version(weight)  # as in-place operators do
    return moved.view(torch.bool)


def _fit(held: tuple[Tensor, ...], seen: tuple[Tensor, ...]) -> bool:
    """Whether kernels can write what is held, and read what was seen."""
    return (
        not is_traced(*held, *seen)
        and _triton.is_usable(*held, *seen)
        and not torch.are_deterministic_algorithms_enabled()
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
    seen = [
        [(s.inputs.detach().flatten(0, -2), s.indices.flatten()) for s in groups[number]]
        for number in numbers
    ]
    every = _stacked([x for one in seen for x, _ in one])
    indices = _stacked([names for one in seen for _, names in one])
    if every is not None and indices is not None and all(len(one) == 1 for one in seen):
        step.add_(every, indices)
        return step
    for place, one in enumerate(seen):
        for x, names in one:
            step.add_(x[None], names[None], place)
    return step


def _stacked(tensors: list[Tensor]) -> Tensor | None:
    """Returns as one tensor, without a copy, what lies evenly spaced in one storage."""
    first = tensors[0]
    layouts = {(t.shape, t.stride(), t.untyped_storage().data_ptr()) for t in tensors}
    starts = [tensor.storage_offset() for tensor in tensors]
    steps = {after - before for before, after in itertools.pairwise(starts)} or {0}
    if len(layouts) > 1 or len(steps) > 1 or min(steps) < 0:
        return None
    return first.as_strided((len(tensors), *first.shape), (steps.pop(), *first.stride()))
