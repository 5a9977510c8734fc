"""Pieces of the kernels of bits."""

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-64.0)  # as in `_bit_tables.py`


@triton.jit
def prepare(value: tl.tensor, sphere: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns the vectors whose signs count, and their length as two factors."""
    largest = tl.max(tl.abs(value), axis=1)
    # A zero vector stays zero if divided by infinity, and its gradient becomes zero.
    largest = tl.where(largest > 0.0, largest, float("inf"))
    length = tl.full(largest.shape, 1.0, tl.float32)
    if sphere:
        value = value / largest[:, None]
        length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1.0)
        value = value / length[:, None]
    return value, largest, length


@triton.jit
def _log_sigmoid(x: tl.tensor) -> tl.tensor:
    left = tl.exp(-tl.abs(x))
    # Where 1 + left would round, its logarithm by its series.
    series = left * (1.0 - left * (0.5 - left * 0.33333334))
    return tl.minimum(x, 0.0) - tl.where(left < 0.01, series, tl.log(1.0 + left))


@triton.jit
def _table(
    logits: tl.tensor,
    valid: tl.tensor,
    begin: tl.constexpr,
    end: tl.constexpr,
    width: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Returns logarithms and probabilities of all patterns of some consecutive bits."""
    feature = tl.arange(0, logits.shape[1])
    pattern = tl.arange(0, width)
    logarithms = tl.zeros((logits.shape[0], width), tl.float32)
    for place in tl.static_range(begin, end):
        logit = tl.sum(tl.where(feature[None, :] == place, logits, 0.0), axis=1)
        one, zero = _log_sigmoid(logit), _log_sigmoid(-logit)
        is_one = ((pattern >> (place - begin)) & 1) == 1
        logarithms += tl.where(is_one[None, :], one[:, None], zero[:, None])
    logarithms = tl.maximum(logarithms, _LOWEST)
    exists = valid[:, None] & (pattern < (1 << (end - begin)))[None, :]
    return logarithms, tl.where(exists, tl.exp(logarithms), 0.0)


@triton.jit
def _spread(
    found: tl.tensor,
    slope: tl.tensor,
    logits: tl.tensor,
    begin: tl.constexpr,
    end: tl.constexpr,
) -> tl.tensor:
    """Adds the gradient of the bits from ``begin`` to ``end`` from that of their patterns."""
    feature = tl.arange(0, logits.shape[1])
    pattern = tl.arange(0, slope.shape[1])
    for place in tl.static_range(begin, end):
        logit = tl.sum(tl.where(feature[None, :] == place, logits, 0.0), axis=1)
        is_one = ((pattern >> (place - begin)) & 1) == 1
        left = tl.exp(-tl.abs(logit))
        small, large = left / (1.0 + left), 1.0 / (1.0 + left)
        one, zero = tl.where(logit > 0.0, large, small), tl.where(logit > 0.0, small, large)
        share = tl.sum(slope * tl.where(is_one[None, :], zero[:, None], -one[:, None]), axis=1)
        found += tl.where(feature[None, :] == place, share[:, None], 0.0)
    return found


@triton.jit
def store_table(  # noqa: PLR0913
    lines: tl.tensor,
    logits: tl.tensor,
    valid: tl.tensor,
    inside: tl.tensor,
    d: tl.constexpr,
    group: tl.constexpr,
    number: tl.constexpr,
    half: tl.constexpr,
    width: tl.constexpr,
) -> tl.tensor:
    """Stores the probabilities of one half of a group; returns sums of ``p * log(p)``."""
    begin: tl.constexpr = number * group
    end: tl.constexpr = begin + group if begin + group < d else d
    middle: tl.constexpr = (begin + end + 1) // 2
    start: tl.constexpr = begin if half == 0 else middle
    stop: tl.constexpr = middle if half == 0 else end
    first: tl.constexpr = (group + 1) // 2
    before: tl.constexpr = number * ((1 << first) + (1 << (group - first)))
    offset: tl.constexpr = before + half * (1 << (middle - begin))
    logarithms, likely = _table(logits, valid, start, stop, width)
    pattern = tl.arange(0, width)
    there = inside[:, None] & (pattern < (1 << (stop - start)))[None, :]
    tl.store(lines + offset + pattern[None, :], likely, mask=there)
    return tl.sum(logarithms * likely, axis=1)


@triton.jit
def group_slope(  # noqa: PLR0913
    logits: tl.tensor,
    valid: tl.tensor,
    joints: tl.tensor,
    token_weight: tl.tensor,
    d: tl.constexpr,
    group: tl.constexpr,
    number: tl.constexpr,
    width: tl.constexpr,
) -> tl.tensor:
    """Returns the gradient of the log-odds of the bits of a group, times the number of tokens."""
    begin: tl.constexpr = number * group
    end: tl.constexpr = begin + group if begin + group < d else d
    middle: tl.constexpr = (begin + end + 1) // 2
    left_logs, left = _table(logits, valid, begin, middle, width)
    right_logs, right = _table(logits, valid, middle, end, width)
    pattern = tl.arange(0, width)
    entry = pattern[:, None] * (1 << (end - middle)) + pattern[None, :]
    there = (pattern < (1 << (middle - begin)))[:, None]
    there = there & (pattern < (1 << (end - middle)))[None, :]
    joint = tl.load(joints + number * (1 << group) + entry, mask=there, other=0.0)
    of_left = tl.dot(right, tl.trans(joint), input_precision="ieee")
    of_right = tl.dot(left, joint, input_precision="ieee")
    of_left = left * (of_left - token_weight * left_logs)
    of_right = right * (of_right - token_weight * right_logs)
    slope = _spread(tl.zeros_like(logits), of_left, logits, begin, middle)
    return _spread(slope, of_right, logits, middle, end)
