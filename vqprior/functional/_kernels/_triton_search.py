"""The search as one kernel: a block of scores lives in registers and never reaches memory."""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

# A token further away than this many times the codes' own scale could overflow a score.
_FAR = tl.constexpr(1e30)
_LAST = tl.constexpr(2**31 - 1)
# Programs that keep a GPU busy: two for each multiprocessor of the largest ones. The result does
# not depend on it, so neither the device nor the clock is asked.
_PROGRAMS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How one search is cut up.

    Attributes:
        rows: Vectors that one program holds.
        codes: Codes that it compares with them at a time.
        features: Features that it multiplies at a time.
        blocks: Blocks of codes that it goes through, one after the other.
        splits: Programs that share the codes between them.
        stages: Depth of the pipeline that fetches the codes.
    """

    rows: int
    codes: int
    features: int
    blocks: int
    splits: int
    stages: int = 3


def plan_search(q: int, n: int, k: int, d: int) -> Plan:
    """Chooses the plan for ``q`` searches of ``n`` vectors among ``k`` codes of ``d`` features.

    A thread of the 128 keeps 64 x 64 / 128 = 32 sums, and as many minima and their blocks: 64
    would not fit into its 255 registers. A product loads its features all at once, so more than 32
    are not left to the compiler to put in order: one of those tried (Triton 3.9 for capability
    8.0) failed and spilled all of 64. Up to 64 features, the vectors stay in shared memory and
    only codes are fetched; beyond, both are, so that any ``d`` needs the same memory.

    The machine code was read, for capabilities 8.0, 8.6, 8.9 and 9.0 by Triton 3.7; no GPU was
    there to time it. The inner loop spills nothing (around it, a ``d`` above 64 that is no
    multiple of 16 spills up to 80 bytes), and 7 to 8 of 10 of its instructions are fused
    multiply-adds. Shared memory is at most 48 KiB: two programs on a multiprocessor of 100 KiB, and
    on the larger ones the two or three that registers allow. Three stages fetch one block while
    another is multiplied; with two, the product would wait.
    """
    rows = 64 if n > 16 else 16
    codes = min(64, max(16, triton.next_power_of_2(k)))
    features = 16 if d <= 16 else 32
    every = triton.cdiv(k, codes)
    # Few vectors make few programs: then they share the codes, and their results are reduced.
    splits = max(1, min(every, _PROGRAMS // max(1, q * triton.cdiv(n, rows))))
    blocks = triton.cdiv(every, splits)
    return Plan(
        rows=rows,
        codes=codes,
        features=features,
        blocks=blocks,
        splits=triton.cdiv(every, blocks),
    )


def nearest(x: Tensor, keys: Tensor, bias: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Finds ``argmin_k bias[k] - 2 <(x - shift) * scale, keys[k]>`` of each vector.

    Ties go to the lowest index; vectors with a non-finite feature get an arbitrary valid one. The
    result does not depend on how the work is divided, and nothing waits for the device. All but
    ``x`` are float32 and contiguous.

    Args:
        x: Vectors in float16, bfloat16 or float32, with any strides.
        keys: What they are compared with; fewer than 2^31 in each codebook.
        bias: Added to each product.
        shift: Subtracted from every vector of a codebook.
        scale: Multiplies every difference, before it is clamped to +-1e30.

    Returns:
        Indices of ``keys``, as ``int64``.

    Shape:
        - ``x``: ``(q, n, d)``
        - ``keys``: ``(q, k, d)``
        - ``bias``: ``(q, k)``
        - ``shift``: ``(q, d)``
        - ``scale``: ``(q,)``
        - returns: ``(q, n)``
    """
    q, n, d = x.shape
    if q * n == 0:
        return x.new_empty((q, n), dtype=torch.int64)
    plan = plan_search(q, n, keys.shape[1], d)
    table, bias = _fill_up(keys, bias, plan)
    best = x.new_empty((q, plan.splits, n), dtype=torch.float32)
    found = x.new_empty((q, plan.splits, n), dtype=torch.int64)
    with torch.cuda.device_of(x):
        _search[(q * triton.cdiv(n, plan.rows), plan.splits)](
            x,
            table,
            bias,
            shift,
            scale,
            best,
            found,
            n,
            *x.stride(),
            table.shape[2],
            plan.blocks,
            d=d,
            rows=plan.rows,
            codes=plan.codes,
            features=plan.features,
            num_warps=4,
            num_stages=plan.stages,
            enable_fp_fusion=True,  # a default that Triton announced to change
        )
    if plan.splits == 1:
        return found.squeeze(1)
    # Not `min(dim)`, which promises no order of equal values.
    others = torch.where(best == best.amin(dim=1, keepdim=True), found, keys.shape[1])
    return others.amin(dim=1)


def _fill_up(keys: Tensor, bias: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Returns keys ``(q, d, k)`` and their bias in whole blocks, the added keys infinitely far.

    With codes side by side, a warp reads 16 bytes a thread without two of them meeting in one bank
    of shared memory; with features side by side up to 16 do, and the product waits for them.
    """
    q, k, d = keys.shape
    missing = -k % plan.codes
    table = keys.new_zeros(q, d + -d % plan.features, k + missing)
    table[:, :d, :k] = keys.mT
    if missing:
        bias = torch.cat([bias, bias.new_full((q, missing), torch.inf)], dim=1)
    return table, bias


@triton.jit(do_not_specialize=["n", "blocks"])
def _search(  # noqa: PLR0913
    x: tl.tensor,
    table: tl.tensor,
    bias: tl.tensor,
    shift: tl.tensor,
    scale: tl.tensor,
    best: tl.tensor,
    found: tl.tensor,
    n: tl.tensor,
    stride_q: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    k: tl.tensor,
    blocks: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    codes: tl.constexpr,
    features: tl.constexpr,
) -> None:
    """Compares one block of rows with one share of one codebook, ``blocks`` times ``codes``."""
    row_blocks = tl.cdiv(n, rows)
    codebook = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = (tl.program_id(0) % row_blocks).to(tl.int64) * rows + tl.arange(0, rows)
    code = tl.arange(0, codes)
    feature = tl.arange(0, features)
    inside = row < n
    x_rows = x + codebook * stride_q + row[:, None] * stride_n
    shift_start = shift + codebook * d
    factor = tl.load(scale + codebook)
    padded: tl.constexpr = (d + features - 1) // features * features
    # Of each lane of codes the lowest score and where its block starts: the lanes are compared with
    # each other only once, at the end. NaN is never lower, so what is kept is always a code.
    lowest = tl.full((rows, codes), float("inf"), tl.float32)
    origin = tl.zeros((rows, codes), tl.int32)
    if d <= 2 * features:
        left = _prepare(x_rows, shift_start, factor, feature, inside, stride_d, d)
        right = left
        if d > features:
            here = features + feature
            right = _prepare(x_rows, shift_start, factor, here, inside, stride_d, d)
    first = tl.program_id(1) * blocks * codes
    for start in range(first, tl.minimum(first + blocks * codes, k), codes):
        keys = table + codebook * padded * k + start + code[None, :]
        product = tl.zeros((rows, codes), tl.float32)
        if d <= 2 * features:
            product = _multiply(left, keys, feature, k, product)
            if d > features:
                product = _multiply(right, keys, features + feature, k, product)
        else:
            for begin in range(0, d, features):
                here = begin + feature
                part = _prepare(x_rows, shift_start, factor, here, inside, stride_d, d)
                product = _multiply(part, keys, here, k, product)
        score = tl.load(bias + codebook * k + start + code)[None, :] - 2.0 * product
        closer = score < lowest
        lowest = tl.where(closer, score, lowest)
        origin = tl.where(closer, start, origin)
    value = tl.min(lowest, axis=1)
    # Equal scores of one lane kept the earliest block; of equal lanes the lowest index wins.
    index = tl.where(lowest == value[:, None], origin + code[None, :], _LAST)
    place = (codebook * tl.num_programs(1) + tl.program_id(1)) * n + row
    tl.store(best + place, value, mask=inside)
    tl.store(found + place, tl.min(index, axis=1).to(tl.int64), mask=inside)


@triton.jit
def _prepare(
    x_rows: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    feature: tl.tensor,
    inside: tl.tensor,
    stride_d: tl.tensor,
    d: tl.constexpr,
) -> tl.tensor:
    """Loads some features of the rows, shifted, scaled and clamped: zeros beyond the last."""
    exists = feature < d
    places = x_rows + feature[None, :].to(tl.int64) * stride_d
    loaded = tl.load(places, mask=inside[:, None] & exists[None, :], other=0.0)
    shifted = loaded.to(tl.float32) - tl.load(shift + feature, mask=exists, other=0.0)[None, :]
    return tl.minimum(tl.maximum(shifted * factor, -_FAR), _FAR)


@triton.jit
def _multiply(
    tile: tl.tensor, keys: tl.tensor, feature: tl.tensor, k: tl.tensor, product: tl.tensor
) -> tl.tensor:
    """Adds the product of some features.

    "ieee", one fused multiply-add after the other in float32, is as exact as plain operators are.
    "tf32x3" leaves out a share of 2^-22 of each product and sums in tensor cores, which cut off
    rather than round, an error that grows with ``d``. By peak rates it would gain nothing where
    tensor cores are small (8.6, 8.9), and speed for many features where they are large (8.0, 9.0).
    """
    loaded = tl.load(keys + feature[:, None].to(tl.int64) * k)
    return tl.dot(tile, loaded, product, input_precision="ieee")
