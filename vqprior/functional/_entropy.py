"""Entropies of predicted distributions: sure about each token, varied over the batch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior import _distributed
from vqprior._checks import check_at_least, check_logits, check_mask

_MAX_GROUP_SIZE = 20  # the mean joint distribution of so many bits has a million entries


def entropy_loss(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: float = 1.0,
    batch_weight: float = 1.0,
    across_ranks: bool = False,
) -> Tensor:
    """Rewards sure choices of each token and an even use of the codes by the batch.

    ``sample_weight * mean_i H(p_i) - batch_weight * H(mean_i p_i)`` with
    ``p_i = softmax(logits_i)`` and entropies in nats. Computed in float32 or wider.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        mask: True for tokens that count; what the others hold does not matter.
        sample_weight: Weight of the mean entropy of a token, at least 0.
        batch_weight: Weight of the entropy of the mean distribution, at least 0.
        across_ranks: Whether the batch is that of all ranks together. Every rank then returns
            the same value, and must go backward through it; the average of their gradients,
            which distributed training takes, is the gradient of one process with the joint
            batch. Without a process group nothing changes.

    Returns:
        A scalar, 0 where no token counts; negative where the batch is varied.

    Raises:
        TypeError: If ``logits`` is not floating point or ``mask`` is not boolean.
        ValueError: If ``logits`` has no codes, ``mask`` has another shape than the tokens, or a
            weight is negative.

    Shape:
        - ``logits``: ``(..., k)``
        - ``mask``: ``(...)``
        - returns: ``()``

    References:
        Yu et al., *Language Model Beats Diffusion: Tokenizer is Key to Visual Generation*, ICLR
        2024, equation 5. <https://arxiv.org/abs/2310.05737>

    Examples:
        >>> import torch
        >>> from vqprior.functional import entropy_loss
        >>> entropy_loss(torch.tensor([[999.0, 0.0], [0.0, 999.0]]))  # sure and varied: - log 2
        tensor(-0.6931)
        >>> entropy_loss(torch.tensor([[999.0, 0.0], [999.0, 0.0]])).abs()  # sure, all the same
        tensor(0.)
    """
    check_at_least("sample_weight", sample_weight, 0.0)
    check_at_least("batch_weight", batch_weight, 0.0)
    wide, valid = _validate_input(logits, mask)
    log_probabilities = _finite(wide.log_softmax(dim=-1))
    probabilities = torch.where(valid.unsqueeze(-1), log_probabilities.exp(), 0.0)
    entropy = -(probabilities * log_probabilities).sum()
    entropy, (mean,) = _means(entropy, [probabilities.sum(dim=0)], valid.sum(), across_ranks)
    return sample_weight * entropy - batch_weight * _entropy(mean)


def bit_entropy_loss(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: float = 1.0,
    batch_weight: float = 1.0,
    group_size: int | None = None,
    across_ranks: bool = False,
) -> Tensor:
    """``entropy_loss`` over the ``2**bits`` codes of independent bits, without listing them.

    The probability of a code is the product of those of its bits. The entropy of a token is
    then exactly the sum of the entropies of its bits. For the entropy of the mean distribution,
    consecutive bits form groups whose mean joint distributions are exact, and the entropies of
    the groups are summed: exact for one group, an upper bound for several. A group of ``g`` bits
    stores ``2 * n * 2**(g / 2) + 2**g`` numbers. Computed in float32 or wider; gradients are
    finite for every finite input.

    Args:
        logits: Log-odds of each bit being 1.
        mask: True for tokens that count; what the others hold does not matter.
        sample_weight: Weight of the mean entropy of a token, at least 0.
        batch_weight: Weight of the entropy of the mean distribution, at least 0.
        group_size: Most bits of one group, at least 1 and at most 20; by default all bits form
            one group.
        across_ranks: Whether the batch is that of all ranks together, as in ``entropy_loss``.

    Returns:
        A scalar, 0 where no token counts; negative where the batch is varied.

    Raises:
        TypeError: If ``logits`` is not floating point or ``mask`` is not boolean.
        ValueError: If ``logits`` has no bits, ``mask`` has another shape than the tokens, a
            weight is negative, or a group is empty or has more than 20 bits.

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
        >>> sure = torch.tensor([[999.0, 999.0], [-999.0, -999.0]])  # two of the four codes
        >>> bit_entropy_loss(sure)
        tensor(-0.6931)
        >>> bit_entropy_loss(sure, group_size=1)  # each bit alone looks like all four
        tensor(-1.3863)
    """
    check_at_least("sample_weight", sample_weight, 0.0)
    check_at_least("batch_weight", batch_weight, 0.0)
    wide, valid = _validate_input(logits, mask)
    bits = wide.shape[-1]
    if group_size is not None:
        check_at_least("group_size", group_size, 1)
    size = bits if group_size is None else min(group_size, bits)
    if size > _MAX_GROUP_SIZE:
        raise ValueError(
            f"`group_size` must be at most {_MAX_GROUP_SIZE}, got {group_size} for {bits} bits. "
            "Take a smaller one: the entropies of the groups bound that of all bits from above."
        )
    distance = wide.abs()  # the entropy is even in the log-odds; so, no term cancels another
    entropies = F.softplus(-distance) + distance * (-distance).sigmoid()
    entropy = torch.where(valid.unsqueeze(-1), entropies, 0.0).sum()
    joints = [_joint(group, valid) for group in wide.split(size, dim=-1)]
    entropy, means = _means(entropy, joints, valid.sum(), across_ranks)
    return sample_weight * entropy - batch_weight * sum(
        (_entropy(mean) for mean in means), torch.zeros_like(entropy)
    )


def kl_to_uniform(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Divergence of the predicted distributions from the uniform one: the prior term of dVAEs.

    The mean over valid tokens of ``sum_j q_j log(k q_j)`` with ``q = softmax(logits)``:
    between 0, where all codes are as likely, and ``log(k)``, where one is certain. Computed in
    float32 or wider.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        mask: True for tokens that count; what the others hold does not matter.

    Returns:
        A scalar in nats, 0 where no token counts.

    Raises:
        TypeError: If ``logits`` is not floating point or ``mask`` is not boolean.
        ValueError: If ``logits`` has no codes or ``mask`` has another shape than the tokens.

    Shape:
        - ``logits``: ``(..., k)``
        - ``mask``: ``(...)``
        - returns: ``()``

    References:
        Ramesh et al., *Zero-Shot Text-to-Image Generation*, ICML 2021, section 2.1.
        <https://arxiv.org/abs/2102.12092>

    Examples:
        >>> import torch
        >>> from vqprior.functional import kl_to_uniform
        >>> kl_to_uniform(torch.tensor([[0.0, 0.0], [99.0, 0.0]]))  # half of log 2
        tensor(0.3466)
    """
    wide, valid = _validate_input(logits, mask)
    log_probabilities = _finite(wide.log_softmax(dim=-1))
    terms = log_probabilities.exp() * (log_probabilities + math.log(wide.shape[-1]))
    total = torch.where(valid, terms.sum(dim=-1), 0.0).sum()
    return total / valid.sum().clamp_min(1)


def _validate_input(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Checks; returns wide logits ``(n, k)``, with zeros where masked, and the mask ``(n,)``."""
    check_logits("logits", logits)
    shape = logits.shape[:-1]
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=logits.device)
    check_mask(mask, shape)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = torch.where(mask.unsqueeze(-1), wide, 0.0)
    return wide.reshape(-1, wide.shape[-1]), mask.reshape(-1)


def _finite(log_probabilities: Tensor) -> Tensor:
    """Lets a probability of 0 times its logarithm be 0, in the backward pass too."""
    return log_probabilities.clamp_min(torch.finfo(log_probabilities.dtype).min)


def _entropy(probabilities: Tensor) -> Tensor:
    logarithms = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return -(probabilities * logarithms).sum()


def _means(
    entropy: Tensor,
    sums: list[Tensor],
    count: Tensor,
    across_ranks: bool,  # noqa: FBT001
) -> tuple[Tensor, list[Tensor]]:
    """Divides sums over tokens by their number, here or over all ranks.

    Across ranks every rank computes the same function ``f`` of the joint sums. The backward
    pass of the sum over ranks adds up the ``R`` equal gradients that reach it, so each rank's
    parameters receive ``R * f'`` times the derivative of its own share of the sums. Averaged
    over ranks, that is ``f'`` times the derivative of the joint sums: the gradient of one
    process, for both terms, without a correction. One collective carries everything.
    """
    packed = torch.cat([entropy.reshape(1), count.reshape(1).to(entropy), *map(torch.ravel, sums)])
    if across_ranks:
        packed = _distributed.all_reduce_sum(packed)
    means = packed / packed[1].detach().clamp_min(1)
    parts = means[2:].split([part.numel() for part in sums])
    return means[0], list(parts)


def _joint(logits: Tensor, valid: Tensor) -> Tensor:
    """The sum over valid tokens of the joint distribution of some independent bits.

    Of the two halves of the bits, each has a table of ``2**(g / 2)`` probabilities a token; one
    matrix product sums the outer products of both over the tokens.
    """
    half = (logits.shape[-1] + 1) // 2
    first, second = _product(logits[:, :half]), _product(logits[:, half:])
    first = torch.where(valid.unsqueeze(-1), first, 0.0)
    with torch.autocast(logits.device.type, enabled=False):
        return first.T @ second


def _product(logits: Tensor) -> Tensor:
    """The distribution of each token over all patterns of its bits: ``(n, g) -> (n, 2**g)``.

    Products of probabilities and of their complements, each computed by itself: there is no
    logarithm that could be infinite and no difference that could cancel.
    """
    table = logits.new_ones(logits.shape[0], 1)
    for bit in logits.split(1, dim=1) if logits.shape[1] else ():
        pair = torch.cat([(-bit).sigmoid(), bit.sigmoid()], dim=1)
        table = (pair.unsqueeze(2) * table.unsqueeze(1)).flatten(1)
    return table
