"""Codes laid out for products, by one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CODES = 32  # per program: few, so that small codebooks keep many multiprocessors busy


def lay_out_codes(codes: Tensor, features: int, block: int, dtype: torch.dtype) -> Tensor:
    """Returns codes ``(k, d)`` as ``(d, k)``, for products that take whole blocks.

    Both sizes are filled up with zeros, to multiples of ``features`` and ``block``. Codes with a
    feature that is not finite become zeros too. With codes contiguous, a warp reads the operands of
    a product without bank conflicts.

    The codes are in float16, bfloat16 or float32, with any strides; ``dtype`` is as wide.
    """
    k, d = codes.shape
    table = codes.new_empty((d + -d % features, k + -k % block), dtype=dtype)
    _lay_out[(triton.cdiv(table.shape[1], _CODES),)](
        codes,
        table,
        k,
        table.shape[1],
        *codes.stride(),
        d=d,
        padded=table.shape[0],
        rows=_CODES,
        features=min(64, triton.next_power_of_2(table.shape[0])),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return table


@triton.jit(do_not_specialize=["k"])
def _lay_out(  # noqa: PLR0913
    codes: tl.tensor,
    table: tl.tensor,
    k: tl.tensor,
    width: tl.tensor,
    stride_k: tl.tensor,
    stride_d: tl.tensor,
    d: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    features: tl.constexpr,
) -> None:
    """Lays out one block of codes."""
    code = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    feature = tl.arange(0, features)
    largest = tl.zeros((rows, features), tl.float32)
    for begin in range(0, d, features):
        here = begin + feature
        exists = (code < k)[:, None] & (here < d)[None, :]
        places = codes + code[:, None] * stride_k + here[None, :].to(tl.int64) * stride_d
        size = tl.abs(tl.load(places, mask=exists, other=0.0).to(tl.float32))
        # NaN is not below infinity, and no maximum has to keep it.
        largest = tl.maximum(largest, tl.where(size < float("inf"), 0.0, 1.0))
    finite = tl.max(largest, axis=1) == 0.0
    for begin in range(0, padded, features):
        here = begin + feature
        exists = (finite & (code < k))[:, None] & (here < d)[None, :]
        places = codes + code[:, None] * stride_k + here[None, :].to(tl.int64) * stride_d
        value = tl.load(places, mask=exists, other=0.0)
        target = table + here[None, :].to(tl.int64) * width + code[:, None]
        inside = (code < width)[:, None] & (here < padded)[None, :]
        tl.store(target, value.to(table.dtype.element_ty), mask=inside)
