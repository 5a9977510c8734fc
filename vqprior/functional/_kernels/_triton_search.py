"""Search by one Triton kernel; scores stay in registers and never reach memory."""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqprior.functional._kernels._triton_prepare import prepare_table

# Beyond this multiple of the codes' scale, a score could overflow.
_FAR = tl.constexpr(1e30)
_LAST = tl.constexpr(2**31 - 1)
# Programs that keep a GPU busy: about two per multiprocessor of the largest GPUs. The result does
# not depend on it, so the device is not queried and nothing is autotuned.
_PROGRAMS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Block sizes of one search.

    Attributes:
        rows: Vectors per program.
        codes: Codes per block.
        features: Features per product.
        blocks: Blocks of codes that one program loops over.
        splits: Programs that share the codes of a codebook.
        stages: Depth of the pipeline that loads the codes.
    """

    rows: int
    codes: int
    features: int
    blocks: int
    splits: int
    stages: int = 3


def plan_search(q: int, n: int, k: int, d: int) -> Plan:
    """Chooses the plan for ``q`` searches of ``n`` vectors among ``k`` codes of ``d`` features.

    Each of the 128 threads keeps 64 x 64 / 128 = 32 sums, and as many minima and block numbers: 64
    would not fit into its 255 registers. A product loads at most 32 features at once: with 64,
    Triton 3.9 spilled registers for capability 8.0. Up to 64 features, the vectors stay in shared
    memory and only codes are loaded; beyond that both are, so memory does not grow with ``d``.

    In the machine code of Triton 3.7 for capabilities 8.0, 8.6, 8.9 and 9.0, the inner loop spills
    nothing (around it, a ``d`` above 64 that is not a multiple of 16 spills up to 80 bytes), and
    7 to 8 of 10 of its instructions are fused multiply-adds. Shared memory is at most 48 KiB: two
    programs fit on a multiprocessor with 100 KiB; on larger ones, registers allow two or three.
    Three stages load one block while another is multiplied; with two, the product would wait.
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


def nearest_codes(x: Tensor, codes: Tensor, *, euclidean: bool, scale: float | None) -> Tensor:
    """Finds the nearest codes, or those of the largest product, without preparation elsewhere.

    Args:
        x: Vectors in float16, bfloat16 or float32, with any strides.
        codes: Codes in float16, bfloat16 or float32, with any strides.
        euclidean: Whether to compare distances instead of products.
        scale: Factor of vectors and codes, or None for that of ``_location.find_scale``.

    Returns:
        Indices of ``codes``, as ``int64``.

    Shape:
        - ``x``: ``(q, n, d)``
        - ``codes``: ``(q, k, d)``
        - returns: ``(q, n)``
    """
    plan = plan_search(*x.shape[:2], *codes.shape[1:])
    table = prepare_table(
        codes, euclidean=euclidean, scale=scale, block=plan.codes, features=plan.features
    )
    return search_table(x, *table, plan)


def search_table(
    x: Tensor, table: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, plan: Plan
) -> Tensor:
    """Finds ``argmin_k bias[k] - 2 <(x - shift) * scale, keys[k]>`` of each vector: ``(q, n)``.

    Ties go to the lowest index; vectors with a non-finite feature get an arbitrary valid one. The
    result does not depend on the plan, and the host is not synchronized. ``table`` ``(q, d', k')``
    and ``bias`` ``(q, k')`` are padded to whole blocks, by zeros and infinities. Codes lie side by
    side there, so that a warp reads 16 bytes per thread from shared memory without bank conflicts.
    """
    q, n, d = x.shape
    if q * n == 0:
        return x.new_empty((q, n), dtype=torch.int64)
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
            enable_fp_fusion=True,  # Triton announced that this default will change
        )
        if plan.splits == 1:
            return found.squeeze(1)
        first = found.new_empty((q, n))
        _take_first[(triton.cdiv(n, 256), q)](best, found, first, n, plan.splits, num_warps=4)
    return first


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
    """Compares one block of rows with ``blocks`` times ``codes`` keys of one codebook."""
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
    # Each lane of codes keeps its lowest score and where that block starts; lanes are compared only
    # once, at the end. NaN is never lower, so the kept index is always valid.
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
    # A lane keeps the earliest of equal scores; among equal lanes the lowest index wins.
    index = tl.where(lowest == value[:, None], origin + code[None, :], _LAST)
    place = (codebook * tl.num_programs(1) + tl.program_id(1)) * n + row
    tl.store(best + place, value, mask=inside)
    tl.store(found + place, tl.min(index, axis=1).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["n", "splits"])
def _take_first(
    best: tl.tensor, found: tl.tensor, first: tl.tensor, n: tl.tensor, splits: tl.tensor
) -> None:
    """Chooses among the results of programs that shared the codes; the first of equal ones wins."""
    codebook = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * 256 + tl.arange(0, 256)
    inside = row < n
    place = codebook * splits * n + row
    lowest = tl.load(best + place, mask=inside, other=0.0)
    index = tl.load(found + place, mask=inside, other=0)
    for _ in range(1, splits):
        place += n
        value = tl.load(best + place, mask=inside, other=0.0)
        index = tl.where(value < lowest, tl.load(found + place, mask=inside, other=0), index)
        lowest = tl.minimum(value, lowest)
    tl.store(first + codebook * n + row, index, mask=inside)


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
    """Loads a block of features of the rows, shifted, scaled and clamped; zeros beyond ``d``."""
    exists = feature < d
    places = x_rows + feature[None, :].to(tl.int64) * stride_d
    loaded = tl.load(places, mask=inside[:, None] & exists[None, :], other=0.0)
    shifted = loaded.to(tl.float32) - tl.load(shift + feature, mask=exists, other=0.0)[None, :]
    return tl.minimum(tl.maximum(shifted * factor, -_FAR), _FAR)


@triton.jit
def _multiply(
    tile: tl.tensor, keys: tl.tensor, feature: tl.tensor, k: tl.tensor, product: tl.tensor
) -> tl.tensor:
    """Adds the product of a block of features.

    "ieee", a chain of float32 fused multiply-adds, is as exact as plain operators. "tf32x3" drops
    2^-22 of each product and sums in tensor cores, which truncate, so its error grows with ``d``.
    By peak rates, it would be faster only with many features on capabilities 8.0 and 9.0.
    """
    loaded = tl.load(keys + feature[:, None].to(tl.int64) * k)
    return tl.dot(tile, loaded, product, input_precision="ieee")
