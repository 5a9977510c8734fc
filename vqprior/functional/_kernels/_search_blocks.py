"""Search by plain operators, in blocks of the score matrix."""

import functools

import numpy as np
import torch
from torch import Tensor

# 8 MiB of float32: the minimum reads a block while it is still in the cache. Products smaller than
# about a thousand codes by thousands of tokens do not reach the full rate.
_MAX_BLOCK_ENTRIES = 1 << 21
_MAX_BLOCK_CODES = 1024
# `amin` is vectorized and `argmin` is not, so `argmin` runs only within the group with the minimum.
_GROUP = 64
# Beyond this multiple of the codes' scale, a score could overflow.
_FAR = 1e30


def search_around_zero(x: Tensor, keys: Tensor, bias: Tensor) -> Tensor | None:
    """Returns ``argmin_k bias[k] - 2 <x, keys[k]>`` ``(n,)``, or None if a product overflows.

    Without shift and scale, on the CPU, for one codebook: ``x`` ``(n, d)``, ``keys`` ``(k, d)``,
    ``bias`` ``(k,)``, all in one dtype. Ties go to the lowest index.
    """
    (n, d), k = x.shape, len(keys)
    group = min(_GROUP, k, _MAX_BLOCK_CODES)
    keys, bias = (part.squeeze(0) for part in _fill_up(keys[None], bias[None], -k % group))
    num_codes = min(len(keys), _MAX_BLOCK_CODES // group * group)
    num_rows = max(1, min(n, _MAX_BLOCK_ENTRIES // max(num_codes, d)))
    scores = keys.new_empty(num_rows * num_codes)
    found = []
    for rows in _blocks(n, num_rows):
        best = index = None
        for columns in _blocks(len(keys), num_codes):
            part, some = x[rows], keys[columns]
            out = scores[: len(part) * len(some)].view(1, len(part), -1)
            # As for several codebooks: other products may round differently.
            torch.baddbmm(bias[None, None, columns], part[None], some.T[None], alpha=-2.0, out=out)
            groups = out.view(-1, group)
            minima = groups.amin(dim=1).view(len(part), -1)
            # The lowest is NaN or infinite if any is.
            if len(part) and not np.isfinite(minima.numpy().min()):
                return None
            first = _take_first(groups, minima)
            if len(keys) == num_codes:
                index = first
                continue
            value = minima.amin(dim=1)
            if best is None or index is None:
                best, index = value, first
            else:
                closer = value < best
                index = torch.where(closer, first + columns.start, index)
                best = torch.where(closer, value, best)
        found.append(index)
    return found[0] if len(found) == 1 else torch.cat([x.new_empty(0, dtype=torch.int64), *found])


def _take_first(groups: Tensor, minima: Tensor) -> Tensor:
    """Returns the place of the lowest score of each row: the best group, then the best within."""
    group = minima.argmin(dim=1)
    members = groups.index_select(0, group + _first_groups(*minima.shape))
    return torch.add(members.argmin(dim=1), group, alpha=groups.shape[1])


@functools.lru_cache(maxsize=16)
def _first_groups(rows: int, of_row: int) -> Tensor:
    with torch.inference_mode(mode=False):  # kept for calls outside of it
        return torch.arange(0, rows * of_row, of_row)


def search_blocks(
    x: Tensor, keys: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, num_nearest: int
) -> Tensor:
    """Returns ``argmin_k bias[k] - 2 <(x - shift) * scale, keys[k]>``, ``(q, n, m)``, best first.

    Args:
        x: Vectors ``(q, n, d)``.
        keys: Prepared codes ``(q, k, d)``, in the dtype of the computation.
        bias: Added to each product ``(q, k)``.
        shift: Subtracted from every vector ``(q, d)``.
        scale: Factor of every difference ``(q,)``.
        num_nearest: Number of indices per vector, ``m``.
    """
    (q, n, d), k = x.shape, keys.shape[1]
    group = min(_GROUP, k, _MAX_BLOCK_CODES)
    keys, bias = _fill_up(keys, bias, -k % group)
    num_codes = min(keys.shape[1], _MAX_BLOCK_CODES // group * group)
    num_rows = max(1, min(n, _MAX_BLOCK_ENTRIES // (q * max(num_codes, d))))
    tokens, scores = keys.new_empty(q * num_rows * d), keys.new_empty(q * num_rows * num_codes)
    minima = keys.new_empty(scores.numel() // group)
    found = x.new_empty(q, n, num_nearest, dtype=torch.int64)
    for rows in _blocks(n, num_rows):
        part = x[:, rows]
        block = torch.sub(part, shift.unsqueeze(1), out=tokens[: part.numel()].view(part.shape))
        block.mul_(scale[:, None, None]).clamp_(-_FAR, _FAR)
        best = keys.new_full((q * part.shape[1], num_nearest), torch.inf)
        nearest = torch.zeros_like(best, dtype=torch.int64)
        for columns in _blocks(keys.shape[1], num_codes):
            some = keys[:, columns]
            size = part.shape[1] * q * some.shape[1]
            out = scores[:size].view(q, part.shape[1], -1)
            torch.baddbmm(bias[:, None, columns], block, some.mT, alpha=-2.0, out=out)
            minimum = minima[: size // group].view(len(best), -1)
            _take_best(out.flatten(0, 1), minimum, columns.start, best, nearest)
        if num_nearest > 1:  # a code of infinite bias must not fill the last places
            nearest = torch.where(best < torch.inf, nearest, nearest[:, :1])
        found[:, rows] = nearest.view(q, -1, num_nearest)
    return found


def _fill_up(keys: Tensor, bias: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """Pads the keys to whole groups with keys of infinite bias, which never win."""
    if missing == 0:
        return keys, bias
    bias = torch.cat([bias, bias.new_full((len(bias), missing), torch.inf)], dim=1)
    return torch.cat([keys, keys.new_zeros(len(keys), missing, keys.shape[2])], dim=1), bias


def _blocks(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _take_best(scores: Tensor, minima: Tensor, start: int, best: Tensor, found: Tensor) -> None:
    """Merges a block of scores into the sorted lists ``best`` and ``found`` ``(rows, m)``.

    Finds the group with the minimum first, then the code within the group. ``minima`` is scratch
    space ``(rows, groups)``; ``scores`` is overwritten.
    """
    groups = scores.view(minima.numel(), -1)
    torch.amin(groups, dim=1, out=minima.view(-1))
    first = torch.arange(0, minima.numel(), minima.shape[1], device=scores.device)
    for place in range(min(found.shape[1], scores.shape[1])):
        value, group = minima.min(dim=1)
        members = groups.index_select(0, first + group)
        member = members.argmin(dim=1)
        _insert(best, found, value, member + group * groups.shape[1] + start)
        if place + 1 < found.shape[1]:
            members.scatter_(1, member.unsqueeze(1), torch.inf)
            groups.index_copy_(0, first + group, members)
            minima.scatter_(1, group.unsqueeze(1), members.amin(dim=1, keepdim=True))


def _insert(best: Tensor, found: Tensor, value: Tensor, index: Tensor) -> None:
    """Inserts one candidate per row into the sorted lists, after equal values."""
    closer = torch.zeros_like(value, dtype=torch.bool)
    for place in range(best.shape[1]):
        # Everything after the place of insertion moves by one, equal values too.
        closer = closer | (value < best[:, place])
        best[:, place], value = (
            torch.where(closer, value, best[:, place]),
            torch.where(closer, best[:, place], value),
        )
        found[:, place], index = (
            torch.where(closer, index, found[:, place]),
            torch.where(closer, found[:, place], index),
        )
