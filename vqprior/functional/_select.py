"""Selecting codes by predicted logits, differentiably: the reconstruction-aware primitive."""

from typing import Any

import torch
from torch import Tensor

from vqprior._checks import (
    check_choice,
    check_codes,
    check_floating,
    check_positive,
)
from vqprior.functional._random import to_gumbel

_ESTIMATORS = ("straight_through", "soft", "gumbel", "reinmax")


def select_codes(
    logits: Tensor,
    codes: Tensor,
    *,
    estimator: str = "straight_through",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Picks one code for each token and lets a loss on the result train the logits.

    With ``p = softmax(logits / temperature)`` and ``g`` the gradient of the returned vectors,
    the logits receive ``p * (<g, codes> - sum_j p_j <g, codes_j>) / temperature``, as if the
    vectors had been the mean code under ``p``. No one-hot matrix is built. The behavior does
    not depend on any module's training mode. Codes that require a gradient receive that of the
    lookup; pass ``codes.detach()`` to keep a prior frozen.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        codes: The codebook.
        estimator: How to choose and to differentiate:

            - ``"straight_through"``: the arg-max code, bit for bit; deterministic.
            - ``"soft"``: the mean code under ``p``; the only one whose value is not a code.
            - ``"gumbel"``: a code drawn from ``softmax(logits)``; the gradient uses the
              perturbed logits at ``temperature``.
            - ``"reinmax"``: a code drawn from ``softmax(logits)``; second-order gradient.
        temperature: Greater than 0. Softens (above 1) or sharpens ``p`` in the gradient, and
            in the value of ``"soft"``.
        generator: Source of randomness of ``"gumbel"`` and ``"reinmax"``.

    Returns:
        ``(vectors, indices)``: the selected vectors in the dtype of ``codes``, and which
        codes they are, as ``int64`` (for ``"soft"``, the most likely ones).

    Raises:
        TypeError: If ``logits`` or ``codes`` is not floating point.
        ValueError: If the shapes do not fit, ``estimator`` is unknown or ``temperature`` is
            not greater than 0.

    Shape:
        - ``logits``: ``(..., k)``
        - ``codes``: ``(k, d)``
        - returns: ``(..., d)`` and ``(...)``

    References:
        Li et al., *Texture Vector-Quantization and Reconstruction Aware Prediction for
        Generative Super-Resolution*, ICLR 2026 (straight-through, temperature 1).
        <https://arxiv.org/abs/2509.23774>
        Jang, Gu and Poole, *Categorical Reparameterization with Gumbel-Softmax*, ICLR 2017.
        <https://arxiv.org/abs/1611.01144>
        Liu et al., *Bridging Discrete and Backpropagation: Straight-Through and Beyond*,
        NeurIPS 2023, algorithm 2 (ReinMax). <https://arxiv.org/abs/2304.08612>

    Examples:
        >>> import torch
        >>> from vqprior.functional import select_codes
        >>> codes = torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
        >>> logits = torch.tensor([[0.1, 0.3, 0.2]], requires_grad=True)
        >>> vectors, indices = select_codes(logits, codes)
        >>> vectors.detach(), indices
        (tensor([[1., 1.]]), tensor([1]))
        >>> (vectors - torch.tensor([4.0, 0.0])).square().sum().backward()
        >>> logits.grad.argmin().item()  # descending raises the logit of the code it wants
        2
    """
    check_floating("logits", logits)
    check_codes("codes", codes)
    if logits.ndim == 0 or logits.shape[-1] != codes.shape[0]:
        raise ValueError(
            f"`logits` must have shape (..., {codes.shape[0]}), one entry for each code, "
            f"got {tuple(logits.shape)}."
        )
    check_choice("estimator", estimator, _ESTIMATORS)
    check_positive("temperature", temperature)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if estimator == "soft":
        probabilities = (logits / temperature).softmax(dim=-1)
        with torch.autocast(logits.device.type, enabled=False):
            mean = probabilities @ codes.to(probabilities.dtype)
        return mean.to(codes.dtype), logits.argmax(dim=-1)
    if estimator in ("gumbel", "reinmax"):
        perturbed = logits + gumbel_noise(logits, generator)
        indices = perturbed.argmax(dim=-1)
        logits = perturbed if estimator == "gumbel" else logits
    else:
        indices = logits.argmax(dim=-1)
    return _Select.apply(logits, codes, indices, temperature, estimator == "reinmax"), indices


def gumbel_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise: the arg-max of logits plus it is a sample of their softmax."""
    uniform = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    return to_gumbel(uniform)


class _Select(torch.autograd.Function):
    """``codes[indices]`` with the gradient of a mean code under the softmax of the logits."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        logits: Tensor,
        codes: Tensor,
        indices: Tensor,
        temperature: float,
        second_order: bool,  # noqa: FBT001
    ) -> Tensor:
        ctx.save_for_backward(logits, codes, indices)
        ctx.temperature, ctx.second_order = temperature, second_order
        return codes[indices]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        logits, codes, indices = ctx.saved_tensors
        grad_logits = grad_codes = None
        with torch.autocast(logits.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                wanted = grad.to(logits.dtype) @ codes.to(logits.dtype).T
                probabilities = (logits / ctx.temperature).softmax(dim=-1)
                if ctx.second_order:
                    grad_logits = _reinmax_backward(logits, probabilities, indices, wanted)
                else:
                    grad_logits = _softmax_backward(probabilities, wanted) / ctx.temperature
            if ctx.needs_input_grad[1]:
                sums = codes.new_zeros(codes.shape, dtype=logits.dtype)
                rows = grad.reshape(-1, codes.shape[1]).to(logits.dtype)
                grad_codes = sums.index_add_(0, indices.reshape(-1), rows).to(codes.dtype)
        return grad_logits, grad_codes, None, None, None


def _softmax_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    """The Jacobian ``diag(p) - p p^T`` of the softmax, applied to ``grad``."""
    return probabilities * (grad - (probabilities * grad).sum(dim=-1, keepdim=True))


def _reinmax_backward(
    logits: Tensor, probabilities: Tensor, indices: Tensor, grad: Tensor
) -> Tensor:
    """Heun's method: twice the Jacobian at the midpoint less half of that at the start."""
    half = probabilities.new_full((), 0.5).expand(*indices.shape, 1)
    midpoint = (probabilities / 2).scatter_add(-1, indices.unsqueeze(-1), half)
    start = logits.softmax(dim=-1)
    return 2 * _softmax_backward(midpoint, grad) - _softmax_backward(start, grad) / 2
