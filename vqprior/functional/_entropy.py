"""Entropy losses on predicted distributions over codes."""

import math

import torch
from torch import Tensor

from vqprior import _distributed
from vqprior._checks import check_at_least, check_logits, check_mask


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
    wide, valid = validate_logits(logits, mask)
    log_probabilities = _finite(wide.log_softmax(dim=-1))
    probabilities = torch.where(valid.unsqueeze(-1), log_probabilities.exp(), 0.0)
    entropy = -(probabilities * log_probabilities).sum()
    packed = torch.cat([entropy.reshape(1), valid.sum().reshape(1), probabilities.sum(dim=0)])
    if across_ranks:
        # Every rank computes the same function of the joint sums. The backward pass of the
        # all-reduce sums R equal gradients, so a rank gets R times the derivative with respect to
        # its share of the sums. Averaged over ranks, that is the gradient of one process, for both
        # terms, without a correction.
        packed = _distributed.all_reduce_sum(packed)
    means = packed / packed[1].detach().clamp_min(1)
    return sample_weight * means[0] - batch_weight * _entropy(means[2:])


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
    wide, valid = validate_logits(logits, mask)
    log_probabilities = _finite(wide.log_softmax(dim=-1))
    terms = log_probabilities.exp() * (log_probabilities + math.log(wide.shape[-1]))
    total = torch.where(valid, terms.sum(dim=-1), 0.0).sum()
    return total / valid.sum().clamp_min(1)


def validate_logits(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
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
