"""Composite quantizers against the sum of their parts."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from tests.benchmarks import sides
from tests.benchmarks.pairs import CLOSE, Pair, same_choice
from tests.benchmarks.sides import Outcome
from vqprior import CodebookEMA, GroupedQuantizer, MultiScaleQuantizer, Quantizer, ResidualQuantizer

SCALES = (1, 2, 4, 8, 16)


def residual(device: str, n: int, k: int, d: int, q: int) -> Pair:
    """Compares a ``ResidualQuantizer`` with its stages alone, each on its own input."""
    data = sides.tokens(device, n, k, d, q)
    whole = ResidualQuantizer([sides.plain(codes) for codes in data.codes]).to(device)
    inputs = _left_over(whole, data.x, range(q))
    parts = [
        sides.train_ours(sides.plain(codes).to(device), x, data.direction)
        for codes, x in zip(data.codes, inputs, strict=True)
    ]

    def agree(whole: Outcome, parts: list[Outcome]) -> None:
        for number, (x, codes, part) in enumerate(zip(inputs, data.codes, parts, strict=True)):
            same_choice(x, codes, whole.indices[..., number], part.indices)
        assert_close(whole.quantized, sum(part.quantized for part in parts), **CLOSE)
        assert_close(whole.loss, sum(part.loss for part in parts) / q, **CLOSE)

    step = sides.train_ours(whole, data.x, data.direction)
    return Pair(step, lambda: [part() for part in parts], agree)


def grouped(device: str, n: int, k: int, d: int, q: int) -> Pair:
    """Compares a ``GroupedQuantizer`` with its groups of ``d`` features alone."""
    data = [sides.tokens(device, n, k, d, seed=group) for group in range(q)]
    x = torch.cat([group.x for group in data], dim=-1)
    direction = torch.cat([group.direction for group in data], dim=-1)
    whole = GroupedQuantizer([sides.plain(t.codes[0]) for t in data]).to(device)
    parts = [sides.train_ours(sides.plain(t.codes[0]).to(device), t.x, t.direction) for t in data]

    def agree(whole: Outcome, parts: list[Outcome]) -> None:
        for number, (group, part) in enumerate(zip(data, parts, strict=True)):
            same_choice(group.x, group.codes[0], whole.indices[..., number], part.indices)
        for name in ("quantized", "grad"):
            joined = torch.cat([getattr(part, name) for part in parts], dim=-1)
            assert_close(getattr(whole, name), joined, **CLOSE)
        assert_close(whole.loss, sum(part.loss for part in parts), **CLOSE)

    step = sides.train_ours(whole, x, direction)
    return Pair(step, lambda: [part() for part in parts], agree)


def multi_scale(device: str, b: int, k: int, d: int) -> Pair:
    """Compares a ``MultiScaleQuantizer`` with its quantizer at each scale, resizing included.

    The scales share a codebook, so both sides take one step of the moving average.
    """
    side = SCALES[-1]
    data = sides.tokens(device, b * side * side, k, d)
    shape = (b, side, side, d)
    x, direction, codes = data.x.view(shape), data.direction.view(shape), data.codes[0]
    whole = MultiScaleQuantizer(sides.plain(codes), SCALES).to(device)
    starts = itertools.accumulate([scale * scale for scale in SCALES[:-1]], initial=0)
    maps = [leaf.requires_grad_() for leaf in _left_over(whole, x, starts)]
    smaller = [_shrunk(leaf, scale).detach() for leaf, scale in zip(maps, SCALES, strict=True)]
    part = sides.plain(codes).to(device)
    rule = CodebookEMA(part, decay=sides.DECAY)
    directions = [torch.randn_like(small) for small in smaller]
    together = part(torch.cat([small.flatten(0, 2) for small in smaller]))

    def parts() -> list[Outcome]:
        outcomes = []
        for leaf, scale, wanted in zip(maps, SCALES, directions, strict=True):
            leaf.grad = None
            # As tokens: such a map might have its channels first.
            out = part(_shrunk(leaf, scale).flatten(1, 2))
            quantized, indices = out.quantized.view_as(wanted), out.indices.view(wanted.shape[:-1])
            ((quantized * wanted).sum() + out.loss).backward()
            large = _enlarged(quantized.detach(), side)
            outcomes.append(Outcome(indices, large, out.loss.detach(), leaf.grad))
        rule.step(together)
        return outcomes

    def agree(whole: Outcome, parts: list[Outcome]) -> None:
        found = whole.indices.split([scale * scale for scale in SCALES], dim=1)
        for small, first, part in zip(smaller, found, parts, strict=True):
            same_choice(small, codes, first.view_as(part.indices), part.indices)
        assert_close(whole.quantized, sum(part.quantized for part in parts), **CLOSE)
        assert_close(whole.loss, sum(part.loss for part in parts), **CLOSE)

    return Pair(sides.train_ours(whole, x, direction), parts, agree)


@torch.no_grad()
def _left_over(whole: Quantizer, x: Tensor, starts: Iterable[int]) -> list[Tensor]:
    """Returns the residual of ``x`` after decoding the indices up to each start."""
    indices, left_over = whole.encode(x), []
    for start in starts:
        earlier = indices.clone()
        earlier[..., start:] = -1
        left_over.append(x - whole.decode(earlier))
    return left_over


def _shrunk(x: Tensor, scale: int) -> Tensor:
    if scale == x.shape[1]:
        return x
    return F.interpolate(x.movedim(-1, 1), size=(scale, scale), mode="area").movedim(1, -1)


def _enlarged(x: Tensor, side: int) -> Tensor:
    if side == x.shape[1]:
        return x
    large = F.interpolate(x.movedim(-1, 1), size=(side, side), mode="bicubic", align_corners=False)
    return large.movedim(1, -1)
