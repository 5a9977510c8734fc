"""Per-code sums and counts by one Triton kernel, which reads each vector once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 2048  # per program: each of the 128 threads has 16 loads in flight


def add_statistics_(totals: Tensor, x: Tensor, indices: Tensor) -> None:
    """Adds each vector to the sum of its code, and 1 to the count.

    Uses float32 atomic additions, whose order, and so the last bits of a sum, differs between
    calls, as with ``index_add_`` on a GPU. Counts are exact up to 2^24.

    Args:
        totals: Sums in the first ``d`` columns, counts in the last; float32 and contiguous.
        x: Vectors in float16, bfloat16 or float32, with any strides; ``d`` may be 0.
        indices: The index of each vector's code, as ``int64``; vectors with a negative index are
            ignored.

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
            enable_fp_fusion=True,  # nothing to fuse, but Triton 3.9 warns if this is not set
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
    """Adds one block of rows and features; programs of the first block of features also count."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    feature = tl.program_id(1) * features + tl.arange(0, features)
    index = tl.load(indices + row * stride_index, mask=row < n, other=-1)
    # An index out of range must not write outside of `totals`.
    valid = (index >= 0) & (index < k)
    target = totals + index * (d + 1)
    mask = valid[:, None] & (feature < d)[None, :]
    places = x + row[:, None] * stride_n + feature[None, :].to(tl.int64) * stride_d
    value = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(target[:, None] + feature[None, :], value, mask=mask, sem="relaxed")
    if tl.program_id(1) == 0:
        one = tl.full((rows,), 1.0, tl.float32)
        tl.atomic_add(target + d, one, mask=valid, sem="relaxed")
