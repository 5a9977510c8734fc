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
    found = [x.new_empty(0, dtype=torch.int64)]
    for rows in _blocks(n, num_rows):
        nearest = _nearest_of(x[rows], keys, bias, group, num_codes, scores)
        if nearest is None:
            return None
        found.append(nearest)
    return found[1] if len(found) == 2 else torch.cat(found)


def _nearest_of(
    x: Tensor, keys: Tensor, bias: Tensor, group: int, num_codes: int, scores: Tensor
) -> Tensor | None:
    """As above for one block of rows; ``scores`` is scratch space."""
    best, index = keys.new_empty(0), None
    for columns in _blocks(len(keys), num_codes):
        some = keys[columns]
        out = scores[: len(x) * len(some)].view(1, len(x), -1)
        # As for several codebooks: other products may round differently.
        torch.baddbmm(bias[None, None, columns], x[None], some.T[None], alpha=-2.0, out=out)
        groups = out.view(-1, group)
        minima = groups.amin(dim=1).view(len(x), -1)
        if not np.isfinite(minima.numpy().min()):  # which is NaN if any is
            return None
        here = _take_first(groups, minima)
        if len(keys) == num_codes:
            return here
        value = minima.amin(dim=1)
        closer = value < best if index is not None else None
        index = here if closer is None else torch.where(closer, here + columns.start, index)
        best = value if closer is None else torch.where(closer, value, best)
    return index


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
