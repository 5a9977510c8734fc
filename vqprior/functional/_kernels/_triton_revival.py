"""Revival by five Triton kernels, four of which return at once where no code can move.

Count uses; draw a token for each code; rank: the median of each feature of these tokens; measure how
far they are from it; move what is dead. Nothing is read back to the host.
"""

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = tl.constexpr(1024)  # per program that counts
_PART = tl.constexpr(128)  # of tokens, or of blocks of tokens, that are counted at once
_CODES = 16  # per program that draws or moves
_RANKED = 4096  # most numbers that are ranked at once
# What the kernels tell each other: tokens of the step, whether a window closes, or codes start.
_TOTAL, _CLOSES, _STARTS = (tl.constexpr(place) for place in range(3))


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
        blocks = triton.cdiv(n, _TOKENS.value)
        floats = {"dtype": torch.float32, "device": self.weight.device}
        integers = {"dtype": torch.int64, "device": self.weight.device}
        drawn, window = torch.empty((d, k), **floats), torch.empty((), **floats)
        errors, distances, sizes = torch.empty((3, k), **floats)
        center = torch.empty(d, **floats)
        counts, facts = torch.empty((2, blocks), **integers), torch.empty(3, **integers)
        dead = torch.empty(k, dtype=torch.uint8, device=self.weight.device)
        features = min(128, triton.next_power_of_2(d))
        size = min(_RANKED, triton.next_power_of_2(k))
        resolution = 1e-5 + torch.finfo(self.weight.dtype).eps
        last = min(k - 1, 9 * k // 10)
        settings = {"num_warps": 4, "enable_fp_fusion": True}  # this default will change
        programs = (triton.cdiv(k, _CODES),)
        with torch.cuda.device_of(self.weight):
            _count[(blocks,)](
                self.uses, indices, mask, counts, n, k, indices.stride(0), mask.stride(0), **settings
            )
            _draw[programs](
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


@triton.jit(do_not_specialize=["n", "k"])
def _count(  # noqa: PLR0913
    uses: tl.tensor,
    indices: tl.tensor,
    mask: tl.tensor,
    counts: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    stride_index: tl.tensor,
    stride_mask: tl.tensor,
) -> None:
    """Counts the uses of each code, and of each block the uses and the tokens to draw from."""
    block = tl.program_id(0)
    token = block.to(tl.int64) * _TOKENS + tl.arange(0, _TOKENS)
    inside = token < n
    index = tl.load(indices + token * stride_index, mask=inside, other=-1)
    valid = (index >= 0) & (index < k)
    one = tl.full((_TOKENS,), 1.0, tl.float32)
    tl.atomic_add(uses + index, one, mask=valid, sem="relaxed")
    real = tl.load(mask + token * stride_mask, mask=inside, other=0).to(tl.int64)
    tl.store(counts + block, tl.sum(valid.to(tl.int64), axis=0))
    tl.store(counts + tl.num_programs(0) + block, tl.sum(real, axis=0))


@triton.jit(do_not_specialize=["n", "k", "blocks", "seed", "enough", "quarter", "rest"])
def _draw(  # noqa: PLR0913
    weight: tl.tensor,
    uses: tl.tensor,
    tokens: tl.tensor,
    steps: tl.tensor,
    windows: tl.tensor,
    inputs: tl.tensor,
    chosen: tl.tensor,
    mask: tl.tensor,
    counts: tl.tensor,
    facts: tl.tensor,
    window: tl.tensor,
    drawn: tl.tensor,
    errors: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    blocks: tl.tensor,
    seed: tl.tensor,
    enough: tl.tensor,
    quarter: tl.tensor,
    rest: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    stride_code_n: tl.tensor,
    stride_code_d: tl.tensor,
    stride_mask: tl.tensor,
    d: tl.constexpr,
    codes: tl.constexpr,
    features: tl.constexpr,
) -> None:
    """Draws a token for each code, where one may move; ``drawn`` is ``(d, k)``."""
    total, real = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for start in range(0, blocks, _PART):
        block = start + tl.arange(0, _PART)
        total += tl.sum(tl.load(counts + block, mask=block < blocks, other=0), axis=0)
        real += tl.sum(tl.load(counts + blocks + block, mask=block < blocks, other=0), axis=0)
    seen = tl.load(tokens) + total.to(tl.float32)
    closes = (seen >= enough) & (total > 0)
    starts = (tl.load(windows) == 0) & (total > 0) & (k > 1)
    if starts:
        used = 0.0
        for start in range(0, k, _TOKENS):
            code = start + tl.arange(0, _TOKENS)
            use = tl.load(uses + code, mask=code < k, other=0.0)
            used += tl.sum((use > 0).to(tl.float32), axis=0)
        starts = used < quarter * _expected(seen * rest)
    if tl.program_id(0) == 0:
        tl.store(window, seen)
        tl.store(facts + _TOTAL, total)
        tl.store(facts + _CLOSES, closes.to(tl.int64))
        tl.store(facts + _STARTS, starts.to(tl.int64))
    code = tl.program_id(0) * codes + tl.arange(0, codes)
    inside = code < k
    broken = _broken(weight, code, k, d, codes, features) & (total > 0)
    if closes | starts | (tl.max(broken.to(tl.int32), axis=0) > 0):
        counter = (code + 1).to(tl.int64) + tl.load(steps) * k + (seed.to(tl.int64) << 32)
        turn = (_integer(counter) % tl.maximum(real, 1))[:, None]
        # The t-th token is in the first block, and there in the first place, where the running
        # count exceeds t.
        place, before = tl.zeros((codes,), tl.int64), tl.zeros((codes,), tl.int64)
        running = tl.zeros((), tl.int64)
        for start in range(0, blocks, _PART):
            block = start + tl.arange(0, _PART)
            size = tl.load(counts + blocks + block, mask=block < blocks, other=0)
            sums = (running + tl.cumsum(size, axis=0))[None, :]
            passed = (sums <= turn) & (block < blocks)[None, :]
            place += tl.sum(passed.to(tl.int64), axis=1)
            before = tl.maximum(before, tl.max(tl.where(passed, sums, 0), axis=1))
            running += tl.sum(size, axis=0)
        first = place * _TOKENS
        place, running_of = first, before
        for start in range(0, _TOKENS, _PART):
            token = first[:, None] + start + tl.arange(0, _PART)[None, :]
            exists = token < n
            size = tl.load(mask + token * stride_mask, mask=exists, other=0).to(tl.int64)
            sums = running_of[:, None] + tl.cumsum(size, axis=1)
            place += tl.sum(((sums <= turn) & exists).to(tl.int64), axis=1)
            running_of += tl.sum(size, axis=1)
        place = tl.minimum(place, n - 1)[:, None]
        error = tl.zeros((codes,), tl.float32)
        for begin in range(0, d, features):
            feature = begin + tl.arange(0, features)[None, :].to(tl.int64)
            some = inside[:, None] & (feature < d)
            token = tl.load(inputs + place * stride_n + feature * stride_d, mask=some, other=0.0)
            token = token.to(tl.float32)
            vector = chosen + place * stride_code_n + feature * stride_code_d
            difference = token - tl.load(vector, mask=some, other=0.0).to(tl.float32)
            error += tl.sum(difference * difference, axis=1)
            tl.store(drawn + feature * k + code[:, None], token, mask=some)
        tl.store(errors + code, error, mask=inside)


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
    if (tl.load(facts + _CLOSES) > 0) | (tl.load(facts + _STARTS) > 0):
        row = tl.program_id(0).to(tl.int64)
        tl.store(center + row, _ranked(drawn + row * k, k, place, size))


@triton.jit(do_not_specialize=["k"])
def _measure(
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
    if (tl.load(facts + _CLOSES) > 0) | (tl.load(facts + _STARTS) > 0):
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
    closes, starts = tl.load(facts + _CLOSES) > 0, tl.load(facts + _STARTS) > 0
    total, seen = tl.load(facts + _TOTAL), tl.load(window)
    code = tl.program_id(0) * codes + tl.arange(0, codes)
    inside = code < k
    moves = _broken(weight, code, k, d, codes, features) & (total > 0)
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
def _broken(
    weight: tl.tensor,
    code: tl.tensor,
    k: tl.tensor,
    d: tl.constexpr,
    codes: tl.constexpr,
    features: tl.constexpr,
) -> tl.tensor:
    """Whether a code has a NaN or an infinity, which is no number times 0 either."""
    broken = tl.zeros((codes,), tl.int32)
    for begin in range(0, d, features):
        feature = begin + tl.arange(0, features)[None, :]
        some = (code < k)[:, None] & (feature < d)
        place = weight + code[:, None].to(tl.int64) * d + feature
        value = tl.load(place, mask=some, other=0.0).to(tl.float32)
        broken |= tl.max((value * 0.0 != 0.0).to(tl.int32), axis=1)
    return broken > 0


@triton.jit
def _expected(exponent: tl.tensor) -> tl.tensor:
    """Returns ``1 - 2 ** exponent`` for ``exponent <= 0``, also near 0."""
    x = exponent * 0.6931471805599453
    near = -x * (1.0 + x * (0.5 + x * (0.16666667 + x * 0.041666668)))
    return tl.where(x > -0.1, near, 1.0 - tl.exp2(exponent))


@triton.jit
def _integer(counter: tl.tensor) -> tl.tensor:
    """Computes ``counter_integer`` of ``functional/_random.py``."""
    x = counter.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 1).to(tl.int64, bitcast=True)


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
