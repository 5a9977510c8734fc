"""Arg-max of logits and lookup of the code there, by one Triton kernel that reads each row once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 2048  # per program and step: each of the 128 threads has 16 loads in flight
_LANES = 1024  # a row is read in blocks of so many entries
_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


def choose(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the first of the largest logits of each row, and copies the code there.

    As in ``torch.argmax``, NaN is larger than any number. The host is not synchronized.

    Args:
        logits: In float16, bfloat16 or float32, with any strides; fewer than 2^31 per row.
        codes: In float16, bfloat16 or float32, with any strides.

    Returns:
        Indices, as ``int64``, and the vectors in the dtype of ``codes``, bit for bit.

    Shape:
        - ``logits``: ``(..., k)``
        - ``codes``: ``(k, d)``
        - returns: ``(...)`` and ``(..., d)``, neither of them a view
    """
    *leading, k = logits.shape
    table, d = logits.reshape(-1, k), codes.shape[1]
    n = len(table)
    indices = logits.new_empty(leading, dtype=torch.int64)
    vectors = codes.new_empty((*leading, d))
    if n == 0:
        return indices, vectors
    lanes = min(_LANES, triton.next_power_of_2(k))
    rows = max(1, min(_ENTRIES // lanes, triton.next_power_of_2(n)))
    features = min(_ENTRIES // rows, triton.next_power_of_2(d))
    with torch.cuda.device_of(logits):
        _choose[(triton.cdiv(n, rows),)](
            table,
            codes,
            indices,
            vectors,
            n,
            k,
            *table.stride(),
            *codes.stride(),
            d=d,
            rows=rows,
            lanes=lanes,
            features=features,
            num_warps=4,
            enable_fp_fusion=True,  # nothing to fuse, but Triton 3.9 warns if this is not set
        )
    return indices, vectors


@triton.jit(do_not_specialize=["n"])
def _choose(  # noqa: PLR0913
    logits: tl.tensor,
    codes: tl.tensor,
    indices: tl.tensor,
    vectors: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    stride_n: tl.tensor,
    stride_k: tl.tensor,
    stride_code: tl.tensor,
    stride_d: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    features: tl.constexpr,
) -> None:
    """Chooses for one block of rows."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    lane = tl.arange(0, lanes)
    inside = row < n
    # Each lane keeps its best key and where that block starts; lanes are compared once, at the end.
    best = tl.full((rows, lanes), _LOWEST, tl.int32)
    origin = tl.zeros((rows, lanes), tl.int32)
    for start in range(0, k, lanes):
        code = start + lane
        exists = inside[:, None] & (code < k)[None, :]
        places = logits + row[:, None] * stride_n + code[None, :].to(tl.int64) * stride_k
        value = tl.load(places, mask=exists, other=0.0).to(tl.float32)
        key = tl.where(exists, _key(value), _LOWEST)
        better = key > best
        best = tl.where(better, key, best)
        origin = tl.where(better, start, origin)
    top = tl.max(best, axis=1)
    # A lane keeps the earliest of equal keys; among equal lanes the lowest index wins.
    found = tl.min(tl.where(best == top[:, None], origin + lane[None, :], _HIGHEST), axis=1)
    index = tl.where(inside, found, 0).to(tl.int64)  # rows beyond the last have none
    tl.store(indices + row, index, mask=inside)
    feature = tl.arange(0, features)
    for begin in range(0, d, features):
        here = begin + feature
        wanted = inside[:, None] & (here < d)[None, :]
        source = codes + index[:, None] * stride_code + here[None, :].to(tl.int64) * stride_d
        target = vectors + row[:, None] * d + here[None, :]
        tl.store(target, tl.load(source, mask=wanted), mask=wanted)


@triton.jit
def _key(value: tl.tensor) -> tl.tensor:
    """Returns integers in the order of the floats: both zeros alike, NaN above infinity."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value != value, _HIGHEST, ordered)
