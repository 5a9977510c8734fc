"""Gradient of a choice with respect to its logits, by three Triton kernels in a row.

With ``p = softmax(logits / temperature)`` and ``v_j = <g, codes_j>``, it is
``p * (v - sum_j p_j v_j) / temperature``. Neither ``p`` nor a block of it reaches memory.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqprior.functional._kernels._triton_choice_parts import (
    add_shares,
    load_logits,
    load_rows,
    load_top,
    values,
)
from vqprior.functional._kernels._triton_layout import lay_out_codes

# Programs that keep a GPU busy: about two per multiprocessor of the largest GPUs. The device is not
# queried and nothing is autotuned.
_PROGRAMS = 256
# The second pass adds up so many shares at once: more would not fit into its registers.
_MAX_SPLITS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Block sizes of both passes.

    Attributes:
        rows: Tokens per program.
        codes: Codes per block.
        features: Features per product.
        blocks: Blocks of codes that one program loops over.
        splits: Programs that share the codes of one block of rows.
        warps: Groups of 32 threads of a program.
    """

    rows: int
    codes: int
    features: int
    blocks: int
    splits: int
    warps: int


def plan_gradient(n: int, k: int, d: int) -> Plan:
    """Chooses the plan for ``n`` tokens and ``k`` codes of ``d`` features.

    As in the search, 128 threads keep a tile of 64 x 64 products, 32 each, and load at most 32
    features at once; up to 64 features, the gradients of the rows stay in place while codes pass.
    """
    rows = 64 if n > 16 else 16
    codes = min(64, max(16, triton.next_power_of_2(k)))
    every = triton.cdiv(k, codes)
    splits = max(1, min(every, _MAX_SPLITS, _PROGRAMS // triton.cdiv(n, rows)))
    blocks = triton.cdiv(every, splits)
    return Plan(
        rows=rows,
        codes=codes,
        features=16 if d <= 16 else 32,
        blocks=blocks,
        splits=triton.cdiv(every, blocks),
        # Rows that do not start at multiples of 16 are read entry by entry: 128 threads would need
        # more registers for the addresses than they have.
        warps=4 if k % 16 == 0 else 8,
    )


def gradient(
    grad: Tensor, logits: Tensor, codes: Tensor, indices: Tensor, temperature: float
) -> Tensor:
    """Computes the gradient of ``logits``, in their dtype, from that of the chosen vectors.

    Products are sums in float32 of factors that are not rounded. Codes that are not finite count as
    zeros. The result is the same in each call, and the host is not synchronized.

    Args:
        grad: Gradient of the vectors in float16, bfloat16 or float32, with any strides.
        logits: In float16, bfloat16 or float32, with any strides.
        codes: In float16, bfloat16 or float32, with any strides.
        indices: Where each row of ``logits`` is largest, as ``int64``.
        temperature: Greater than 0.

    Shape:
        - ``grad``: ``(n, d)``
        - ``logits``: ``(n, k)``
        - ``codes``: ``(k, d)``
        - ``indices``: ``(n,)``
        - returns: ``(n, k)``
    """
    (n, d), k = grad.shape, len(codes)
    result = logits.new_empty((n, k))
    if n == 0:
        return result
    plan = plan_gradient(n, k, d)
    # Values that float32 holds wait in the result; others would be rounded, and are computed again.
    keep = logits.dtype == torch.float32
    with torch.cuda.device_of(logits):
        dtype = torch.promote_types(grad.dtype, codes.dtype)
        if dtype == torch.bfloat16 and not codes.is_cuda:
            dtype = torch.float32  # the interpreter cannot multiply bfloat16
        table = lay_out_codes(codes, plan.features, plan.codes, dtype)
        sums = logits.new_empty((2, plan.splits, n), dtype=torch.float32)
        arguments = (
            *(result, sums, logits, indices, grad, table, n, k, 1.0 / float(temperature)),
            *(logits.stride() + indices.stride() + grad.stride()),
            *(table.shape[1], plan.blocks),
        )
        shares = {"splits": plan.splits, "shares": triton.next_power_of_2(plan.splits)}
        for kernel, options in ((_weigh, {}), (_spread, shares)):
            kernel[(triton.cdiv(n, plan.rows), plan.splits)](
                *arguments,
                d=d,
                rows=plan.rows,
                codes=plan.codes,
                features=plan.features,
                keep=keep,
                num_warps=plan.warps,
                num_stages=3,
                enable_fp_fusion=True,  # Triton announced that this default will change
                **options,
            )
    return result


@triton.jit(do_not_specialize=["n", "blocks"])
def _weigh(  # noqa: PLR0913
    result: tl.tensor,
    sums: tl.tensor,
    logits: tl.tensor,
    indices: tl.tensor,
    grad: tl.tensor,
    table: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    sharpness: tl.tensor,
    stride_n: tl.tensor,
    stride_k: tl.tensor,
    stride_index: tl.tensor,
    stride_row: tl.tensor,
    stride_d: tl.tensor,
    width: tl.tensor,
    blocks: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    codes: tl.constexpr,
    features: tl.constexpr,
    keep: tl.constexpr,
) -> None:
    """Sums chances, and chances times values, of one block of rows over a share of the codes.

    The maximum of a row is known from the choice, so no sum has to be scaled again.
    """
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    code = tl.arange(0, codes)
    inside = row < n
    row_logits = logits + row * stride_n
    top = load_top(row_logits, indices + row * stride_index, stride_k, inside)
    grad_rows = grad + row[:, None] * stride_row
    left = load_rows(grad_rows, table, 0, stride_d, inside, d, features)
    right = load_rows(grad_rows, table, features, stride_d, inside, d, features)
    total = tl.zeros((rows,), tl.float32)
    mean = tl.zeros((rows,), tl.float32)
    first = tl.program_id(1) * blocks * codes
    for start in range(first, tl.minimum(first + blocks * codes, k), codes):
        here = start + code
        exists = inside[:, None] & (here < k)[None, :]
        value = values(
            left, right, grad_rows, table, here, width, stride_d, inside, d, rows, codes, features
        )
        # Loaded before the product, they would not fit into registers.
        logit = load_logits(row_logits, here, stride_k, exists)
        chance = tl.exp((logit - top[:, None]) * sharpness)
        total += tl.sum(chance, axis=1)
        mean += tl.sum(chance * value, axis=1)
        if keep:
            tl.store(result + row[:, None] * k + here[None, :], value, mask=exists)
    share = sums + tl.program_id(1).to(tl.int64) * n + row
    tl.store(share, total, mask=inside)
    tl.store(share + tl.num_programs(1).to(tl.int64) * n, mean, mask=inside)


@triton.jit(do_not_specialize=["n", "blocks"])
def _spread(  # noqa: PLR0913
    result: tl.tensor,
    sums: tl.tensor,
    logits: tl.tensor,
    indices: tl.tensor,
    grad: tl.tensor,
    table: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    sharpness: tl.tensor,
    stride_n: tl.tensor,
    stride_k: tl.tensor,
    stride_index: tl.tensor,
    stride_row: tl.tensor,
    stride_d: tl.tensor,
    width: tl.tensor,
    blocks: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    codes: tl.constexpr,
    features: tl.constexpr,
    keep: tl.constexpr,
    splits: tl.constexpr,
    shares: tl.constexpr,
) -> None:
    """Writes the gradient of one block of rows and a share of the codes."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    code = tl.arange(0, codes)
    inside = row < n
    row_logits = logits + row * stride_n
    top = load_top(row_logits, indices + row * stride_index, stride_k, inside)
    total = tl.where(inside, add_shares(sums, row, inside, n, splits, shares), 1.0)
    mean = add_shares(sums + splits * n.to(tl.int64), row, inside, n, splits, shares) / total
    factor = sharpness / total
    grad_rows = grad + row[:, None] * stride_row
    if not keep:
        left = load_rows(grad_rows, table, 0, stride_d, inside, d, features)
        right = load_rows(grad_rows, table, features, stride_d, inside, d, features)
    first = tl.program_id(1) * blocks * codes
    for start in range(first, tl.minimum(first + blocks * codes, k), codes):
        here = start + code
        exists = inside[:, None] & (here < k)[None, :]
        target = result + row[:, None] * k + here[None, :]
        if keep:
            value = tl.load(target, mask=exists, other=0.0)
        else:
            value = values(
                left,
                right,
                grad_rows,
                table,
                here,
                width,
                stride_d,
                inside,
                d,
                rows,
                codes,
                features,
            )
        logit = load_logits(row_logits, here, stride_k, exists)
        chance = tl.exp((logit - top[:, None]) * sharpness)
        change = chance * (value - mean[:, None]) * factor[:, None]
        tl.store(target, change.to(result.dtype.element_ty), mask=exists)
