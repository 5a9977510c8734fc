"""Rounding to levels, and its gradient, each by one Triton kernel that reads every feature once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 1024  # per program: each of the 128 threads has 8 loads in flight


def round_to_levels(
    x: Tensor,
    mask: Tensor | None,
    bounds: Tensor,
    strides: Tensor,
    symmetric: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    """Rounds vectors to codes, in the dtype of ``x``, and joins their digits to indices.

    Tokens that are masked or have a non-finite feature get zeros and the index -1.

    Args:
        x: Vectors in float16, bfloat16 or float32, with any strides.
        mask: True for real tokens, or None.
        bounds: The fields of ``Bounds``, float32 and contiguous.
        strides: What a 1 in each digit adds to an index, ``int64``.
        symmetric: Whether a code is ``digit / middle - 1``, not ``(digit - middle) / middle``.

    Shape:
        - ``x``: ``(n, d)``
        - ``mask``: ``(n,)``
        - ``bounds``: ``(7, d)``
        - ``strides``: ``(d,)``
        - returns: ``(n, d)`` and ``(n,)``
    """
    n, d = x.shape
    codes, indices = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        strides.new_empty(n),
    )
    if n > 0:
        grid, sizes = _plan(n, d)
        with torch.cuda.device_of(x):
            _round[grid](
                x,
                indices if mask is None else mask,
                bounds,
                strides,
                codes,
                indices,
                n,
                *x.stride(),
                0 if mask is None else mask.stride(0),
                **sizes,
                masked=mask is not None,
                symmetric=symmetric,
            )
    return codes, indices


def levels_gradient(grad: Tensor, x: Tensor, indices: Tensor, bounds: Tensor) -> Tensor:
    """Returns the gradient of ``x`` from that of the codes; zeros where an index is -1."""
    n, d = x.shape
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    if n > 0:
        grid, sizes = _plan(n, d)
        with torch.cuda.device_of(x):
            _pass_gradient[grid](
                grad, x, indices, bounds, found, n, *grad.stride(), *x.stride(), **sizes
            )
    return found


def _plan(n: int, d: int) -> tuple[tuple[int], dict[str, int | bool]]:
    features = triton.next_power_of_2(d)
    rows = max(1, _ENTRIES // features)
    sizes = {"d": d, "rows": rows, "features": features}
    return (triton.cdiv(n, rows),), {**sizes, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["n"])
def _round(  # noqa: PLR0913
    x: tl.tensor,
    mask: tl.tensor,
    bounds: tl.tensor,
    strides: tl.tensor,
    codes: tl.tensor,
    indices: tl.tensor,
    n: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    stride_mask: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    features: tl.constexpr,
    masked: tl.constexpr,
    symmetric: tl.constexpr,
) -> None:
    """Rounds one block of vectors."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    feature = tl.arange(0, features)
    inside, exists = row < n, feature < d
    both = inside[:, None] & exists[None, :]
    places = x + row[:, None] * stride_n + feature[None, :].to(tl.int64) * stride_d
    value = tl.load(places, mask=both, other=0.0).to(tl.float32)
    # Comparisons with NaN are false.
    valid = tl.min((tl.abs(value) < float("inf")).to(tl.int32), axis=1) > 0
    if masked:
        valid = valid & (tl.load(mask + row * stride_mask, mask=inside, other=0) != 0)
    shift = tl.load(bounds + feature, mask=exists, other=0.0)
    half = tl.load(bounds + d + feature, mask=exists, other=0.0)
    start = tl.load(bounds + 2 * d + feature, mask=exists, other=0.0)
    last = tl.load(bounds + 3 * d + feature, mask=exists, other=0.0)
    middle = tl.load(bounds + 4 * d + feature, mask=exists, other=1.0)
    inner = tl.where(valid[:, None], value, 0.0) + shift[None, :]
    left = tl.exp(-2.0 * tl.abs(inner))
    size = (1.0 - left) / (1.0 + left)
    inner = tl.where(inner < 0.0, -size, size)
    digit = tl.ceil(half[None, :] * inner + start[None, :])
    digit = tl.minimum(tl.maximum(digit, 0.0), last[None, :])
    # The division rounds as that of `decode` does.
    if symmetric:
        code = tl.div_rn(digit, tl.broadcast_to(middle[None, :], (rows, features))) - 1.0
    else:
        above = digit - middle[None, :]
        code = tl.div_rn(above, tl.broadcast_to(middle[None, :], (rows, features)))
    code = tl.where(valid[:, None], code, 0.0).to(codes.dtype.element_ty)
    tl.store(codes + row[:, None] * d + feature[None, :], code, mask=both)
    stride = tl.load(strides + feature, mask=exists, other=0)
    index = tl.sum(digit.to(tl.int64) * stride[None, :], axis=1)
    tl.store(indices + row, tl.where(valid, index, -1), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _pass_gradient(  # noqa: PLR0913
    grad: tl.tensor,
    x: tl.tensor,
    indices: tl.tensor,
    bounds: tl.tensor,
    found: tl.tensor,
    n: tl.tensor,
    grad_n: tl.tensor,
    grad_d: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    features: tl.constexpr,
) -> None:
    """Computes the gradient of one block of vectors."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    feature = tl.arange(0, features)
    inside, exists = row < n, feature < d
    both = inside[:, None] & exists[None, :]
    valid = tl.load(indices + row, mask=inside, other=-1) >= 0
    read = both & valid[:, None]
    wide = feature[None, :].to(tl.int64)
    value = tl.load(x + row[:, None] * stride_n + wide * stride_d, mask=read, other=0.0)
    given = tl.load(grad + row[:, None] * grad_n + wide * grad_d, mask=read, other=0.0)
    shift = tl.load(bounds + feature, mask=exists, other=0.0)
    slope = tl.load(bounds + 5 * d + feature, mask=exists, other=0.0)
    # The derivative of tanh, which a difference of 1 and a square would cancel.
    left = tl.exp(-2.0 * tl.abs(value.to(tl.float32) + shift[None, :]))
    steep = 4.0 * left / ((1.0 + left) * (1.0 + left))
    passed = given.to(tl.float32) * slope[None, :] * steep
    passed = tl.where(valid[:, None], passed, 0.0)
    tl.store(found + row[:, None] * d + feature[None, :], passed, mask=both)
