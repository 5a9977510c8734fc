"""Losses as functions of what codebooks saw and chose; weighted where the sum is written."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import (
    check_floating,
    check_integer,
    check_interval,
    check_mask,
    check_shape,
)
from vqprior._interfaces import QuantizerOutput, Selection


def masked_mean_square(difference: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of squares over the tokens where ``mask`` is True, 0 if there is none.

    Computed in float32 or wider.

    Args:
        difference: Differences to square; what masked tokens hold does not matter.
        mask: True for tokens that count.

    Returns:
        A scalar.

    Raises:
        TypeError: If ``mask`` is not boolean.
        ValueError: If ``mask`` has another shape than the tokens.

    Shape:
        - ``difference``: ``(..., d)``
        - ``mask``: ``(...)``
        - returns: ``()``

    Examples:
        >>> import torch
        >>> from vqprior.functional import masked_mean_square
        >>> x = torch.tensor([[1.0, 3.0], [float("nan"), 0.0]])
        >>> masked_mean_square(x, torch.tensor([True, False]))
        tensor(5.)
    """
    check_mask(mask, difference.shape[:-1])
    wide = difference.to(torch.promote_types(difference.dtype, torch.float32))
    squares = torch.where(mask.unsqueeze(-1), wide, 0.0).square()
    return squares.sum() / (mask.sum() * difference.shape[-1]).clamp_min(1)


def commitment_loss(out: QuantizerOutput | Selection) -> Tensor:
    """Pulls what was quantized toward the chosen codes: mean of ``(x - sg[code])^2``.

    The mean runs over counted tokens and features; several codebooks add up.

    Args:
        out: A quantizer's result, or one selection of it.

    Returns:
        An unweighted scalar in float32 or wider, 0 where no token counts.

    Shape:
        - returns: ``()``

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017, third term of equation 3, with the mean over features in place of the
        sum. <https://arxiv.org/abs/1711.00937>

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer
        >>> from vqprior.functional import commitment_loss
        >>> out = VectorQuantizer(dim=4, codebook_size=16)(torch.randn(8, 4))
        >>> torch.equal(0.25 * commitment_loss(out), out.terms["commitment"])
        True
    """
    return _total(
        [_mean_square_error(s.inputs, s.codes.detach(), s.mask) for s in _selections(out)]
    )


def codebook_loss(out: QuantizerOutput | Selection) -> Tensor:
    """Pulls the chosen codes toward what was quantized: mean of ``(sg[x] - code)^2``.

    The mean runs over counted tokens and features; several codebooks add up.

    Args:
        out: A quantizer's result, or one selection of it.

    Returns:
        An unweighted scalar in float32 or wider, 0 where no token counts.

    Shape:
        - returns: ``()``

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017, second term of equation 3, with the mean over features in place of the
        sum. <https://arxiv.org/abs/1711.00937>

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer
        >>> from vqprior.functional import codebook_loss
        >>> out = VectorQuantizer(dim=4, codebook_size=16)(torch.randn(8, 4))
        >>> torch.equal(codebook_loss(out), out.terms["codebook"])
        True
    """
    return _total(
        [_mean_square_error(s.inputs.detach(), s.codes, s.mask) for s in _selections(out)]
    )


def code_cross_entropy(logits: Tensor, indices: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of predicted logits against true indices: code-level supervision.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        indices: True indices; tokens with -1 are left out.
        label_smoothing: Share of the target spread evenly over all codes, in ``[0, 1)``.

    Returns:
        The mean over counted tokens in nats, in float32 or wider; 0 where no token counts.

    Raises:
        TypeError: If ``logits`` is not floating point or ``indices`` not an integer tensor.
        ValueError: If the shapes do not fit or ``label_smoothing`` is out of range.

    Shape:
        - ``logits``: ``(..., k)``
        - ``indices``: ``(...)``
        - returns: ``()``

    Examples:
        >>> import torch
        >>> from vqprior.functional import code_cross_entropy
        >>> logits = torch.tensor([[0.0, 0.0], [9.0, 9.0], [float("nan"), 0.0]])
        >>> code_cross_entropy(logits, torch.tensor([0, 1, -1]))
        tensor(0.6931)
    """
    check_floating("logits", logits)
    check_integer("indices", indices)
    check_shape("indices", indices, logits.shape[:-1])
    check_interval("label_smoothing", label_smoothing, 0.0, 1.0)
    counted = indices >= 0
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = torch.where(counted.unsqueeze(-1), wide, 0.0)
    total = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]),
        indices.reshape(-1).long(),
        ignore_index=-1,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / counted.sum().clamp_min(1)


def _mean_square_error(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return masked_mean_square(a.to(dtype) - b.to(dtype), mask)


def _total(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum() if losses else torch.zeros(())


def _selections(out: QuantizerOutput | Selection) -> tuple[Selection, ...]:
    return (out,) if isinstance(out, Selection) else out.selections
