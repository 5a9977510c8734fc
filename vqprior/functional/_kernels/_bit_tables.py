"""Tables of the probabilities of bit patterns, by which the entropies of bits are computed."""

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior.functional._kernels._operators import is_traced

_Half = TypeVar("_Half", int, Tensor)
# Probabilities below `exp` of this are not told apart. Where the result is subnormal or 0, `exp`
# takes ten times as long on a CPU.
_LOWEST = {torch.float32: -64.0, torch.float64: -600.0}
_BLOCK = 1 << 18  # entries of a table on a CPU: it stays in the cache from operator to operator


class Bits(NamedTuple):
    """One or two groups of bits; each half of a group has a table with a column for each pattern.

    Attributes:
        places: Which bits.
        patterns: What the columns of all tables consist of, ``(2 * bits, columns)``: 1 in one of
            the first ``bits`` rows if the bit is 1, and in one of the others if it is 0.
        sizes: Number of columns of each table, two for each group.
        signs: 1, -1 and 0.
    """

    places: slice
    patterns: Tensor
    sizes: tuple[int, ...]
    signs: Tensor


class Tables(NamedTuple):
    """What the tables of some bits and a block of tokens are computed by."""

    signed: Tensor
    buffer: Tensor
    logarithms: Tensor
    probabilities: Tensor


def make_tables(logits: Tensor, valid: Tensor, bits: Bits, factor: float) -> Tables:
    """Computes each token's probabilities of all patterns of each half of a group.

    No logarithm is infinite and no difference cancels: both probabilities of a bit have their own.
    """
    one, zero = bits.signs[:2, None].to(logits.dtype), bits.signs[2].to(logits.dtype)
    signed = torch.addcmul(zero, logits.unsqueeze(1), one, value=factor)
    each, buffer = torch.ops.aten.log_sigmoid_forward(signed)
    logarithms = (each.flatten(1) @ bits.patterns.to(each.dtype)).clamp_min(_LOWEST[each.dtype])
    return Tables(signed, buffer, logarithms, logarithms.exp() * valid.unsqueeze(1))


def gradient(
    tables: Tables, bits: Bits, joint_logarithms: Tensor, token_weight: float, factor: float
) -> Tensor:
    """Returns the gradient of the logits of a block, times the number of all tokens.

    The derivative of ``p * log(p)`` is ``log(p) + 1``; the ones cancel, since probabilities sum
    to 1.
    """
    probabilities, parts = tables.probabilities, []
    sizes = [a * b for a, b in pairs(bits.sizes)]
    halves = pairs(probabilities.split(bits.sizes, dim=1))
    for (first, second), joint in zip(halves, joint_logarithms.split(sizes), strict=True):
        table = joint.view(first.shape[1], second.shape[1])
        parts += [second @ table.T, first @ table]
    slope = torch.cat(parts, dim=1)
    slope = slope.sub_(tables.logarithms, alpha=token_weight).mul_(probabilities)
    patterns = bits.patterns.to(slope.dtype)
    of_each = torch.addmm(bits.signs.to(slope.dtype)[2], slope, patterns.T, beta=0, alpha=factor)
    signed = tables.signed
    of_each = of_each.view_as(signed)
    found: Tensor = torch.ops.aten.log_sigmoid_backward(of_each, signed, tables.buffer)
    return found


def split_blocks(logits: Tensor, group_size: int) -> list[tuple[Bits, list[slice]]]:
    """Returns bits, two groups at a time, and for each the blocks of tokens."""
    if is_traced(logits):  # by sizes that may be free
        every = _group_bits(logits.shape[1], group_size, logits.device)
        return [(bits, [slice(None)]) for bits in every]
    found, number = [], logits.shape[0]
    for bits in _remembered_groups(logits.shape[1], group_size, logits.device):
        step = max(64, _BLOCK // sum(bits.sizes)) if logits.device.type == "cpu" else number
        blocks = [slice(start, start + step) for start in range(0, number, max(1, step))]
        found.append((bits, blocks if len(blocks) > 1 else [slice(None)]))
    return found


def _group_bits(number: int, size: int, device: torch.device) -> list[Bits]:
    """Groups ``number`` bits, each group at most ``size`` consecutive ones."""
    found = []
    for begin in range(0, number, 2 * size):
        end = min(begin + 2 * size, number)
        columns = []
        for start in range(begin, end, size):
            stop = min(start + size, end)
            middle = (start + stop + 1) // 2
            columns += [(start, middle), (middle, stop)]
        blocks = []
        for start, stop in columns:
            code = torch.arange(2 ** (stop - start), device=device)
            bit = code >> torch.arange(stop - start, device=device).unsqueeze(1) & 1
            rest = (0, 0, start - begin, end - stop)
            blocks.append(torch.cat([F.pad(part, rest) for part in (bit, 1 - bit)]).float())
        signs = 1.0 - torch.arange(3, device=device).float()
        patterns, sizes = torch.cat(blocks, dim=1), tuple(block.shape[1] for block in blocks)
        found.append(Bits(slice(begin, end), patterns, sizes, signs[[0, 2, 1]]))
    return found


@functools.lru_cache(maxsize=64)
def _remembered_groups(number: int, size: int, device: torch.device) -> list[Bits]:
    # Tensors made in inference mode could not be used in training later.
    with torch.inference_mode(mode=False):
        return _group_bits(number, size, device)


def pairs(halves: Sequence[_Half]) -> list[tuple[_Half, _Half]]:
    return list(zip(halves[::2], halves[1::2], strict=True))
