"""Alignment loss between features of two networks."""

import torch
from torch import Tensor

from vqprior._checks import check_shape
from vqprior.functional import masked_mean_square


def alignment_loss(features: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes the mean of ``(features - target)^2``, with a gradient to ``features`` only.

    Computed in float32 or wider. With a mask, features must come last; without one, any layout
    works.

    Args:
        features: Features to train.
        target: Target features; detached.
        mask: True for real tokens; all others are ignored, whatever they contain. None counts
            all tokens.

    Returns:
        An unweighted scalar; 0 without real tokens.

    Raises:
        TypeError: If ``mask`` is not boolean.
        ValueError: If ``target`` does not have the shape of ``features``, or ``mask`` that of
            their tokens.

    Shape:
        - ``features``, ``target``: any, or ``(..., d)`` with a mask
        - ``mask``: ``(...)``
        - returns: ``()``

    References:
        *Texture Vector-Quantization and Reconstruction Aware Prediction for Generative
        Super-Resolution* (TVQ&RAP), 2025: the alignment of predicted structure features.
        <https://arxiv.org/abs/2509.23774>

    Examples:
        >>> import torch
        >>> from vqprior.losses import alignment_loss
        >>> alignment_loss(torch.zeros(2, 3), torch.full((2, 3), 2.0))
        tensor(4.)
    """
    check_shape("target", target, features.shape)
    dtype = torch.promote_types(features.dtype, torch.float32)
    difference = features.to(dtype) - target.detach().to(dtype)
    if mask is None:
        return difference.square().mean()
    return masked_mean_square(difference, mask)
