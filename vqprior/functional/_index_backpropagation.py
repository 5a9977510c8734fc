"""Index backpropagation: a gradient through the code choice that reaches all codes."""

import dataclasses
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import check_choice, check_positive
from vqprior._interfaces import IndexEstimator
from vqprior._precision import without_autocast
from vqprior._transforms import with_batch_of
from vqprior.functional._argmax import first_argmax
from vqprior.functional._kernels._operators import apply, with_signature
from vqprior.functional._location import find_center
from vqprior.functional._random import counter_gumbel
from vqprior.functional._scores import prepare_keys, score_codes
from vqprior.functional._search import nearest_indices
from vqprior.functional._softmax_gradient import (
    room_for,
    row_blocks,
    soften,
    softmax_gradient,
    write_rows,
)

_ESTIMATORS = ("straight_through", "gumbel", "reinmax")


@final
@dataclasses.dataclass(frozen=True)
class IndexBackpropagation(IndexEstimator):
    """Gradient estimator that reaches the input and all codes through a softmax.

    Pass it as the ``estimator`` of a ``VectorQuantizer``; the codebook then also learns from the
    gradient of ``quantized``. It is equivalent to ``select_codes(quantizer.logits(x), codes)``
    without storing ``n`` x ``k`` numbers: the value is a code, bit for bit, and the backward pass
    is that of the mean code under ``softmax(logits / temperature)``, computed in blocks.

    Attributes:
        estimator: ``"straight_through"`` (the nearest code), ``"gumbel"`` or ``"reinmax"`` (a code
            sampled from ``softmax(logits)`` in training mode, the nearest code in eval mode).
            Indices that the caller provides are always kept.
        temperature: Softens (above 1) or sharpens (below 1) the softmax of the gradient, greater
            than 0. Raise it for large ``d``: squared distances and dot products grow with ``d``,
            and a softmax that has become one-hot passes no gradient.

    Raises:
        ValueError: If ``estimator`` is unknown or ``temperature`` is not greater than 0.

    References:
        Shi et al., *Scalable Image Tokenization with Index Backpropagation Quantization*, ICCV
        2025, section 3.2. <https://arxiv.org/abs/2412.02692>
        Those of ``select_codes`` for ``"gumbel"`` and ``"reinmax"``.

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer
        >>> from vqprior.functional import IndexBackpropagation
        >>> vq = VectorQuantizer(8, 32, metric="dot", estimator=IndexBackpropagation())
        >>> vq(torch.randn(100, 8)).quantized.square().sum().backward()
        >>> (vq.codebook.weight.grad != 0).all().item()
        True
    """

    estimator: str = "straight_through"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Validates the options."""
        check_choice("estimator", self.estimator, _ESTIMATORS)
        check_positive("temperature", self.temperature)

    def select(
        self,
        x: Tensor,
        codes: Tensor,
        *,
        metric: str,
        indices: Tensor | None = None,
        sample: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Chooses a code for each vector: see ``IndexEstimator``."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
        wide, table = x.to(dtype), codes.to(dtype)
        seed, estimator = None, self.estimator
        if indices is not None or not sample or estimator == "straight_through":
            if indices is None:
                indices = nearest_indices(x, codes, metric=metric)
            estimator = "reinmax" if estimator == "reinmax" else "straight_through"
        else:
            seed = torch.randint(2**62, (), device=x.device)
            sample_nearest = _sample_op if torch.compiler.is_compiling() else _sample
            indices = sample_nearest(wide.detach(), table.detach(), seed, metric)
            seed = seed if estimator == "gumbel" else None
        # Copied, so that a rule may change the codebook before the backward pass.
        selected: Tensor = apply(
            _Select, wide, table.clone(), indices, seed, metric, estimator, self.temperature
        )
        return selected.to(codes.dtype), indices


@with_signature
class _Select(torch.autograd.Function):
    """Looks up the chosen codes, with the gradient of the mean code under a softmax."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        codes: Tensor,
        indices: Tensor,
        seed: Tensor | None,
        metric: str,
        estimator: str,
        temperature: float,
    ) -> Tensor:
        # Unlike indexing, an embedding reads no single index back.
        return with_batch_of(x, F.embedding(indices, codes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        x, codes, indices, seed, *ctx.options = inputs
        ctx.save_for_backward(x, codes, indices, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        gradients = _gradients_op if torch.compiler.is_compiling() else _gradients
        grads = gradients(grad, *ctx.saved_tensors, *ctx.options)
        return (*grads, None, None, None, None, None)

    @staticmethod
    def tangent(ctx: Any, of_x: Tensor, of_codes: Tensor, *_: None) -> Tensor:  # noqa: ANN401
        x, codes, indices, seed = ctx.saved_tensors
        metric, estimator, temperature = ctx.options
        logits = score_codes(x, codes, metric)
        if seed is not None:
            logits = logits + _noise(seed, slice(0, indices.numel()), logits).reshape(logits.shape)
        chances = soften(logits, temperature)
        with without_autocast(x.device.type):
            change = _score_change(x, codes, of_x, of_codes, metric)
            # The Jacobian of the probabilities is symmetric, so it serves both directions.
            change = softmax_gradient(logits, chances, indices, change, temperature, estimator)
            moved: Tensor = change @ (codes - codes.mean(dim=0))
        return moved + F.embedding(indices, of_codes)


def _gradients(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    seed: Tensor | None,
    metric: str,
    estimator: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Computes both gradients in blocks of the softmax."""
    k, d = codes.shape
    flat, chosen, wanted = x.reshape(-1, d), indices.reshape(-1), grad.reshape(-1, d)
    blocks = row_blocks(flat.shape[0], k, flat.device)
    grad_x = room_for(blocks, *flat.shape, like=flat)
    grad_codes = torch.zeros_like(codes).index_add(0, chosen, wanted)
    with without_autocast(x.device.type):
        keys = prepare_keys(codes, metric)
        # Of finite codes, since a probability of 0 times infinity would be NaN. A constant changes
        # nothing, so the codes are centered, which keeps precision.
        table = keys.keys if metric == "euclidean" else keys.codes - find_center(keys.codes)
        for part in blocks:
            placed = keys.place(flat[part])
            logits = keys.score(placed)
            if seed is not None:
                logits = logits + _noise(seed, part, logits)
            probabilities = soften(logits, temperature)
            inner = softmax_gradient(
                logits,
                probabilities,
                chosen[part],
                wanted[part] @ table.T,
                temperature,
                estimator,
            )
            of_part, of_codes = keys.gradients(inner, flat[part], placed)
            grad_x = write_rows(grad_x, part, of_part)
            grad_codes = grad_codes + of_codes
    return grad_x.reshape(x.shape), grad_codes


_gradients_op = torch.library.custom_op(
    "vqprior::select_nearest_gradients", _gradients, mutates_args=()
)


@_gradients_op.register_fake
def _(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    seed: Tensor | None,
    metric: str,
    estimator: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(codes)


def _sample(x: Tensor, codes: Tensor, seed: Tensor, metric: str) -> Tensor:
    """Samples from the softmax of the scores by the Gumbel-max trick, in blocks."""
    flat = x.reshape(-1, x.shape[-1])
    blocks = row_blocks(flat.shape[0], codes.shape[0], flat.device)
    drawn = room_for(blocks, flat.shape[0], like=flat.new_empty(0, dtype=torch.int64))
    keys = prepare_keys(codes, metric)
    for part in blocks:
        logits = keys.score(keys.place(flat[part]))
        of_part = first_argmax(logits + _noise(seed, part, logits))
        drawn = write_rows(drawn, part, of_part)
    return drawn.reshape(x.shape[:-1])


_sample_op = torch.library.custom_op("vqprior::sample_nearest", _sample, mutates_args=())


@_sample_op.register_fake
def _(x: Tensor, codes: Tensor, seed: Tensor, metric: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def _noise(seed: Tensor, part: slice, logits: Tensor) -> Tensor:
    """Returns Gumbel noise that is the same for an entry in the forward and backward pass."""
    k = logits.shape[-1]
    counter = torch.arange(part.start * k, part.stop * k, device=logits.device).reshape(-1, k)
    return counter_gumbel(counter + seed, logits.dtype)


def _score_change(x: Tensor, codes: Tensor, of_x: Tensor, of_codes: Tensor, metric: str) -> Tensor:
    """Returns the tangent ``(..., k)`` of the scores, up to a constant per vector."""
    if metric == "dot":
        return of_x @ codes.T + x @ of_codes.T
    if metric == "euclidean":
        center = codes.mean(dim=0)
        x, codes = x - center, codes - center
        return 2 * (of_x @ codes.T + x @ of_codes.T - (codes * of_codes).sum(dim=1))
    (unit_x, of_x), (unit_codes, of_codes) = _turn(x, of_x), _turn(codes, of_codes)
    return of_x @ unit_codes.T + unit_x @ of_codes.T


def _turn(x: Tensor, of_x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns unit vectors and their tangents."""
    unit, length = F.normalize(x, dim=-1), x.norm(dim=-1, keepdim=True)
    across = of_x - unit * (unit * of_x).sum(dim=-1, keepdim=True)
    return unit, torch.where(length > 0, across / torch.where(length > 0, length, 1.0), 0.0)
