"""Signs of features, losses and their gradient by Triton kernels; see `_bit_tables.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqprior._precision import without_autocast
from vqprior.functional._kernels._bit_plan import BitPlan
from vqprior.functional._kernels._triton_bit_parts import group_slope, prepare, store_table

_ROWS, _ROWS_BACK = 32, 16  # per program; more would not stay in registers
_TINY = tl.constexpr(2.0**-126)


def sign_bits(x: Tensor, mask: Tensor | None, plan: BitPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes in the dtype of ``x``, indices, and sums over valid tokens.

    The sums are the squared errors and the tokens, and what is to be summed over ranks: the
    ``p * log(p)``, the tokens, and the joint distributions of the bits of each group.
    """
    n = len(x)
    halves = plan.halves() if plan.has_entropy else []
    columns = sum(2**a + 2**b for a, b in halves)
    sums = x.new_zeros(4 + sum(2 ** (a + b) for a, b in halves), dtype=torch.float32)
    codes = torch.empty_like(x, memory_format=torch.contiguous_format)
    indices = x.new_empty(n, dtype=torch.int64)
    tables = x.new_empty((n, columns), dtype=torch.float32)
    if n == 0:
        return codes, indices, sums
    with torch.cuda.device_of(x):
        _sign[(triton.cdiv(n, _ROWS),)](
            x,
            indices if mask is None else mask,
            codes,
            indices,
            tables,
            sums,
            n,
            *x.stride(),
            0 if mask is None else mask.stride(0),
            plan.scale,
            plan.factor,
            columns=columns,
            masked=mask is not None,
            **_sizes(plan),
        )
    first, entry = 0, 4
    for a, b in halves:
        left, right = tables[:, first : first + 2**a], tables[:, first + 2**a :][:, : 2**b]
        size = 2 ** (a + b)
        with without_autocast(x.device.type):
            torch.mm(left.T, right, out=sums[entry : entry + size].view(2**a, 2**b))
        first, entry = first + 2**a + 2**b, entry + size
    return codes, indices, sums


def bit_losses(sums: Tensor, plan: BitPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Returns commitment, entropy and weighted logarithms of joint means, from the sums."""
    commitment, entropy = sums.new_empty(()), sums.new_empty(())
    logarithms = torch.empty_like(sums[4:])
    with torch.cuda.device_of(sums):
        _lose[(1,)](
            sums,
            logarithms,
            commitment,
            entropy,
            sums.numel() - 4,
            plan.weights[0] / plan.bits,
            *plan.weights[1:],
            block=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return commitment, entropy, logarithms


def bits_gradient(
    x: Tensor,
    indices: Tensor,
    sums: Tensor,
    logarithms: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    plan: BitPlan,
) -> Tensor:
    """Returns the gradient of ``x`` from those of the codes, the commitment and the entropy."""
    n = len(x)
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    of_codes, of_commitment, of_entropy = grads
    strides = (0, 0) if of_codes is None else of_codes.stride()
    if n == 0:
        return found
    with torch.cuda.device_of(x):
        _pass_back[(triton.cdiv(n, _ROWS_BACK),)](
            x,
            indices,
            sums,
            logarithms,
            x if of_codes is None else of_codes,
            sums if of_commitment is None else of_commitment,
            sums if of_entropy is None else of_entropy,
            found,
            n,
            *x.stride(),
            *strides,
            plan.scale,
            plan.factor,
            2 * plan.weights[0] / plan.bits,
            plan.weights[1],
            has_codes=of_codes is not None,
            has_commitment=of_commitment is not None,
            **{**_sizes(plan), "rows": _ROWS_BACK, "entropies": of_entropy is not None},
        )
    return found


def _sizes(plan: BitPlan) -> dict[str, int | bool]:
    return {
        "d": plan.bits,
        "rows": _ROWS,
        "features": max(2, triton.next_power_of_2(plan.bits)),
        "group": plan.group,
        "width": max(16, 2 ** ((plan.group + 1) // 2)),
        "sphere": plan.sphere,
        "entropies": plan.has_entropy,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


@triton.jit(do_not_specialize=["n"])
def _sign(  # noqa: PLR0913
    x: tl.tensor,
    mask: tl.tensor,
    codes: tl.tensor,
    indices: tl.tensor,
    tables: tl.tensor,
    sums: tl.tensor,
    n: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    stride_mask: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    features: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    columns: tl.constexpr,
    masked: tl.constexpr,
    sphere: tl.constexpr,
    entropies: tl.constexpr,
) -> None:
    """Codes, indices and tables of one block of vectors; adds to the sums."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    feature = tl.arange(0, features)
    inside, exists = row < n, feature < d
    both = inside[:, None] & exists[None, :]
    places = x + row[:, None] * stride_n + feature[None, :].to(tl.int64) * stride_d
    value = tl.load(places, mask=both, other=0.0).to(tl.float32)
    # Comparisons with NaN are false.
    valid = inside & (tl.min((tl.abs(value) < float("inf")).to(tl.int32), axis=1) > 0)
    if masked:
        valid = valid & (tl.load(mask + row * stride_mask, mask=inside, other=0) != 0)
    prepared, _largest, _length = prepare(tl.where(valid[:, None], value, 0.0), sphere)
    counts = valid[:, None] & exists[None, :]
    bit = (prepared > 0.0) & counts
    code = tl.where(counts, tl.where(bit, scale, -scale), 0.0)
    tl.store(
        codes + row[:, None] * d + feature[None, :], code.to(codes.dtype.element_ty), mask=both
    )
    index = tl.sum(bit.to(tl.int64) << feature[None, :].to(tl.int64), axis=1)
    tl.store(indices + row, tl.where(valid, index, -1), mask=inside)
    error = prepared - code
    number = tl.sum(valid.to(tl.float32), axis=0)
    tl.atomic_add(sums, tl.sum(tl.sum(error * error, axis=1), axis=0), sem="relaxed")
    tl.atomic_add(sums + 1, number, sem="relaxed")
    tl.atomic_add(sums + 3, number, sem="relaxed")
    if entropies:
        logits = prepared * factor
        certainty = tl.zeros((rows,), tl.float32)
        lines = tables + row[:, None] * columns
        for number_of in tl.static_range((d + group - 1) // group):
            for half in tl.static_range(2):
                certainty += store_table(
                    lines, logits, valid, inside, d, group, number_of, half, width
                )
        tl.atomic_add(sums + 2, tl.sum(certainty, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["size"])
def _lose(  # noqa: PLR0913
    sums: tl.tensor,
    logarithms: tl.tensor,
    commitment: tl.tensor,
    entropy: tl.tensor,
    size: tl.tensor,
    commitment_weight: tl.tensor,
    token_weight: tl.tensor,
    batch_weight: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Computes the losses from all sums, by one program."""
    total = tl.maximum(tl.load(sums + 3), 1.0)
    found = tl.zeros((block,), tl.float32)
    for start in range(0, size, block):
        entry = start + tl.arange(0, block)
        mean = tl.load(sums + 4 + entry, mask=entry < size, other=0.0) / total
        weighted = batch_weight * tl.log(tl.maximum(mean, _TINY))
        tl.store(logarithms + entry, weighted, mask=entry < size)
        found += mean * weighted
    tl.store(entropy, tl.sum(found, axis=0) - token_weight * tl.load(sums + 2) / total)
    local = tl.maximum(tl.load(sums + 1), 1.0)
    tl.store(commitment, commitment_weight * tl.load(sums) / local)


@triton.jit(do_not_specialize=["n"])
def _pass_back(  # noqa: PLR0913
    x: tl.tensor,
    indices: tl.tensor,
    sums: tl.tensor,
    joints: tl.tensor,
    of_codes: tl.tensor,
    of_commitment: tl.tensor,
    of_entropy: tl.tensor,
    found: tl.tensor,
    n: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    codes_n: tl.tensor,
    codes_d: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    commitment_slope: tl.tensor,
    token_weight: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    features: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    sphere: tl.constexpr,
    entropies: tl.constexpr,
    has_codes: tl.constexpr,
    has_commitment: tl.constexpr,
) -> None:
    """Computes the gradient of one block of vectors; tables are computed again."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    feature = tl.arange(0, features)
    wide = feature[None, :].to(tl.int64)
    inside, exists = row < n, feature < d
    index = tl.load(indices + row, mask=inside, other=-1)
    valid = index >= 0
    read = valid[:, None] & exists[None, :]
    value = tl.load(x + row[:, None] * stride_n + wide * stride_d, mask=read, other=0.0)
    prepared, largest, length = prepare(value.to(tl.float32), sphere)
    gradient = tl.zeros((rows, features), tl.float32)
    if has_codes:
        given = tl.load(of_codes + row[:, None] * codes_n + wide * codes_d, mask=read, other=0.0)
        gradient += given.to(tl.float32)
    if has_commitment:
        bit = ((index[:, None] >> wide) & 1) == 1
        code = tl.where(read, tl.where(bit, scale, -scale), 0.0)
        local = tl.maximum(tl.load(sums + 1), 1.0)
        gradient += (prepared - code) * (commitment_slope * tl.load(of_commitment) / local)
    if entropies:
        logits = prepared * factor
        slope = tl.zeros((rows, features), tl.float32)
        for number_of in tl.static_range((d + group - 1) // group):
            slope += group_slope(logits, valid, joints, token_weight, d, group, number_of, width)
        total = tl.maximum(tl.load(sums + 3), 1.0)
        gradient += slope * (factor * tl.load(of_entropy) / total)
    if sphere:
        along = tl.sum(prepared * gradient, axis=1)
        gradient = (gradient - prepared * along[:, None]) / length[:, None] / largest[:, None]
    gradient = tl.where(read, gradient, 0.0)
    both = inside[:, None] & exists[None, :]
    place = found + row[:, None] * d + feature[None, :]
    tl.store(place, gradient.to(found.dtype.element_ty), mask=both)
