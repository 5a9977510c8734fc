"""Unweighted commitment and codebook losses, as functions of a quantizer's result."""

from typing import Any

import torch
from torch import Tensor

from vqprior._checks import check_instance, check_mask, check_tensor
from vqprior._results import QuantizerOutput, Selection
from vqprior.functional._kernels._host import count_true, is_on_host, where_valid
from vqprior.functional._kernels._operators import apply, with_signature


def masked_mean_square(difference: Tensor, mask: Tensor) -> Tensor:
    """Computes the mean square over the features of real tokens, in float32 or wider.

    Args:
        difference: Differences to square.
        mask: True for real tokens; all others are ignored, whatever they contain.

    Returns:
        A scalar, 0 without real tokens.

    Raises:
        TypeError: If ``mask`` is not boolean.
        ValueError: If ``mask`` does not have the shape of the tokens.

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
    check_tensor("difference", difference)
    check_mask(mask, difference.shape[:-1])
    wide = difference.to(torch.promote_types(difference.dtype, torch.float32))
    squares = torch.where(mask.unsqueeze(-1), wide, 0.0).square()
    return squares.sum() / (mask.sum() * difference.shape[-1]).clamp_min(1)


def commitment_loss(out: QuantizerOutput | Selection) -> Tensor:
    """Pulls inputs toward their chosen codes: mean of ``(x - sg[code])^2``.

    The loss is averaged over valid tokens and features and summed over codebooks.

    Args:
        out: A quantizer's result, or one of its selections.

    Returns:
        An unweighted scalar in float32 or wider, 0 if no token is valid.

    Shape:
        - returns: ``()``

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017, third term of equation 3, with the mean over features instead of the
        sum. <https://arxiv.org/abs/1711.00937>

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer
        >>> from vqprior.functional import commitment_loss
        >>> out = VectorQuantizer(dim=4, codebook_size=16)(torch.randn(8, 4))
        >>> torch.equal(0.25 * commitment_loss(out), out.terms["commitment"])
        True
    """
    return total(
        [
            commitment_and_codebook_mse(s.inputs, s.codes.detach(), s.mask)[0]
            for s in selections(out)
        ]
    )


def codebook_loss(out: QuantizerOutput | Selection) -> Tensor:
    """Pulls chosen codes toward their inputs: mean of ``(sg[x] - code)^2``.

    The loss is averaged over valid tokens and features and summed over codebooks.

    Args:
        out: A quantizer's result, or one of its selections.

    Returns:
        An unweighted scalar in float32 or wider, 0 if no token is valid.

    Shape:
        - returns: ``()``

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017, second term of equation 3, with the mean over features instead of the
        sum. <https://arxiv.org/abs/1711.00937>

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer
        >>> from vqprior.functional import codebook_loss
        >>> out = VectorQuantizer(dim=4, codebook_size=16)(torch.randn(8, 4))
        >>> torch.equal(codebook_loss(out), out.terms["codebook"])
        True
    """
    return total(
        [
            commitment_and_codebook_mse(s.inputs.detach(), s.codes, s.mask)[1]
            for s in selections(out)
        ]
    )


def symmetric_vq_loss(out: QuantizerOutput | Selection) -> Tensor:
    """Pulls inputs and chosen codes toward each other: mean of ``(x - code)^2``.

    Its gradient is the sum of those of ``commitment_loss`` and ``codebook_loss``. The loss is
    averaged over valid tokens and features and summed over codebooks.

    Args:
        out: A quantizer's result, or one of its selections.

    Returns:
        An unweighted scalar in float32 or wider, 0 if no token is valid.

    Shape:
        - returns: ``()``

    Examples:
        >>> import torch
        >>> from vqprior import EmbeddingCodebook, VectorQuantizer
        >>> from vqprior.functional import symmetric_vq_loss
        >>> x = torch.randn(8, 4, requires_grad=True)
        >>> vq = VectorQuantizer(4, 16, codebook=EmbeddingCodebook(16, 4))
        >>> symmetric_vq_loss(vq(x)).backward()
        >>> torch.allclose(x.grad.sum(dim=0), -vq.codebook.weight.grad.sum(dim=0))
        True
    """
    both = [commitment_and_codebook_mse(s.inputs, s.codes, s.mask) for s in selections(out)]
    return total([on_inputs + (on_codes - on_codes.detach()) for on_inputs, on_codes in both])


def commitment_and_codebook_mse(
    inputs: Tensor, codes: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the mean squared error twice: with a gradient to the inputs, and to the codes."""
    both: tuple[Tensor, Tensor] = apply(_MeanSquareError, inputs, codes, mask)
    return both


@with_signature
class _MeanSquareError(torch.autograd.Function):
    """Computes one difference in each direction for both losses."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, codes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        difference = _difference(inputs, codes, mask)
        mean = difference.mul_(difference).sum() / _count(inputs, mask)
        return mean, mean.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: object) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs)

    @staticmethod
    def tangent(
        ctx: Any,  # noqa: ANN401
        of_inputs: Tensor,
        of_codes: Tensor,
        _: None,
    ) -> tuple[Tensor, Tensor]:
        inputs, codes, mask = ctx.saved_tensors
        difference = _difference(inputs, codes, mask)
        slope = 2 / _count(inputs, mask)
        return slope * (difference * of_inputs).sum(), -slope * (difference * of_codes).sum()

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        on_inputs: Tensor,
        on_codes: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, codes, mask = ctx.saved_tensors
        difference = _difference(inputs, codes, mask)
        slope = 2 / _count(inputs, mask)
        grad_inputs = grad_codes = None
        if ctx.needs_input_grad[0]:
            grad_inputs = (difference * (slope * on_inputs)).to(inputs.dtype)
        if ctx.needs_input_grad[1]:
            grad_codes = (difference * (-slope * on_codes)).to(codes.dtype)
        return grad_inputs, grad_codes, None


def _difference(inputs: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(inputs.dtype, codes.dtype), torch.float32)
    return where_valid(mask, inputs.to(dtype) - codes.to(dtype), 0.0)


def _count(inputs: Tensor, mask: Tensor) -> Tensor | int:
    """Returns the number of valid entries, at least 1."""
    if is_on_host(mask):
        return max(1, count_true(mask) * inputs.shape[-1])
    return (mask.sum() * inputs.shape[-1]).clamp_min(1)


def total(losses: list[Tensor]) -> Tensor:
    """Sums the losses of several codebooks; 0 without any."""
    return torch.stack(losses).sum() if losses else torch.zeros(())


def selections(out: QuantizerOutput | Selection) -> tuple[Selection, ...]:
    """Returns the selections of a result, or the given selection as a tuple."""
    if isinstance(out, Selection):
        return (out,)
    check_instance("out", out, QuantizerOutput, "Pass what a quantizer returned.")
    return out.selections
