"""Entropy loss over the codes of independent bits, without listing the codes."""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vqprior import _distributed
from vqprior._checks import check_at_least
from vqprior._precision import without_autocast
from vqprior.functional._entropy import validate_logits
from vqprior.functional._kernels._bit_tables import (
    Bits,
    Tables,
    gradient,
    make_tables,
    pairs,
    split_blocks,
)
from vqprior.functional._kernels._operators import is_traced

_MAX_GROUP_SIZE = 20  # the joint distribution of 20 bits has a million entries


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
        valid.sum(),
        size,
        weights=(sample_weight, batch_weight),
        across_ranks=across_ranks,
    )


def bit_entropy(
    logits: Tensor,
    valid: Tensor,
    count: Tensor,
    group_size: int,
    *,
    factor: float = 1.0,
    weights: tuple[float, float],
    across_ranks: bool,
) -> Tensor:
    """Computes ``bit_entropy_loss`` of ``factor * logits``, with weights of tokens and batch.

    Logits ``(n, bits)`` are finite and in float32 or wider. Those of invalid tokens do not count;
    ``count`` is the number of the others.
    """
    options = group_size, factor, weights, across_ranks
    if is_traced(logits, valid) or forward_ad._current_level >= 0:
        return _by_autograd(logits, valid, count, *options)
    loss: Tensor = _BitEntropy.apply(logits, valid, count, *options)
    return loss


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the sum of a contiguous tensor over the ranks: itself, if there is one rank."""
    return _distributed.all_reduce_sum(tensor)


def sum_over_ranks_(tensor: Tensor) -> None:
    """Sums a contiguous tensor over the ranks, in place."""
    _distributed.all_reduce_sum_(tensor)


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
        count: Tensor,
        group_size: int,
        factor: float,
        weights: tuple[float, float],
        across_ranks: bool,  # noqa: FBT001
    ) -> Tensor:
        ctx.blocks = blocks = split_blocks(logits, group_size)
        packed, tables = _sums(logits, valid, count, blocks, factor)
        loss, total, logarithms = _loss(packed, weights, across_ranks)
        kept = itertools.chain(*tables)
        ctx.save_for_backward(logits, valid, count, total, logarithms, *kept)
        ctx.options = group_size, factor, weights, across_ranks
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        logits, valid, count, total, logarithms, *saved = ctx.saved_tensors
        _, factor, weights, across_ranks = ctx.options
        if torch.is_grad_enabled():  # for derivatives of higher order
            loss = _by_autograd(logits, valid, count, *ctx.options)
            of_logits = torch.autograd.grad(loss, logits, grad, create_graph=True)[0]
            return of_logits, *(None,) * 6
        if across_ranks:
            grad = _distributed.all_reduce_sum(grad)
        of_logits, first = torch.empty_like(logits), 0
        with without_autocast(logits.device.type):
            for bits, blocks in ctx.blocks:
                last = first + sum(a * b for a, b in pairs(bits.sizes))
                for rows in blocks:
                    tables, saved = Tables(*saved[:4]), saved[4:]
                    of_signed = gradient(tables, bits, logarithms[first:last], weights[0], factor)
                    torch.sub(*of_signed.unbind(1), out=of_logits[rows, bits.places])
                first = last
        return of_logits.mul_(grad / total), *(None,) * 6


def _by_autograd(
    logits: Tensor,
    valid: Tensor,
    count: Tensor,
    group_size: int,
    factor: float,
    weights: tuple[float, float],
    across_ranks: bool,  # noqa: FBT001
) -> Tensor:
    blocks = split_blocks(logits, group_size)
    packed = _sums(logits, valid, count, blocks, factor)[0]
    return _loss(packed, weights, across_ranks)[0]


def _sums(
    logits: Tensor,
    valid: Tensor,
    count: Tensor,
    blocks: list[tuple[Bits, list[slice]]],
    factor: float,
) -> tuple[Tensor, list[Tables]]:
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
                tables = make_tables(logits[rows, bits.places], valid[rows], bits, factor)
                kept.append(tables)
                logarithms = tables.logarithms.flatten()
                certainties.append(torch.dot(tables.probabilities.flatten(), logarithms))
                halves = pairs(tables.probabilities.split(bits.sizes, dim=1))
                found = [first.T @ second for first, second in halves]
                totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
            joints += totals
    certainty = functools.reduce(torch.add, certainties)
    return torch.cat([part.reshape(-1) for part in (certainty, count, *joints)]), kept


def _loss(
    packed: Tensor,
    weights: tuple[float, float],
    across_ranks: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the loss from the sums; also returns what the gradient takes of it.

    Across ranks, every rank computes the same function of the joint sums: see ``entropy_loss``.
    """
    if across_ranks:
        packed = _distributed.all_reduce_sum(packed)
    count = packed[1].detach().clamp_min(1)
    means = packed / count
    joints = means[2:]
    logarithms = joints.clamp_min(torch.finfo(joints.dtype).tiny).log() * weights[1]
    loss = torch.sub(torch.dot(joints, logarithms), means[0], alpha=weights[0])
    return loss, count, logarithms
