"""Parts that both passes of the gradient of a choice share."""

import triton
import triton.language as tl


@triton.jit
def load_top(
    row_logits: tl.tensor, indices: tl.tensor, stride_k: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """Loads the largest logit of each row."""
    index = tl.load(indices, mask=inside, other=0)
    return tl.load(row_logits + index * stride_k, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_logits(
    row_logits: tl.tensor, code: tl.tensor, stride_k: tl.tensor, exists: tl.tensor
) -> tl.tensor:
    """Loads a block of logits, minus infinity where there is none."""
    places = row_logits[:, None] + code[None, :].to(tl.int64) * stride_k
    return tl.load(places, mask=exists, other=float("-inf")).to(tl.float32)


@triton.jit
def add_shares(
    sums: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    n: tl.tensor,
    splits: tl.constexpr,
    shares: tl.constexpr,
) -> tl.tensor:
    """Adds up what the programs of the first pass found, always in the same order."""
    share = tl.arange(0, shares)[:, None]
    places = sums + share.to(tl.int64) * n + row[None, :]
    return tl.sum(tl.load(places, mask=(share < splits) & inside[None, :], other=0.0), axis=0)


@triton.jit
def load_rows(
    grad_rows: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    stride_d: tl.tensor,
    inside: tl.tensor,
    d: tl.constexpr,
    features: tl.constexpr,
) -> tl.tensor:
    """Loads a block of features of the rows' gradients, in the dtype of the codes."""
    feature = begin + tl.arange(0, features)
    exists = inside[:, None] & (feature < d)[None, :]
    places = grad_rows + feature[None, :].to(tl.int64) * stride_d
    return tl.load(places, mask=exists, other=0.0).to(table.dtype.element_ty)


@triton.jit
def values(  # noqa: PLR0913
    left: tl.tensor,
    right: tl.tensor,
    grad_rows: tl.tensor,
    table: tl.tensor,
    here: tl.tensor,
    width: tl.tensor,
    stride_d: tl.tensor,
    inside: tl.tensor,
    d: tl.constexpr,
    rows: tl.constexpr,
    codes: tl.constexpr,
    features: tl.constexpr,
) -> tl.tensor:
    """Multiplies rows and codes."""
    value = tl.zeros((rows, codes), tl.float32)
    places = table + here[None, :]
    if d <= 2 * features:
        value = _multiply(left, places, 0, width, value, features)
        if d > features:
            value = _multiply(right, places, features, width, value, features)
    else:
        for begin in range(0, d, features):
            part = load_rows(grad_rows, table, begin, stride_d, inside, d, features)
            value = _multiply(part, places, begin, width, value, features)
    return value


@triton.jit
def _multiply(
    part: tl.tensor,
    places: tl.tensor,
    begin: tl.tensor,
    width: tl.tensor,
    value: tl.tensor,
    features: tl.constexpr,
) -> tl.tensor:
    """Adds the product of a block of features; tensor cores take low precision alone."""
    feature = begin + tl.arange(0, features)
    loaded = tl.load(places + feature[:, None].to(tl.int64) * width)
    return tl.dot(part, loaded, value, input_precision="ieee")
