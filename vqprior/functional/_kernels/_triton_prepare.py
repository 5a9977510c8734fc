"""Preparation of codebooks for the search by one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqprior.functional._location import SAMPLE, step_of

# As in `_search`: beyond this multiple of the usual code's size, products could overflow.
_FAR = tl.constexpr(2.0**40)
_INFINITY = tl.constexpr(float("inf"))
_EXPONENT_BITS = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(2.0**100)
_ROWS = tl.constexpr(SAMPLE)


def prepare_table(
    codes: Tensor, *, euclidean: bool, scale: float | None, block: int, features: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prepares codes as ``functional._search._prepare`` does, in the layout of the search kernel.

    Args:
        codes: Codes in float16, bfloat16 or float32, with any strides.
        euclidean: Whether to subtract the center and to return squared lengths.
        scale: The scale, or None for that of the usual code.
        block: Multiple to which codes are padded; added codes have an infinite bias.
        features: Multiple to which features are padded with zeros; a power of two of at least 16.

    Returns:
        ``table``, ``bias``, ``shift`` and ``scale`` in float32.

    Shape:
        - ``codes``: ``(q, k, d)``
        - returns: ``(q, d', k')``, ``(q, k')``, ``(q, d)`` and ``(q,)``
    """
    q, k, d = codes.shape
    padded_d, padded_k = d + -d % features, k + -k % block
    table = codes.new_empty((q, padded_d, padded_k), dtype=torch.float32)
    bias, shift = (table.new_empty((q, size)) for size in (padded_k, d))
    scales = table.new_empty(q)
    step = step_of(k)
    with torch.cuda.device_of(codes):
        _prepare[(triton.cdiv(padded_k, 64), q)](
            codes,
            table,
            bias,
            shift,
            scales,
            k,
            padded_k,
            *codes.stride(),
            step,
            -(-k // step),
            0.0 if scale is None else scale,
            d=d,
            features=features,
            euclidean=euclidean,
            rows=64,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return table, bias, shift, scales


@triton.jit(do_not_specialize=["k", "step", "count"])
def _prepare(  # noqa: PLR0913
    codes: tl.tensor,
    table: tl.tensor,
    bias: tl.tensor,
    shift: tl.tensor,
    scales: tl.tensor,
    k: tl.tensor,
    padded_k: tl.tensor,
    stride_q: tl.tensor,
    stride_k: tl.tensor,
    stride_d: tl.tensor,
    step: tl.tensor,
    count: tl.tensor,
    given_scale: tl.tensor,
    d: tl.constexpr,
    features: tl.constexpr,
    euclidean: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """Finds center and scale of a codebook, and writes the keys of one block of its codes.

    Every program finds them again from 32 codes, which is cheaper than another launch.
    """
    codebook = tl.program_id(1).to(tl.int64)
    start = codes + codebook * stride_q
    place = tl.arange(0, _ROWS)
    exists = place < count
    some = start + (place * step).to(tl.int64)[None, :] * stride_k
    feature = tl.arange(0, features)
    size = tl.zeros((_ROWS,), tl.float32)
    for begin in range(0, d, features):
        here = begin + feature
        inside = (here < d)[:, None] & exists[None, :]
        tile = tl.load(some + here.to(tl.int64)[:, None] * stride_d, mask=inside, other=0.0)
        tile = tile.to(tl.float32)
        tile = tl.where(tile == tile, tile, _INFINITY)
        size = tl.maximum(size, tl.max(tl.abs(tile), axis=0))
        center = tl.zeros((features,), tl.float32)
        if euclidean:
            ordered = tl.sort(tl.where(exists[None, :], tile, _INFINITY), dim=1)
            median = _at(ordered, count // 2, place)
            low, high = _at(ordered, count // 4, place), _at(ordered, 3 * count // 4, place)
            known = (tl.abs(low) < _INFINITY) & (tl.abs(high) < _INFINITY)
            spread = tl.where(known, high, _INFINITY) - tl.where(known, low, 0.0)
            center = tl.where(tl.abs(median) > spread, median, 0.0)
        # All programs of a codebook write the same numbers.
        tl.store(shift + codebook * d + here, center, mask=here < d)
    usable = (size > 0) & (size < _INFINITY)
    sizes = tl.where(exists, tl.where(usable, size, 1.0), _INFINITY)
    usual = tl.sum(tl.where(place == count // 2, tl.sort(sizes), 0.0))
    usual = tl.minimum(tl.maximum(usual, 1 / _LARGEST), _LARGEST)
    factor = 1 / (usual.to(tl.int32, bitcast=True) & _EXPONENT_BITS).to(tl.float32, bitcast=True)
    factor = tl.where(given_scale > 0, given_scale, factor)
    tl.store(scales + codebook, factor)
    tl.debug_barrier()  # the shift is read by other threads than wrote it

    code = tl.program_id(0) * rows + tl.arange(0, rows)
    real = code < k
    length = tl.zeros((rows,), tl.float32)
    broken = tl.zeros((rows,), tl.int32)
    for begin in range(0, d, features):
        here = begin + feature
        inside = real[:, None] & (here < d)[None, :]
        places = start + code.to(tl.int64)[:, None] * stride_k
        places += here.to(tl.int64)[None, :] * stride_d
        tile = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        finite = tl.abs(tile) < _INFINITY  # not of NaN either
        broken = tl.maximum(broken, tl.max((~finite).to(tl.int32), axis=1))
        center = tl.load(shift + codebook * d + here, mask=here < d, other=0.0)
        keys = (tl.where(finite, tile, 0.0) - center[None, :]) * factor
        keys = tl.where(finite & inside, tl.minimum(tl.maximum(keys, -_FAR), _FAR), 0.0)
        length += tl.sum(keys * keys, axis=1)
        padded: tl.constexpr = (d + features - 1) // features * features
        target = table + (codebook * padded + here)[None, :] * padded_k + code.to(tl.int64)[:, None]
        tl.store(target, keys, mask=(code < padded_k)[:, None])
    value = length if euclidean else tl.zeros((rows,), tl.float32)
    value = tl.where(real & (broken == 0), value, _INFINITY)
    tl.store(bias + codebook * padded_k + code, value, mask=code < padded_k)


@triton.jit
def _at(ordered: tl.tensor, position: tl.tensor, place: tl.tensor) -> tl.tensor:
    """Returns the column at a position."""
    return tl.sum(tl.where(place[None, :] == position, ordered, 0.0), axis=1)
