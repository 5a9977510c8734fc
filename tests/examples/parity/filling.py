"""Numbers from names: the rule by which weights and inputs of the fixtures were made.

The fixtures in ``tests/fixtures/parity`` hold what the authors' code computes with weights and
inputs made by this rule. It needs SHA-256, 64-bit integers and correctly rounded doubles alone, so
it gives the same numbers everywhere; ``test_known_answers`` holds it to some.
"""

import hashlib
import math

import numpy as np

CONSTANTS = ("relative_position_index", "attn_mask", "num_batches_tracked")
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Of the sum of four uniform 16-bit numbers.
MEAN, DEVIATION = 131070.0, math.sqrt((2.0**32 - 1) / 3)


def unit(name, count):
    """``count`` numbers of mean 0 and variance 1: SplitMix64, seeded by a hash of the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        for shift, factor in ((30, MIX_1), (27, MIX_2)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
    fields = state.view(np.uint16).reshape(count, 4)
    return (fields.sum(axis=1, dtype=np.int64) - MEAN) / DEVIATION


def weight(key, shape):
    """The float32 array of a parameter or running statistic; None for constants."""
    leaf = key.rpartition(".")[2]
    if leaf in CONSTANTS:
        return None
    values = unit(f"w:{key}", math.prod(shape))
    if leaf in ("relative_position_bias_table", "running_mean"):
        values *= 0.1
    elif leaf == "bias":
        values *= 0.05
    elif leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        values = 1 + 0.1 * values
    elif not key.endswith("embedding.weight"):
        gain = 0.5 if key.endswith((".conv.weight", ".conv_out.weight")) else 1.0
        values = gain * values / math.sqrt(math.prod(shape[1:]))
    return values.reshape(shape).astype(np.float32)


def noise(name, *shape):
    """A normal input, float32."""
    return unit(f"x:{name}", math.prod(shape)).reshape(shape).astype(np.float32)


def image(name, *shape):
    """An input like an image in [-1, 1]: cells of 8 x 8 pixels and noise, float32."""
    batch, channels, height, width = shape
    fine = unit(f"x:{name}", math.prod(shape)).reshape(shape)
    cells = (batch, channels, height // 8, width // 8)
    coarse = unit(f"x:{name}:coarse", math.prod(cells)).reshape(cells)
    coarse = coarse.repeat(8, axis=2).repeat(8, axis=3)
    return np.clip(0.45 * coarse + 0.15 * fine, -1, 1).astype(np.float32)
