"""Moving averages of codebooks by three Triton kernels, for all codebooks of one size."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqprior.functional._kernels._triton_statistics import add_to_tables_, count_tables

_ENTRIES = 1024  # per program: with twice as many, the registers overflow
_CODES = tl.constexpr(1024)  # whose counts are added up at once
_LASTING = tl.constexpr(0.01)  # share of one step in how often rows were rewritten lately


class Step:
    """One step of the moving averages of ``q`` codebooks: sums, a collective, and the update.

    Args:
        weights: What each codebook holds, ``(k, d)``, in float16, bfloat16 or float32, contiguous.
        states: Of each codebook ``codes`` and ``written`` ``(k, d)``, ``counts`` and ``restarts``
            ``(k,)``, float32 and contiguous.
        gain: The ratio of codes to weights.
        num_vectors: Most vectors that one codebook will be given.
    """

    def __init__(
        self, weights: list[Tensor], states: list[tuple[Tensor, ...]], gain: float, num_vectors: int
    ) -> None:
        (k, d), q = weights[0].shape, len(weights)
        self.weight, self.gain, self.shape = weights[0], gain, (q, k, d)
        every = zip(weights, states, strict=True)
        self.addresses = _addresses(
            self.weight.device,
            tuple(one.data_ptr() for weight, state in every for one in (weight, *state)),
        )
        self.tables = count_tables(num_vectors, k)
        device = self.weight.device
        size = (q, self.tables, k * (d + 1))
        self.totals: Tensor = torch.empty(size, dtype=torch.float32, device=device)
        self.fresh = torch.empty((q, k), dtype=torch.float32, device=device)
        self._launch(_start, self.tables)

    def add_(self, x: Tensor, indices: Tensor, first: int = 0) -> None:
        """Adds vectors ``(q, n, d)`` with indices ``(q, n)`` to the sums of codebooks.

        They are the codebook ``first`` and those after it.
        """
        _, k, d = self.shape
        flat = self.totals[first : first + len(x)]
        sums = flat[..., : k * d].unflatten(-1, (k, d))
        add_to_tables_(sums, flat[..., k * d :], x, indices)

    def joint(self) -> Tensor:
        """Returns what ranks add up before ``move_``."""
        if self.tables > 1:
            self.totals = self.totals.sum(dim=1, keepdim=True)
            self.tables = 1
        return self.totals

    def move_(self, decay: float, eps: float) -> None:
        """Moves all codebooks."""
        self._launch(_move, self.tables, decay, eps)

    def _launch(self, kernel: triton.JITFunction, *options: float) -> None:
        q, k, d = self.shape
        features = min(128, triton.next_power_of_2(d))
        rows = _ENTRIES // features
        with torch.cuda.device_of(self.weight):
            kernel[(triton.cdiv(k, rows), q)](
                self.addresses,
                self.weight,
                self.totals,
                self.fresh,
                k,
                float(self.gain),
                *options,
                d=d,
                rows=rows,
                features=features,
                num_warps=4,
                enable_fp_fusion=True,  # Triton announced that this default will change
            )


@functools.lru_cache(maxsize=64)
def _addresses(device: torch.device, pointers: tuple[int, ...]) -> Tensor:
    """Returns addresses as a tensor, so that one kernel finds tensors of several codebooks."""
    return torch.tensor(pointers, dtype=torch.int64, device=device)


@triton.jit(do_not_specialize=["k", "gain", "tables"])
def _start(  # noqa: PLR0913
    addresses: tl.tensor,
    weight: tl.tensor,
    totals: tl.tensor,
    fresh: tl.tensor,
    k: tl.tensor,
    gain: tl.tensor,
    tables: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    features: tl.constexpr,
) -> None:
    """Clears the sums, and copies the counts, with -1 where others have rewritten the row."""
    codebook = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    inside = row < k
    weights = tl.load(addresses + 5 * codebook).to(weight.dtype)
    written = tl.load(addresses + 5 * codebook + 2).to(totals.dtype)
    counts = tl.load(addresses + 5 * codebook + 3).to(totals.dtype)
    zeros = tl.zeros((rows, features), tl.float32)
    differs = tl.zeros((rows, features), tl.int32)
    for begin in range(0, d, features):
        feature = begin + tl.arange(0, features)
        mask = inside[:, None] & (feature < d)[None, :]
        place = row[:, None] * d + feature[None, :]
        current = _codes(tl.load(weights + place, mask=mask, other=0.0), gain)
        # Compared in the narrower of the two dtypes: only there were they ever equal.
        kept = tl.load(written + place, mask=mask, other=0.0).to(weight.dtype.element_ty)
        differs |= ((kept.to(tl.float32) != current) & mask).to(tl.int32)
        for table in range(tables):
            start = totals + (codebook * tables + table) * k * (d + 1)
            tl.store(start + place, zeros, mask=mask)
    for table in range(tables):
        start = totals + (codebook * tables + table) * k * (d + 1)
        tl.store(start + k.to(tl.int64) * d + row, tl.zeros((rows,), tl.float32), mask=inside)
    count = tl.load(counts + row, mask=inside, other=0.0)
    count = tl.where(tl.max(differs, axis=1) > 0, -1.0, count)
    tl.store(fresh + codebook * k + row, count, mask=inside)


@triton.jit(do_not_specialize=["k", "gain", "tables", "decay", "eps"])
def _move(  # noqa: PLR0913
    addresses: tl.tensor,
    weight: tl.tensor,
    totals: tl.tensor,
    fresh: tl.tensor,
    k: tl.tensor,
    gain: tl.tensor,
    tables: tl.tensor,
    decay: tl.tensor,
    eps: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    features: tl.constexpr,
) -> None:
    """Moves one block of codes; every program adds up the counts of all, in the same order."""
    codebook = tl.program_id(1).to(tl.int64)
    totals += codebook * tables * k * (d + 1)
    fresh += codebook * k
    before, after, every = 0.0, 0.0, 0.0
    for start in range(0, k, _CODES):
        code = start + tl.arange(0, _CODES)
        count = _counts(fresh, code, k)
        hit = _hits(totals, code, k, tables, d)
        before += tl.sum(count, axis=0)
        after += tl.sum(count + (hit - count) * (1 - decay), axis=0)
        every += tl.sum(hit, axis=0)
    if every > 0:  # a step without a counted token changes nothing
        row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
        inside = row < k
        weights = tl.load(addresses + 5 * codebook).to(weight.dtype)
        codes = tl.load(addresses + 5 * codebook + 1).to(totals.dtype)
        written = tl.load(addresses + 5 * codebook + 2).to(totals.dtype)
        counts = tl.load(addresses + 5 * codebook + 3).to(totals.dtype)
        restarts = tl.load(addresses + 5 * codebook + 4).to(totals.dtype)
        rewritten = tl.load(fresh + row, mask=inside, other=0.0) < 0
        count = _counts(fresh, row, k)
        hit = _hits(totals, row, k, tables, d)
        chosen = hit > 0
        moved = count + (hit - count) * (1 - decay)
        tl.store(counts + row, moved, mask=inside)
        lasting = tl.load(restarts + row, mask=inside, other=0.0)
        tl.store(restarts + row, lasting + (rewritten - lasting) * _LASTING, mask=inside)
        old = (count + eps) * (before / (before + k * eps))
        new = tl.where(chosen, (moved + eps) * (after / (after + k * eps)), 1.0)
        for begin in range(0, d, features):
            feature = begin + tl.arange(0, features)
            mask = inside[:, None] & (feature < d)[None, :]
            place = row[:, None] * d + feature[None, :]
            current = _codes(tl.load(weights + place, mask=mask, other=0.0), gain)
            code = tl.load(codes + place, mask=mask, other=0.0)
            code = tl.where(rewritten[:, None], current, code)
            total = tl.zeros((rows, features), tl.float32)
            for table in range(tables):
                total += tl.load(totals + table * k * (d + 1) + place, mask=mask, other=0.0)
            mass = code * old[:, None]
            mass += (total - mass) * (1 - decay)
            code = tl.where(chosen[:, None], mass / new[:, None], code)
            tl.store(codes + place, code, mask=mask)
            held = (code / gain).to(weight.dtype.element_ty)
            tl.store(weights + place, held, mask=mask & chosen[:, None])
            # Not always what was assigned: other dtypes round it.
            tl.store(
                written + place, tl.where(chosen[:, None], _codes(held, gain), current), mask=mask
            )


@triton.jit
def _codes(weight: tl.tensor, gain: tl.tensor) -> tl.tensor:
    """Returns ``gain * weight``, rounded as the codebook rounds it."""
    return (weight.to(tl.float32) * gain).to(weight.dtype).to(tl.float32)


@triton.jit
def _counts(fresh: tl.tensor, code: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Returns the counts before the step, 1 for rows that others have rewritten."""
    count = tl.load(fresh + code, mask=code < k, other=0.0)
    return tl.where(count < 0, 1.0, count)


@triton.jit
def _hits(
    totals: tl.tensor, code: tl.tensor, k: tl.tensor, tables: tl.tensor, d: tl.constexpr
) -> tl.tensor:
    """Returns how many vectors chose each code in this step."""
    hit = tl.zeros_like(code).to(tl.float32)
    for table in range(tables):
        start = totals + table * k * (d + 1) + k.to(tl.int64) * d
        hit += tl.load(start + code, mask=code < k, other=0.0)
    return hit
