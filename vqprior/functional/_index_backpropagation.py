"""Index backpropagation: a gradient through the code choice that reaches all codes."""

import dataclasses
from typing import Any, final

import torch
from torch import Tensor

from vqprior._checks import check_choice, check_positive
from vqprior._interfaces import IndexEstimator
from vqprior.functional._location import find_center, finite_codes
from vqprior.functional._random import counter_uniform, to_gumbel
from vqprior.functional._scores import score_codes, score_gradients
from vqprior.functional._search import nearest_indices
from vqprior.functional._softmax_gradient import row_blocks, softmax_gradient

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
            indices = _sample(wide.detach(), table.detach(), seed, metric)
            seed = seed if estimator == "gumbel" else None
        # Copied, so that a rule may change the codebook before the backward pass.
        selected: Tensor = _select(
            wide, table.clone(), indices, seed, metric, estimator, self.temperature
        )
        return selected.to(codes.dtype), indices


@torch.library.custom_op("vqprior::select_nearest", mutates_args=())
def _select(
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    seed: Tensor | None,
    metric: str,
    estimator: str,
    temperature: float,
) -> Tensor:
    """Looks up the chosen codes; the backward pass is that of the mean code under a softmax."""
    # Indexing by a single index would return a view, which a custom operator must not.
    return codes.index_select(0, indices.reshape(-1)).reshape(*indices.shape, codes.shape[1])


@_select.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    seed: Tensor | None,
    metric: str,
    estimator: str,
    temperature: float,
) -> Tensor:
    return codes.new_empty((*indices.shape, codes.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    x, codes, indices, seed, *options = inputs
    ctx.save_for_backward(x, codes, indices, seed)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    grads = _select_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None)


@torch.library.custom_op("vqprior::select_nearest_backward", mutates_args=())
def _select_backward(  # noqa: PLR0913
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
    table = finite_codes(codes)  # a probability of 0 times infinity would be NaN
    grad_x = torch.empty_like(flat)
    grad_codes = torch.zeros_like(codes).index_add_(0, chosen, wanted)
    with torch.autocast(x.device.type, enabled=False):
        for part in row_blocks(flat.shape[0], k, flat.device):
            logits = score_codes(flat[part], codes, metric)
            if seed is not None:
                logits = logits + _noise(seed, part, logits)
            value = wanted[part] @ (table - find_center(table)).T
            probabilities = (logits / temperature).softmax(dim=-1)
            inner = softmax_gradient(
                logits, probabilities, chosen[part], value, temperature, estimator
            )
            grad_x[part], of_codes = score_gradients(inner, flat[part], table, metric)
            grad_codes += of_codes
    return grad_x.reshape(x.shape), grad_codes


@_select_backward.register_fake
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


_select.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("vqprior::sample_nearest", mutates_args=())
def _sample(x: Tensor, codes: Tensor, seed: Tensor, metric: str) -> Tensor:
    """Samples from the softmax of the scores by the Gumbel-max trick, in blocks."""
    flat = x.reshape(-1, x.shape[-1])
    drawn = torch.empty(flat.shape[0], dtype=torch.int64, device=x.device)
    for part in row_blocks(flat.shape[0], codes.shape[0], flat.device):
        logits = score_codes(flat[part], codes, metric)
        drawn[part] = (logits + _noise(seed, part, logits)).argmax(dim=-1)
    return drawn.reshape(x.shape[:-1])


@_sample.register_fake
def _(x: Tensor, codes: Tensor, seed: Tensor, metric: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def _noise(seed: Tensor, part: slice, logits: Tensor) -> Tensor:
    """Returns Gumbel noise that is the same for an entry in the forward and backward pass."""
    k = logits.shape[-1]
    counter = torch.arange(part.start * k, part.stop * k, device=logits.device).reshape(-1, k)
    return to_gumbel(counter_uniform(counter + seed)).to(logits.dtype)
