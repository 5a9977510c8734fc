"""Per-code sums and counts by one Triton kernel, which reads each vector once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 2048  # per program: each of the 128 threads has 16 loads in flight
# Additions to one address wait for each other: where more vectors than this meet a code on
# average, programs take turns between several tables. Codes are never equally used, so that the
# most used one gets many times as much.
_VECTORS_PER_CODE = 64
_MAX_TABLES = 16


def count_tables(n: int, num_codes: int) -> int:
    """Returns how many tables the sums of ``n`` vectors should share: a power of two."""
    wanted = max(1, min(_MAX_TABLES, n // (_VECTORS_PER_CODE * num_codes)))
    return 1 << (wanted.bit_length() - 1)


def add_statistics_(totals: Tensor, x: Tensor, indices: Tensor) -> None:
    """Adds each vector to the sum of its code, and 1 to the count.

    Uses float32 atomic additions, whose order, and so the last bits of a sum, differs between
    calls, as with ``index_add_`` on a GPU. Counts are exact up to 2^24.

    Args:
        totals: Sums in the first ``d`` columns, counts in the last; float32 and contiguous. With
            several tables, each vector is added to one of them.
        x: Vectors in float16, bfloat16 or float32, with any strides; ``d`` may be 0.
        indices: The index of each vector's code, as ``int64``; vectors with a negative index are
            ignored.

    Shape:
        - ``totals``: ``(k, d + 1)``, or ``(t, k, d + 1)``
        - ``x``: ``(n, d)``
        - ``indices``: ``(n,)``
    """
    totals = totals if totals.ndim == 3 else totals.unsqueeze(0)
    add_to_tables_(totals[None, ..., :-1], totals[None, ..., -1], x[None], indices[None])


def add_to_tables_(sums: Tensor, counts: Tensor, x: Tensor, indices: Tensor) -> None:
    """Adds as ``add_statistics_`` for ``q`` codebooks at once, to one of ``t`` tables of each.

    Shape:
        - ``sums``: ``(q, t, k, d)``
        - ``counts``: ``(q, t, k)``
        - ``x``: ``(q, n, d)``
        - ``indices``: ``(q, n)``
    """
    q, n, d = x.shape
    if q * n == 0:
        return
    features = min(128, triton.next_power_of_2(max(1, d)))
    rows = _ENTRIES // features
    with torch.cuda.device_of(x):
        _add[(triton.cdiv(n, rows), triton.cdiv(max(1, d), features), q)](
            sums,
            counts,
            x,
            indices,
            n,
            counts.shape[2],
            counts.shape[1],
            *sums.stride()[:3],
            *counts.stride(),
            *x.stride(),
            *indices.stride(),
            d=d,
            rows=rows,
            features=features,
            num_warps=4,
            enable_fp_fusion=True,  # nothing to fuse, but Triton 3.9 warns if this is not set
        )


@triton.jit(do_not_specialize=["n", "k"])
def _add(  # noqa: PLR0913
    sums: tl.tensor,
    counts: tl.tensor,
    x: tl.tensor,
    indices: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    tables: tl.tensor,
    stride_sums: tl.tensor,
    stride_table: tl.tensor,
    stride_sum: tl.tensor,
    stride_counts: tl.tensor,
    stride_counts_table: tl.tensor,
    stride_count: tl.tensor,
    stride_x: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    stride_indices: tl.tensor,
    stride_index: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    features: tl.constexpr,
) -> None:
    """Adds one block of rows and features; programs of the first block of features also count."""
    codebook = tl.program_id(2).to(tl.int64)
    table = (tl.program_id(0) % tables).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    feature = tl.program_id(1) * features + tl.arange(0, features)
    names = indices + codebook * stride_indices + row * stride_index
    index = tl.load(names, mask=row < n, other=-1)
    # An index out of range must not write outside of the table.
    valid = (index >= 0) & (index < k)
    mask = valid[:, None] & (feature < d)[None, :]
    places = x + codebook * stride_x + row[:, None] * stride_n
    places += feature[None, :].to(tl.int64) * stride_d
    value = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    target = sums + codebook * stride_sums + table * stride_table + index * stride_sum
    tl.atomic_add(target[:, None] + feature[None, :], value, mask=mask, sem="relaxed")
    if tl.program_id(1) == 0:
        one = tl.full((rows,), 1.0, tl.float32)
        place = counts + codebook * stride_counts + table * stride_counts_table
        tl.atomic_add(place + index * stride_count, one, mask=valid, sem="relaxed")
