"""Which token each code may move onto, by Triton kernels: counted and drawn."""

import triton
import triton.language as tl

TOKENS = tl.constexpr(1024)  # per program that counts
_PART = tl.constexpr(128)  # of tokens, or of blocks of tokens, that are counted at once
# What the kernels tell each other: tokens of the step, whether a window closes, or codes start.
TOTAL, CLOSES, STARTS = (tl.constexpr(place) for place in range(3))


@triton.jit(do_not_specialize=["n", "k"])
def count(  # noqa: PLR0913
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
    token = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < n
    index = tl.load(indices + token * stride_index, mask=inside, other=-1)
    valid = (index >= 0) & (index < k)
    one = tl.full((TOKENS,), 1.0, tl.float32)
    tl.atomic_add(uses + index, one, mask=valid, sem="relaxed")
    real = tl.load(mask + token * stride_mask, mask=inside, other=0).to(tl.int64)
    tl.store(counts + block, tl.sum(valid.to(tl.int64), axis=0))
    tl.store(counts + tl.num_programs(0) + block, tl.sum(real, axis=0))


@triton.jit(do_not_specialize=["n", "k", "blocks", "seed", "enough", "quarter", "rest"])
def draw(  # noqa: C901, PLR0913
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
        for start in range(0, k, TOKENS):
            code = start + tl.arange(0, TOKENS)
            use = tl.load(uses + code, mask=code < k, other=0.0)
            used += tl.sum((use > 0).to(tl.float32), axis=0)
        starts = used < quarter * _expected(seen * rest)
    if tl.program_id(0) == 0:
        tl.store(window, seen)
        tl.store(facts + TOTAL, total)
        tl.store(facts + CLOSES, closes.to(tl.int64))
        tl.store(facts + STARTS, starts.to(tl.int64))
    code = tl.program_id(0) * codes + tl.arange(0, codes)
    inside = code < k
    broken = is_broken(weight, code, k, d, codes, features) & (total > 0)
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
        first = place * TOKENS
        place, running_of = first, before
        for start in range(0, TOKENS, _PART):
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


@triton.jit
def is_broken(
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
