"""Losses on Gram matrices of features and of codebooks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import check_codes
from vqprior._precision import without_autocast
from vqprior._results import QuantizerOutput, Selection
from vqprior._transforms import is_learning
from vqprior.functional._losses import selections, total


def gram_loss(out: QuantizerOutput | Selection) -> Tensor:
    """Style loss: pulls the Gram matrix of each sample toward that of its codes.

    Computes the mean of ``(G(x) - G(sg[code]))^2`` over the entries of Gram matrices, with
    ``G(z) = z^T z / n`` over the ``n`` valid tokens of one sample. Dimension 0 of the
    selection's inputs is the sample and the other leading dimensions are its tokens; ``(n, d)``
    is one sample. The loss is averaged over samples with a valid token and summed over
    codebooks. No gradient flows to the codes.

    Args:
        out: A quantizer's result, or one of its selections.

    Returns:
        An unweighted scalar in float32 or wider, 0 if no token is valid.

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
    """Pushes the directions of codes apart: ``|C C^T|_F^2 / k^2 - 1 / k`` for unit rows ``C``.

    This is the mean squared cosine over all pairs of codes, minus the constant share of each
    code with itself: 0 for orthogonal codes, at least ``1 / d - 1 / k`` for ``k > d`` codes.
    Stores ``d`` x ``d`` numbers instead of ``k`` x ``k``. A zero code gets no gradient.

    Args:
        codes: The codebook with gradients enabled, for example ``codebook.codes()``.

    Returns:
        A scalar in float32 or wider.

    Raises:
        TypeError: If ``codes`` is not floating point.
        ValueError: If ``codes`` is not a non-empty matrix, or does not require gradients while
            gradients are enabled, so that the loss would have no effect.

    Shape:
        - ``codes``: ``(k, d)``
        - returns: ``()``

    References:
        Shin et al., *Exploration into Translation-Equivariant Image Quantization*, ICASSP 2023,
        minus the constant share of the diagonal. <https://arxiv.org/abs/2112.00384>

    Examples:
        >>> import torch
        >>> from vqprior.functional import orthogonality_loss
        >>> orthogonality_loss(torch.eye(3).requires_grad_())
        tensor(0., grad_fn=<SubBackward0>)
        >>> orthogonality_loss(torch.ones(4, 2, requires_grad=True))
        tensor(0.7500, grad_fn=<SubBackward0>)
    """
    check_codes("codes", codes)
    if torch.is_grad_enabled() and not is_learning(codes):
        raise ValueError(
            "`codes` must require gradients, got a tensor that does not. A codebook that a rule "
            "updates does not learn from losses: drop this term, or measure it under "
            "`torch.no_grad()`."
        )
    wide = codes.to(torch.promote_types(codes.dtype, torch.float32))
    # Scale rows first: squares of very small or large lengths under- or overflow. The scale is a
    # constant and does not change the direction.
    peak = wide.detach().abs().amax(dim=1, keepdim=True)
    unit = F.normalize(wide / torch.where(peak > 0, peak, 1.0), dim=1)
    with without_autocast(codes.device.type):
        # |C C^T|_F equals |C^T C|_F, which needs only d x d numbers.
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

    with without_autocast(inputs.device.type):
        per_sample = (gram(inputs) - gram(codes)).square().mean(dim=(1, 2))
    return per_sample.sum() / (num_tokens > 0).sum().clamp_min(1)
