"""Counts and sums as one kernel: each vector is read once and nothing else is stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 2048  # of a program: 16 for each thread are in flight at once


def add_statistics_(totals: Tensor, x: Tensor, indices: Tensor) -> None:
    """Adds each vector to the sum of its code, and 1 to the count.

    In float32, by atomic additions: the order, and with it the last bits of a sum, differs from
    call to call, exactly as with ``index_add_`` on a GPU. Counts are exact up to 2^24.

    Args:
        totals: Sums in the first ``d`` columns, counts in the last; float32 and contiguous.
        x: Vectors in float16, bfloat16 or float32, with any strides; ``d`` may be 0.
        indices: The code of each vector, as ``int64``; a negative one leaves a vector out,
            whatever it holds.

    Shape:
        - ``totals``: ``(k, d + 1)``
        - ``x``: ``(n, d)``
        - ``indices``: ``(n,)``
    """
    n, d = x.shape
    if n == 0:
        return
    features = min(128, triton.next_power_of_2(max(1, d)))
    rows = _ENTRIES // features
    with torch.cuda.device_of(x):
        _add[(triton.cdiv(n, rows), triton.cdiv(max(1, d), features))](
            totals,
            x,
            indices,
            n,
            len(totals),
            *x.stride(),
            indices.stride(0),
            d=d,
            rows=rows,
            features=features,
            num_warps=4,
            enable_fp_fusion=True,  # nothing to fuse: Triton 3.9 warns who does not say
        )


@triton.jit(do_not_specialize=["n", "k"])
def _add(  # noqa: PLR0913
    totals: tl.tensor,
    x: tl.tensor,
    indices: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    stride_index: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    features: tl.constexpr,
) -> None:
    """Adds one block of rows and features; the first block of features counts."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    feature = tl.program_id(1) * features + tl.arange(0, features)
    index = tl.load(indices + row * stride_index, mask=row < n, other=-1)
    # An index that names no code must not write to memory that belongs to something else.
    valid = (index >= 0) & (index < k)
    target = totals + index * (d + 1)
    mask = valid[:, None] & (feature < d)[None, :]
    places = x + row[:, None] * stride_n + feature[None, :].to(tl.int64) * stride_d
    value = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(target[:, None] + feature[None, :], value, mask=mask, sem="relaxed")
    if tl.program_id(1) == 0:
        one = tl.full((rows,), 1.0, tl.float32)
        tl.atomic_add(target + d, one, mask=valid, sem="relaxed")
