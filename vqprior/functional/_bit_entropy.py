"""Entropy loss over the codes of independent bits, without listing the codes."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from vqprior import _distributed
from vqprior._checks import check_at_least
from vqprior._precision import without_autocast
from vqprior.functional._entropy import validate_logits
from vqprior.functional._kernels._operators import is_traced

_Half = TypeVar("_Half", int, Tensor)
_MAX_GROUP_SIZE = 20  # the joint distribution of 20 bits has a million entries
# Probabilities below `exp` of this are not told apart. Where the result is subnormal or 0, `exp`
# takes ten times as long on a CPU.
_LOWEST = {torch.float32: -64.0, torch.float64: -600.0}
_BLOCK = 1 << 18  # entries of a table on a CPU: it stays in the cache from operator to operator


class _Bits(NamedTuple):
    """One or two groups of bits; each half of a group has a table with a column for each pattern.

    Attributes:
        bits: Which bits.
        patterns: What the columns of all tables consist of, ``(2 * bits, columns)``: 1 in one of
            the first ``bits`` rows if the bit is 1, and in one of the others if it is 0.
        sizes: Number of columns of each table, two for each group.
        signs: 1, -1 and 0.
    """

    bits: slice
    patterns: Tensor
    sizes: tuple[int, ...]
    signs: Tensor


class _Tables(NamedTuple):
    """What the tables of some bits and a block of tokens are computed by."""

    signed: Tensor
    buffer: Tensor
    logarithms: Tensor
    probabilities: Tensor


def bit_entropy_loss(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: float = 1.0,
    batch_weight: float = 1.0,
    group_size: int | None = None,
    across_ranks: bool = False,
) -> Tensor:
    """Computes ``entropy_loss`` over the ``2**bits`` codes of independent bits.

    The codes are never enumerated. Bits are independent given a token, so the entropy of a token
    is the sum of the entropies of its bits. The entropy of the mean distribution is summed over
    groups of consecutive bits: it is exact for one group and an upper bound for several. A group
    of ``g`` bits stores ``4 * n * 2**(g / 2) + 2**g`` numbers. Computed in float32 or wider;
    gradients are finite for every finite input.

    Args:
        logits: Log-odds of each bit being 1.
        mask: True for real tokens; all others are ignored, whatever they contain.
        sample_weight: Weight of the mean entropy per token, at least 0.
        batch_weight: Weight of the entropy of the mean distribution, at least 0.
        group_size: Maximum number of bits per group, in ``[1, 20]``; by default one group holds
            all bits.
        across_ranks: Whether to use the joint batch of all ranks, as in ``entropy_loss``.

    Returns:
        A scalar, 0 without real tokens; it can be negative.

    Raises:
        TypeError: If ``logits`` is not floating point or ``mask`` is not boolean.
        ValueError: If ``logits`` has no bits, ``mask`` does not have the shape of the tokens, a
            weight is negative, or a group has less than 1 or more than 20 bits.

    Shape:
        - ``logits``: ``(..., bits)``
        - ``mask``: ``(...)``
        - returns: ``()``

    References:
        Yu et al., *Language Model Beats Diffusion: Tokenizer is Key to Visual Generation*, ICLR
        2024, equation 5. <https://arxiv.org/abs/2310.05737>
        Zhao, Xiong and Krähenbühl, *Image and Video Tokenization with Binary Spherical
        Quantization*, ICLR 2025 (groups of bits). <https://arxiv.org/abs/2406.07548>

    Examples:
        >>> import torch
        >>> from vqprior.functional import bit_entropy_loss
        >>> logits = torch.tensor([[999.0, 999.0], [-999.0, -999.0]])  # two of the four codes
        >>> bit_entropy_loss(logits)
        tensor(-0.6931)
        >>> bit_entropy_loss(logits, group_size=1)  # an upper bound of the entropy: all four
        tensor(-1.3863)
    """
    check_at_least("sample_weight", sample_weight, 0.0)
    check_at_least("batch_weight", batch_weight, 0.0)
    wide, valid = validate_logits(logits, mask)
    bits = wide.shape[-1]
    if group_size is not None:
        check_at_least("group_size", group_size, 1)
    size = bits if group_size is None else min(group_size, bits)
    if size > _MAX_GROUP_SIZE:
        raise ValueError(
            f"`group_size` must be at most {_MAX_GROUP_SIZE}, got {group_size} for {bits} bits. "
            "Pass a smaller size: the batch entropy is then an upper bound."
        )
    return bit_entropy(
        wide,
        valid,
        size,
        weights=(sample_weight, batch_weight),
        across_ranks=across_ranks,
    )


def bit_entropy(
    logits: Tensor,
    valid: Tensor,
    group_size: int,
    *,
    factor: float = 1.0,
    weights: tuple[float, float],
    across_ranks: bool,
) -> Tensor:
    """Computes ``bit_entropy_loss`` of ``factor * logits``, with weights of tokens and batch.

    Logits ``(n, bits)`` are finite and in float32 or wider; those of invalid tokens do not count.
    """
    options = group_size, factor, weights, across_ranks
    if is_traced(logits, valid) or forward_ad._current_level >= 0:
        return _by_autograd(logits, valid, *options)
    loss: Tensor = _BitEntropy.apply(logits, valid, *options)
    return loss


class _BitEntropy(torch.autograd.Function):
    """Keeps the tables, and passes the gradient to all bits of a group by one product.

    Autograd would take operators for every slice and sum. It computes derivatives of higher order
    from the plain operators; compilers and transforms get only those.
    """

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,  # noqa: ANN401
        logits: Tensor,
        valid: Tensor,
        group_size: int,
        factor: float,
        weights: tuple[float, float],
        across_ranks: bool,  # noqa: FBT001
    ) -> Tensor:
        ctx.blocks = blocks = _blocks(logits, group_size)
        packed, tables = _sums(logits, valid, blocks, factor)
        loss, count, logarithms = _loss(packed, weights, across_ranks)
        ctx.save_for_backward(logits, valid, count, logarithms, *itertools.chain(*tables))
        ctx.options = group_size, factor, weights, across_ranks
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        logits, valid, count, logarithms, *saved = ctx.saved_tensors
        _, factor, weights, across_ranks = ctx.options
        if torch.is_grad_enabled():  # for derivatives of higher order
            loss = _by_autograd(logits, valid, *ctx.options)
            of_logits = torch.autograd.grad(loss, logits, grad, create_graph=True)[0]
            return of_logits, None, None, None, None, None
        if across_ranks:
            grad = _distributed.all_reduce_sum(grad)
        of_logits, first = torch.empty_like(logits), 0
        with without_autocast(logits.device.type):
            for bits, blocks in ctx.blocks:
                last = first + sum(a * b for a, b in _pairs(bits.sizes))
                for rows in blocks:
                    tables, saved = _Tables(*saved[:4]), saved[4:]
                    of_signed = _gradient(tables, bits, logarithms[first:last], weights)
                    torch.sub(*of_signed.unbind(1), out=of_logits[rows, bits.bits])
                first = last
        return of_logits.mul_(grad / count * factor), None, None, None, None, None


def _by_autograd(
    logits: Tensor,
    valid: Tensor,
    group_size: int,
    factor: float,
    weights: tuple[float, float],
    across_ranks: bool,  # noqa: FBT001
) -> Tensor:
    packed = _sums(logits, valid, _blocks(logits, group_size), factor)[0]
    return _loss(packed, weights, across_ranks)[0]


def _sums(
    logits: Tensor, valid: Tensor, blocks: list[tuple[_Bits, list[slice]]], factor: float
) -> tuple[Tensor, list[_Tables]]:
    """Sums over valid tokens, in one vector; also returns the tables.

    The sums are those of the ``p * log(p)`` of all bits, of the tokens, and of the joint
    distributions of the bits of each group. A token's joint distribution is the outer product of
    the tables of two halves, so a matrix product sums it over the tokens.
    """
    certainties, joints, kept = [], [], []
    with without_autocast(logits.device.type):
        for bits, every in blocks:
            totals: list[Tensor] = []
            for rows in every:
                tables = _tables(logits[rows, bits.bits], valid[rows], bits, factor)
                kept.append(tables)
                certainties.append((tables.probabilities * tables.logarithms).sum())
                halves = _pairs(tables.probabilities.split(bits.sizes, dim=1))
                found = [first.T @ second for first, second in halves]
                totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
            joints += totals
    certainty = functools.reduce(torch.add, certainties)
    count = valid.sum(dtype=certainty.dtype)
    return torch.cat([part.reshape(-1) for part in (certainty, count, *joints)]), kept


def _tables(logits: Tensor, valid: Tensor, bits: _Bits, factor: float) -> _Tables:
    """Computes each token's probabilities of all patterns of each half of a group.

    No logarithm is infinite and no difference cancels: both probabilities of a bit have their own.
    """
    one, zero = bits.signs[:2, None].to(logits.dtype), bits.signs[2].to(logits.dtype)
    signed = torch.addcmul(zero, logits.unsqueeze(1), one, value=factor)
    each, buffer = torch.ops.aten.log_sigmoid_forward(signed)
    logarithms = (each.flatten(1) @ bits.patterns.to(each.dtype)).clamp_min(_LOWEST[each.dtype])
    return _Tables(signed, buffer, logarithms, logarithms.exp() * valid.unsqueeze(1))


def _loss(
    packed: Tensor,
    weights: tuple[float, float],
    across_ranks: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the loss from the sums; also returns their count and logarithms of joint means.

    Across ranks, every rank computes the same function of the joint sums: see ``entropy_loss``.
    """
    if across_ranks:
        packed = _distributed.all_reduce_sum(packed)
    count = packed[1].detach().clamp_min(1)
    means = packed / count
    joints = means[2:]
    logarithms = joints.clamp_min(torch.finfo(joints.dtype).tiny).log()
    negative_entropy = (joints * logarithms).sum()
    loss = torch.sub(weights[1] * negative_entropy, means[0], alpha=weights[0])
    return loss, count, logarithms


def _gradient(
    tables: _Tables, bits: _Bits, joint_logarithms: Tensor, weights: tuple[float, float]
) -> Tensor:
    """Returns the gradient of the signed logits, times the number of tokens.

    The derivative of ``p * log(p)`` is ``log(p) + 1``; the ones cancel, since probabilities sum
    to 1.
    """
    of_tokens, of_batch = weights
    probabilities, parts = tables.probabilities, []
    sizes = [a * b for a, b in _pairs(bits.sizes)]
    halves = _pairs(probabilities.split(bits.sizes, dim=1))
    for (first, second), joint in zip(halves, joint_logarithms.split(sizes), strict=True):
        table = joint.view(first.shape[1], second.shape[1])
        parts += [second @ table.T, first @ table]
    slope = torch.cat(parts, dim=1).mul_(of_batch)
    slope = slope.sub_(tables.logarithms, alpha=of_tokens).mul_(probabilities)
    of_each = (slope @ bits.patterns.to(slope.dtype).T).view_as(tables.signed)
    found: Tensor = torch.ops.aten.log_sigmoid_backward(of_each, tables.signed, tables.buffer)
    return found


def _blocks(logits: Tensor, group_size: int) -> list[tuple[_Bits, list[slice]]]:
    """Returns bits, two groups at a time, and for each the blocks of tokens."""
    traced = is_traced(logits)
    group = _group_bits if traced else _remembered_groups
    number = len(logits)
    found = []
    for bits in group(logits.shape[1], group_size, logits.device):
        step = max(64, _BLOCK // sum(bits.sizes)) if logits.device.type == "cpu" else number
        starts = range(0, number, step) if number > 0 and not traced else ()
        blocks = [slice(start, start + step) for start in starts]
        found.append((bits, blocks if len(blocks) > 1 else [slice(None)]))
    return found


def _group_bits(number: int, size: int, device: torch.device) -> list[_Bits]:
    """Groups ``number`` bits, each group at most ``size`` consecutive ones."""
    found = []
    for begin in range(0, number, 2 * size):
        end = min(begin + 2 * size, number)
        columns = []
        for start in range(begin, end, size):
            stop = min(start + size, end)
            middle = (start + stop + 1) // 2
            columns += [(start, middle), (middle, stop)]
        blocks = []
        for start, stop in columns:
            code = torch.arange(2 ** (stop - start), device=device)
            bit = code >> torch.arange(stop - start, device=device).unsqueeze(1) & 1
            rest = (0, 0, start - begin, end - stop)
            blocks.append(torch.cat([F.pad(part, rest) for part in (bit, 1 - bit)]).float())
        signs = 1.0 - torch.arange(3, device=device).float()
        patterns, sizes = torch.cat(blocks, dim=1), tuple(block.shape[1] for block in blocks)
        found.append(_Bits(slice(begin, end), patterns, sizes, signs[[0, 2, 1]]))
    return found


@functools.lru_cache(maxsize=64)
def _remembered_groups(number: int, size: int, device: torch.device) -> list[_Bits]:
    # Tensors made in inference mode could not be used in training later.
    with torch.inference_mode(mode=False):
        return _group_bits(number, size, device)


def _pairs(halves: Sequence[_Half]) -> list[tuple[_Half, _Half]]:
    return list(zip(halves[::2], halves[1::2], strict=True))
