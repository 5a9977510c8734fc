"""Losses on products of features with features: of maps, and of codebooks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import check_codes
from vqprior._interfaces import QuantizerOutput, Selection
from vqprior.functional._losses import selections, total


def gram_loss(out: QuantizerOutput | Selection) -> Tensor:
    """Pulls the feature statistics of each sample toward those of its codes.

    The mean of ``(G(x) - G(sg[code]))^2`` over the entries of Gram matrices, with
    ``G(z) = z^T z / n`` over the ``n`` counted tokens of one sample. Dimension 0 of the
    selection's inputs is the sample and the other leading ones are its tokens; ``(n, d)`` is
    one sample. The mean runs over samples with a counted token; several codebooks add up. No
    gradient flows to the codes.

    Args:
        out: A quantizer's result, or one selection of it.

    Returns:
        An unweighted scalar in float32 or wider, 0 where no token counts.

    Shape:
        - returns: ``()``

    References:
        Chen et al., *Real-World Blind Super-Resolution via Feature Matching with Implicit
        High-Resolution Priors*, ACM Multimedia 2022 (FeMaSR), the style loss of the second
        stage. <https://arxiv.org/abs/2202.13142>

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer
        >>> from vqprior.functional import gram_loss
        >>> x = torch.randn(2, 9, 4, requires_grad=True)
        >>> gram_loss(VectorQuantizer(dim=4, codebook_size=16)(x)).backward()
        >>> x.grad.shape
        torch.Size([2, 9, 4])
    """
    return total([_gram_difference(selection) for selection in selections(out)])


def orthogonality_loss(codes: Tensor) -> Tensor:
    """Pushes the directions of codes apart: ``|C C^T|_F^2 / k^2 - 1 / k`` of their unit rows.

    The mean squared cosine over all pairs of codes, less the share of each code with itself: 0
    for orthogonal codes, at least ``1 / d - 1 / k`` for ``k > d`` of them. Stores ``d`` x
    ``d`` numbers and none for each pair. A zero code has no direction and no gradient.

    Args:
        codes: The codebook, with a gradient to what learns: ``codebook.weight()``.

    Returns:
        A scalar in float32 or wider.

    Raises:
        TypeError: If ``codes`` is not floating point.
        ValueError: If ``codes`` is not a non-empty matrix, or requires no gradient although
            gradients are enabled: a regularizer that cannot act.

    Shape:
        - ``codes``: ``(k, d)``
        - returns: ``()``

    References:
        Shin et al., *Exploration into Translation-Equivariant Image Quantization*, ICASSP 2023,
        less the constant share of the diagonal. <https://arxiv.org/abs/2112.00384>

    Examples:
        >>> import torch
        >>> from vqprior.functional import orthogonality_loss
        >>> orthogonality_loss(torch.eye(3).requires_grad_())
        tensor(0., grad_fn=<SubBackward0>)
        >>> orthogonality_loss(torch.ones(4, 2, requires_grad=True))
        tensor(0.7500, grad_fn=<SubBackward0>)
    """
    check_codes("codes", codes)
    if torch.is_grad_enabled() and not codes.requires_grad:
        raise ValueError(
            "`codes` must require a gradient, got a tensor without one. A codebook taken over by "
            "a rule does not learn from losses: leave the term out, or measure it under "
            "`torch.no_grad()`."
        )
    wide = codes.to(torch.promote_types(codes.dtype, torch.float32))
    # Rows are scaled first, since the square of a small or large length is not a number. The
    # scale is a constant: it does not change the direction.
    peak = wide.detach().abs().amax(dim=1, keepdim=True)
    unit = F.normalize(wide / torch.where(peak > 0, peak, 1.0), dim=1)
    with torch.autocast(codes.device.type, enabled=False):
        # The squares of all pairs sum to those of all pairs of features.
        return (unit.T @ unit).square().sum() / codes.shape[0] ** 2 - 1 / codes.shape[0]


def _gram_difference(selection: Selection) -> Tensor:
    inputs, codes = selection.inputs, selection.codes.detach()
    dtype = torch.promote_types(torch.promote_types(inputs.dtype, codes.dtype), torch.float32)
    valid = selection.mask
    if valid.ndim < 2:  # one sample
        inputs, codes, valid = (t.unsqueeze(0) for t in (inputs, codes, valid))
    if valid.ndim < 2:  # of one token
        inputs, codes, valid = (t.unsqueeze(0) for t in (inputs, codes, valid))
    valid = valid.flatten(1)
    num_tokens = valid.sum(dim=1)

    def gram(z: Tensor) -> Tensor:
        z = torch.where(valid.unsqueeze(-1), z.flatten(1, -2).to(dtype), 0.0)
        return z.mT @ z / num_tokens.clamp_min(1)[:, None, None]

    with torch.autocast(inputs.device.type, enabled=False):
        per_sample = (gram(inputs) - gram(codes)).square().mean(dim=(1, 2))
    return per_sample.sum() / (num_tokens > 0).sum().clamp_min(1)
