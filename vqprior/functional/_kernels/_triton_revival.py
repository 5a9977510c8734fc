"""Revival by five Triton kernels; in most steps no code can move, and four return at once.

They count uses, draw a token for each code, find the median of each feature of these tokens,
measure how far they are from it, and move what is dead. Nothing is read back to the host.
"""

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqprior.functional._kernels._triton_candidates import (
    CLOSES,
    STARTS,
    TOKENS,
    TOTAL,
    count,
    draw,
    is_broken,
)

_CODES = 16  # per program that draws or moves
_RANKED = 4096  # most numbers that are ranked at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revival:
    """The codes of one codebook, what was counted, and how to judge; all contiguous.

    Attributes:
        weight: What the codebook holds, in float16, bfloat16 or float32.
        gain: The ratio of codes to ``weight``.
        uses, tokens: Of the window that is open, float32.
        steps, windows: Numbers of steps and of closed windows, int64.
        seed: Seed of the random choice, in ``[0, 2**32)``.
        threshold: Fraction of the mean use below which a code counts as dead.
        patience: Length of a window in tokens per code.

    Shape:
        - ``weight``: ``(k, d)``
        - ``uses``: ``(k,)``
        - ``tokens``, ``steps``, ``windows``: ``()``
    """

    weight: Tensor
    gain: float
    uses: Tensor
    tokens: Tensor
    steps: Tensor
    windows: Tensor
    seed: int
    threshold: float
    patience: float

    def step_(self, inputs: Tensor, codes: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
        """Counts a step, moves codes, and returns 1 where a code was moved, as ``uint8``.

        Shape:
            - ``inputs``, ``codes``: ``(n, d)``, with any strides, ``n`` at least 1
            - ``indices``, ``mask``: ``(n,)``, with any strides
            - returns: ``(k,)``
        """
        (k, d), n = self.weight.shape, len(mask)
        blocks = triton.cdiv(n, TOKENS.value)
        device = self.weight.device

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        drawn, window, center = empty(d, k), empty(), empty(d)
        errors, distances, sizes = empty(3, k)
        counts, facts = empty(2, blocks, dtype=torch.int64), empty(3, dtype=torch.int64)
        dead = empty(k, dtype=torch.uint8)
        features = min(128, triton.next_power_of_2(d))
        size = min(_RANKED, triton.next_power_of_2(k))
        resolution = 1e-5 + torch.finfo(self.weight.dtype).eps
        last = min(k - 1, 9 * k // 10)
        settings: dict[str, Any] = {
            "num_warps": 4,
            "enable_fp_fusion": True,
        }  # this default will change
        programs = (triton.cdiv(k, _CODES),)
        with torch.cuda.device_of(self.weight):
            count[(blocks,)](
                self.uses,
                indices,
                mask,
                counts,
                n,
                k,
                indices.stride(0),
                mask.stride(0),
                **settings,
            )
            draw[programs](
                self.weight,
                self.uses,
                self.tokens,
                self.steps,
                self.windows,
                inputs,
                codes,
                mask,
                counts,
                facts,
                window,
                drawn,
                errors,
                n,
                k,
                blocks,
                self.seed,
                float(self.patience) * k,
                # Few codes are in use: fewer than this many times 1 - (1 - 1 / k) ** tokens.
                0.25 * k,
                _log2_of_rest(k),
                *inputs.stride(),
                *codes.stride(),
                mask.stride(0),
                d=d,
                codes=_CODES,
                features=features,
                **settings,
            )
            _rank[(d,)](drawn, center, facts, k, k // 2, size=size, **settings)
            _measure[programs](
                drawn, center, distances, sizes, facts, k, d=d, codes=_CODES, **settings
            )
            _move[programs](
                self.weight,
                self.uses,
                self.tokens,
                self.steps,
                self.windows,
                facts,
                window,
                drawn,
                errors,
                distances,
                sizes,
                dead,
                k,
                float(self.gain),
                self.threshold / k,
                resolution**2,
                last,
                d=d,
                codes=_CODES,
                features=features,
                size=size,
                **settings,
            )
        return dead


def _log2_of_rest(k: int) -> float:
    """Returns the logarithm of the share of codes that one token leaves unused."""
    return math.log1p(-1 / k) / math.log(2) if k > 1 else 0.0


@triton.jit(do_not_specialize=["k", "place"])
def _rank(
    drawn: tl.tensor,
    center: tl.tensor,
    facts: tl.tensor,
    k: tl.tensor,
    place: tl.tensor,
    size: tl.constexpr,
) -> None:
    """Finds what sorting brings to ``place`` in one row of ``drawn``."""
    if (tl.load(facts + CLOSES) > 0) | (tl.load(facts + STARTS) > 0):
        row = tl.program_id(0).to(tl.int64)
        tl.store(center + row, _ranked(drawn + row * k, k, place, size))


@triton.jit(do_not_specialize=["k"])
def _measure(  # noqa: PLR0913
    drawn: tl.tensor,
    center: tl.tensor,
    distances: tl.tensor,
    sizes: tl.tensor,
    facts: tl.tensor,
    k: tl.tensor,
    d: tl.constexpr,
    codes: tl.constexpr,
) -> None:
    """Computes squared distances of the drawn tokens to the center and to 0."""
    if (tl.load(facts + CLOSES) > 0) | (tl.load(facts + STARTS) > 0):
        code = tl.program_id(0) * codes + tl.arange(0, codes)
        inside = code < k
        distance, size = tl.zeros((codes,), tl.float32), tl.zeros((codes,), tl.float32)
        for feature in range(d):
            token = tl.load(drawn + feature * k.to(tl.int64) + code, mask=inside, other=0.0)
            away = token - tl.load(center + feature)
            distance += away * away
            size += token * token
        tl.store(distances + code, distance, mask=inside)
        tl.store(sizes + code, size, mask=inside)


@triton.jit(do_not_specialize=["k", "gain", "threshold", "resolution", "last"])
def _move(  # noqa: PLR0913
    weight: tl.tensor,
    uses: tl.tensor,
    tokens: tl.tensor,
    steps: tl.tensor,
    windows: tl.tensor,
    facts: tl.tensor,
    window: tl.tensor,
    drawn: tl.tensor,
    errors: tl.tensor,
    distances: tl.tensor,
    sizes: tl.tensor,
    dead: tl.tensor,
    k: tl.tensor,
    gain: tl.tensor,
    threshold: tl.tensor,
    resolution: tl.tensor,
    last: tl.tensor,
    d: tl.constexpr,
    codes: tl.constexpr,
    features: tl.constexpr,
    size: tl.constexpr,
) -> None:
    """Moves dead and broken codes onto the drawn tokens, and closes the window."""
    closes, starts = tl.load(facts + CLOSES) > 0, tl.load(facts + STARTS) > 0
    total, seen = tl.load(facts + TOTAL), tl.load(window)
    code = tl.program_id(0) * codes + tl.arange(0, codes)
    inside = code < k
    moves = is_broken(weight, code, k, d, codes, features) & (total > 0)
    if closes | starts:
        use = tl.load(uses + code, mask=inside, other=1.0)
        wanted = (closes & (use < seen * threshold)) | (starts & (use == 0))
        spread = _ranked(distances, k, last, size)
        extent = tl.load(sizes + code, mask=inside, other=0.0)
        error = tl.load(errors + code, mask=inside, other=0.0)
        moves = moves | (wanted & (error > extent * resolution + 1e-6 * spread))
        tl.store(uses + code, tl.where(closes, 0.0, use), mask=inside)
    moves = moves & inside
    tl.store(dead + code, moves.to(tl.uint8), mask=inside)
    if tl.max(moves.to(tl.int32), axis=0) > 0:
        for begin in range(0, d, features):
            feature = begin + tl.arange(0, features)[None, :].to(tl.int64)
            some = moves[:, None] & (feature < d)
            token = tl.load(drawn + feature * k + code[:, None], mask=some, other=0.0)
            place = weight + code[:, None].to(tl.int64) * d + feature
            tl.store(place, (token / gain).to(weight.dtype.element_ty), mask=some)
    if tl.program_id(0) == 0:
        tl.store(tokens, tl.where(closes, 0.0, seen))
        tl.store(steps, tl.load(steps) + (total > 0).to(tl.int64))
        tl.store(windows, tl.load(windows) + closes.to(tl.int64))


@triton.jit
def _ranked(values: tl.tensor, k: tl.tensor, place: tl.tensor, size: tl.constexpr) -> tl.tensor:
    """Finds what sorting brings to ``place``, one bit after the other, from the highest.

    As unsigned integers, floats are ordered as numbers if the sign is flipped, and the other bits
    of negative ones too. The number is the largest that at most ``place`` others are below.
    """
    found, bit = tl.zeros((), tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        trial = found | bit
        below = tl.zeros((), tl.int32)
        for start in range(0, k, size):
            number = start + tl.arange(0, size)
            bits = tl.load(values + number, mask=number < k, other=0.0).to(tl.uint32, bitcast=True)
            key = tl.where(bits >> 31 > 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
            below += tl.sum(((key < trial) & (number < k)).to(tl.int32), axis=0)
        found = tl.where(below <= place, trial, found)
        bit = bit >> 1
    bits = tl.where(found >> 31 > 0, found ^ 0x80000000, found ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)
