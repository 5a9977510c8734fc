"""Differentiable selection of codes by predicted logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import (
    check_choice,
    check_codes,
    check_floating,
    check_positive,
)
from vqprior._precision import without_autocast
from vqprior.functional._argmax import first_argmax
from vqprior.functional._kernels import _triton
from vqprior.functional._kernels._operators import apply, is_traced, with_signature
from vqprior.functional._location import finite_codes
from vqprior.functional._random import to_gumbel
from vqprior.functional._select_gradient import select_gradients, select_gradients_op
from vqprior.functional._softmax_gradient import (
    room_for,
    row_blocks,
    soften,
    softmax_gradient,
    write_rows,
)

_ESTIMATORS = ("straight_through", "soft", "gumbel", "reinmax")


def select_codes(
    logits: Tensor,
    codes: Tensor,
    *,
    estimator: str = "straight_through",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Selects one code per token by logits, so that a loss on the vectors trains the logits.

    Let ``p = softmax(logits / temperature)`` and let ``g`` be the gradient of the returned
    vectors. The logits receive ``p * (<g, codes> - sum_j p_j <g, codes_j>) / temperature``, as if
    the vectors were the mean code under ``p`` (``"reinmax"`` differs). No one-hot matrix is
    built, and the result does not depend on training mode. Codes that require gradients receive
    the gradient of the lookup; pass ``codes.detach()`` to keep the codebook frozen.

    On a CUDA device with Triton, kernels choose codes and compute the gradient of the logits if no
    input is float64; operators do the rest: the value and the codes' gradient of ``"soft"``, the
    gradient of ``"reinmax"``, and second derivatives.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        codes: The codebook.
        estimator: How to choose codes and compute the gradient:

            - ``"straight_through"``: the arg-max code; deterministic.
            - ``"soft"``: the mean code under ``p``; the only one that does not return codes.
            - ``"gumbel"``: a code sampled from ``softmax(logits)``; the gradient uses the
              perturbed logits at ``temperature``.
            - ``"reinmax"``: a code sampled from ``softmax(logits)``; second-order gradient.
        temperature: Softens (above 1) or sharpens (below 1) ``p`` in the gradient, and in the
            value of ``"soft"``; greater than 0.
        generator: Random number generator for ``"gumbel"`` and ``"reinmax"``.

    Returns:
        ``(vectors, indices)``: the selected vectors in the dtype of ``codes``, and their indices
        as ``int64`` (for ``"soft"``, those of the most likely codes).

    Raises:
        TypeError: If ``logits`` or ``codes`` is not floating point.
        ValueError: If the shapes do not match, ``estimator`` is unknown or ``temperature`` is
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
        >>> logits.grad.argmin().item()  # gradient descent raises the logit of code 2
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
    scores = logits
    if estimator in ("gumbel", "reinmax"):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits + gumbel_noise(logits, generator)
        logits = scores if estimator == "gumbel" else logits
    indices, found = _choose(scores.detach(), codes.detach(), estimator)
    return apply(_Select, logits, codes, indices, found, temperature, estimator), indices


def _choose(scores: Tensor, codes: Tensor, estimator: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the arg-max of each row, and the codes there if a kernel has gathered them.

    They come in a tuple, so that autograd takes them for a new result and not for an input.
    """
    if is_traced(scores, codes) or estimator == "soft" or not _triton.is_usable(scores, codes):
        return first_argmax(scores), ()
    from vqprior.functional._kernels._triton_choice import choose  # needs Triton

    indices, vectors = choose(scores, codes)
    return indices, (vectors,)


def gumbel_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws standard Gumbel noise; the arg-max of logits plus noise samples their softmax."""
    uniform = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    return to_gumbel(uniform)


@with_signature
class _Select(torch.autograd.Function):
    """Returns a code or the mean code, with the gradient of the mean code under the softmax."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        codes: Tensor,
        indices: Tensor,
        found: tuple[Tensor, ...],
        temperature: float,
        estimator: str,
    ) -> Tensor:
        if found:
            return found[0]
        if estimator == "soft":
            mean_code = _mean_code_op if torch.compiler.is_compiling() else _mean_code
            mean: Tensor = mean_code(logits, codes, temperature)
            return mean
        return F.embedding(indices, codes)  # unlike indexing, reads no single index back

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        logits, codes, indices, _, *ctx.options = inputs
        ctx.save_for_backward(logits, codes, indices)

    @staticmethod
    def tangent(ctx: Any, of_logits: Tensor, of_codes: Tensor, *_: None) -> Tensor:  # noqa: ANN401
        logits, codes, indices = ctx.saved_tensors
        temperature, estimator = ctx.options
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = soften(logits, temperature)
        # The Jacobian of the probabilities is symmetric, so it serves both directions.
        of_logits = of_logits.to(logits.dtype)
        change = softmax_gradient(logits, probabilities, indices, of_logits, temperature, estimator)
        with without_autocast(logits.device.type):
            if estimator == "soft":
                moved = probabilities @ of_codes.to(probabilities)
            else:
                moved = F.embedding(indices, of_codes)
            tangent: Tensor = change @ codes.to(change) + moved
        return tangent.to(codes.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        # Custom operators have no second derivative, so they are used only while compiling.
        gradients = select_gradients_op if torch.compiler.is_compiling() else select_gradients
        needs = ctx.needs_input_grad[:2]
        found = gradients(grad, *ctx.saved_tensors, *ctx.options, *needs)
        of_logits, of_codes = (
            one if needed else None for one, needed in zip(found, needs, strict=True)
        )
        return of_logits, of_codes, None, None, None, None


def _mean_code(logits: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Computes the mean code under the softmax of the logits, in blocks."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat, table = logits.reshape(-1, len(codes)), finite_codes(codes).to(dtype)
    blocks = row_blocks(len(flat), len(codes), flat.device)
    mean = room_for(blocks, len(flat), codes.shape[1], like=codes)
    with without_autocast(logits.device.type):
        for part in blocks:
            of_part = soften(flat[part].to(dtype), temperature) @ table
            mean = write_rows(mean, part, of_part.to(codes.dtype))
    return mean.reshape(*logits.shape[:-1], codes.shape[1])


_mean_code_op = torch.library.custom_op("vqprior::mean_code", _mean_code, mutates_args=())


@_mean_code_op.register_fake
def _(logits: Tensor, codes: Tensor, temperature: float) -> Tensor:
    return codes.new_empty((*logits.shape[:-1], codes.shape[1]))
