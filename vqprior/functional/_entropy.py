"""Entropy losses on predicted distributions over codes."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior import _distributed
from vqprior._checks import check_at_least, check_logits, check_mask
from vqprior._precision import without_autocast

_MAX_GROUP_SIZE = 20  # the joint distribution of 20 bits has a million entries


def entropy_loss(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: float = 1.0,
    batch_weight: float = 1.0,
    across_ranks: bool = False,
) -> Tensor:
    """Encourages confident assignments per token and uniform codebook usage over the batch.

    Computes ``sample_weight * mean_i H(p_i) - batch_weight * H(mean_i p_i)`` with
    ``p_i = softmax(logits_i)`` and entropies in nats, in float32 or wider.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        mask: True for real tokens; all others are ignored, whatever they contain.
        sample_weight: Weight of the mean entropy per token, at least 0.
        batch_weight: Weight of the entropy of the mean distribution, at least 0.
        across_ranks: Whether to use the joint batch of all ranks. Every rank then returns the
            same value and must run backward through it; the gradients averaged over ranks, as
            in ``DistributedDataParallel``, equal those of one process with the joint batch.
            Has no effect without a process group.

    Returns:
        A scalar, 0 without real tokens; it can be negative.

    Raises:
        TypeError: If ``logits`` is not floating point or ``mask`` is not boolean.
        ValueError: If ``logits`` has no codes, ``mask`` does not have the shape of the tokens, or
            a weight is negative.

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
        >>> entropy_loss(torch.tensor([[999.0, 0.0], [0.0, 999.0]]))  # both codes used: -log 2
        tensor(-0.6931)
        >>> entropy_loss(torch.tensor([[999.0, 0.0], [999.0, 0.0]])).abs()  # only one used
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
    """Computes ``entropy_loss`` over the ``2**bits`` codes of independent bits.

    The codes are never enumerated. Bits are independent given a token, so the entropy of a token
    is the sum of the entropies of its bits. The entropy of the mean distribution is summed over
    groups of consecutive bits: it is exact for one group and an upper bound for several. A group
    of ``g`` bits stores ``2 * n * 2**(g / 2) + 2**g`` numbers. Computed in float32 or wider;
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
    wide, valid = _validate_input(logits, mask)
    bits = wide.shape[-1]
    if group_size is not None:
        check_at_least("group_size", group_size, 1)
    size = bits if group_size is None else min(group_size, bits)
    if size > _MAX_GROUP_SIZE:
        raise ValueError(
            f"`group_size` must be at most {_MAX_GROUP_SIZE}, got {group_size} for {bits} bits. "
            "Pass a smaller size: the batch entropy is then an upper bound."
        )
    distance = wide.abs()  # the entropy is even in the log-odds; with |x| no terms cancel
    entropies = F.softplus(-distance) + distance * (-distance).sigmoid()
    entropy = torch.where(valid.unsqueeze(-1), entropies, 0.0).sum()
    joints = [_joint(group, valid) for group in wide.split(size, dim=-1)]
    entropy, means = _means(entropy, joints, valid.sum(), across_ranks)
    return sample_weight * entropy - batch_weight * sum(
        (_entropy(mean) for mean in means), torch.zeros_like(entropy)
    )


def kl_to_uniform(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes the KL divergence of predicted distributions from the uniform one, as in dVAEs.

    The mean over real tokens of ``sum_j q_j log(k q_j)`` with ``q = softmax(logits)``: 0 for a
    uniform distribution, ``log(k)`` for a one-hot one. Computed in float32 or wider.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        mask: True for real tokens; all others are ignored, whatever they contain.

    Returns:
        A scalar in nats, 0 without real tokens.

    Raises:
        TypeError: If ``logits`` is not floating point or ``mask`` is not boolean.
        ValueError: If ``logits`` has no codes or ``mask`` does not have the shape of the tokens.

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
    """Checks the input; returns zeroed and widened logits ``(n, k)`` and the mask ``(n,)``."""
    check_logits("logits", logits)
    shape = logits.shape[:-1]
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=logits.device)
    check_mask(mask, shape)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = torch.where(mask.unsqueeze(-1), wide, 0.0)
    return wide.reshape(-1, wide.shape[-1]), mask.reshape(-1)


def _finite(log_probabilities: Tensor) -> Tensor:
    """Clamps log-probabilities so that ``p * log(p)`` is 0 for ``p = 0``, backward too."""
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
    """Divides sums over tokens by the number of tokens, on this rank or over all ranks.

    Across ranks, every rank computes the same function ``f`` of the joint sums. The backward
    pass of the all-reduce sums ``R`` equal gradients, so a rank's parameters receive ``R * f'``
    times the derivative of its own share of the sums. Averaged over ranks, that is the gradient
    of one process, for both terms, without a correction. One collective carries everything.
    """
    packed = torch.cat([entropy.reshape(1), count.reshape(1).to(entropy), *map(torch.ravel, sums)])
    if across_ranks:
        packed = _distributed.all_reduce_sum(packed)
    means = packed / packed[1].detach().clamp_min(1)
    parts = means[2:].split([part.numel() for part in sums])
    return means[0], list(parts)


def _joint(logits: Tensor, valid: Tensor) -> Tensor:
    """Sums the joint distribution of independent bits over valid tokens.

    Each half of the bits has a table of ``2**(g / 2)`` probabilities per token. One matrix
    product sums the outer products of the two tables over the tokens.
    """
    half = (logits.shape[-1] + 1) // 2
    first, second = _product(logits[:, :half]), _product(logits[:, half:])
    first = torch.where(valid.unsqueeze(-1), first, 0.0)
    with without_autocast(logits.device.type):
        return first.T @ second


def _product(logits: Tensor) -> Tensor:
    """Returns each token's distribution over all bit patterns: ``(n, g) -> (n, 2**g)``.

    ``p`` and ``1 - p`` are both computed by a sigmoid, so no logarithm can be infinite and no
    difference can cancel.
    """
    table = logits.new_ones(logits.shape[0], 1)
    for bit in logits.split(1, dim=1) if logits.shape[1] else ():
        pair = torch.cat([(-bit).sigmoid(), bit.sigmoid()], dim=1)
        table = (pair.unsqueeze(2) * table.unsqueeze(1)).flatten(1)
    return table
