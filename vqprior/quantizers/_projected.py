"""Quantization in a projection of the features."""

from typing import final

import torch
from torch import Tensor, nn

from vqprior._checks import (
    check_at_least,
    check_floating,
    check_last_dim,
    check_module,
    check_shape,
)
from vqprior._interfaces import Quantizer
from vqprior._precision import without_autocast
from vqprior._results import QuantizerOutput
from vqprior.quantizers._shared._columns import has_any_index, mask_indices
from vqprior.quantizers._shared._inputs import (
    check_index_per_token,
    check_indices,
    know_layout,
    validate_assignment,
    validate_input,
    warn_of_channels_first,
)
from vqprior.quantizers._shared._outputs import replace_quantized
from vqprior.quantizers._shared._wrapper import QuantizerWrapper


@final
class ProjectedQuantizer(QuantizerWrapper):
    """Quantizes in a projection of the features: ``up(quantizer(down(x)))``.

    A projection to few dimensions keeps more codes in use. The gradient of ``quantized`` passes
    through ``up``, the estimator and ``down``, and trains both modules; with respect to ``x`` it
    is the product of their Jacobians instead of the identity. Both modules run in the dtype of
    their parameters, also under ``torch.autocast``, so that autocast changes no index.

    Args:
        quantizer: Any quantizer with features last and indices for each token.
        down: A module ``(..., d) -> (..., quantizer.dim)``.
        up: A module ``(..., quantizer.dim) -> (..., d)``.
        dim: Number of features ``d``; by default ``down.in_features``, or else that of
            ``quantizer``.

    Raises:
        TypeError: If ``quantizer`` is not a quantizer, or ``down`` or ``up`` is not a module.
        ValueError: If ``quantizer`` does not have features last or indices for each token, or
            ``dim`` is below 1.

    Shape:
        - input, ``quantized``: ``(..., d)``
        - ``indices``: those of ``quantizer``

    References:
        Yu et al., *Vector-quantized Image Modeling with Improved VQGAN*, ICLR 2022, section 3.2
        (factorized codes). <https://arxiv.org/abs/2110.04627>

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from vqprior import ProjectedQuantizer, VectorQuantizer
        >>> inner = VectorQuantizer(dim=8, codebook_size=512, metric="cosine")
        >>> vq = ProjectedQuantizer(inner, nn.Linear(64, 8), nn.Linear(8, 64))
        >>> vq.dim, vq(torch.randn(2, 10, 64)).quantized.shape
        (64, torch.Size([2, 10, 64]))
    """

    def __init__(
        self, quantizer: Quantizer, down: nn.Module, up: nn.Module, *, dim: int | None = None
    ) -> None:
        super().__init__(quantizer)
        check_index_per_token("quantizer", quantizer)
        know_layout([quantizer])
        check_module("down", down)
        check_module("up", up)
        found = getattr(down, "in_features", quantizer.dim)
        self._dim = int(found) if dim is None else dim
        check_at_least("dim", self._dim, 1)
        self.down = down
        self.up = up

    @property
    def dim(self) -> int:
        """Number of features ``d`` before the projection."""
        return self._dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If ``x``, ``mask``, or a result of ``down`` or ``up`` has the wrong shape.
        """
        x, valid = validate_input(x, mask, self.dim)
        warn_of_channels_first(self, x)
        return self._project_up(self.quantizer(self._project_down(x), valid), x)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices of the projected vectors."""
        x, valid = validate_input(x, mask, self.dim)
        return self.quantizer.encode(self._project_down(x), valid)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns ``up`` of the codes named by ``indices``; tokens without any are zeros.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
        """
        check_indices(indices, self.num_codebooks)
        vectors = self._raise(self.quantizer.decode(indices)).to(self.dtype)
        return torch.where(has_any_index(indices, self.num_codebooks).unsqueeze(-1), vectors, 0.0)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` had been chosen."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        indices = mask_indices(indices, valid, self.num_codebooks)
        return self._project_up(self.quantizer.quantize_as(self._project_down(x), indices), x)

    def logits(
        self, x: Tensor, *, temperature: float = 1.0, indices: Tensor | None = None
    ) -> Tensor:
        """Returns logits over the codes for each projected vector.

        Raises:
            TypeError: If the quantizer has no explicit codebook.
            ValueError: If ``temperature`` is not greater than 0, or a shape is wrong.
        """
        return self.quantizer.logits(
            self._project_down(x), temperature=temperature, indices=indices
        )

    def nearest_indices(self, x: Tensor, num_nearest: int) -> Tensor:
        """Returns the indices of the codes nearest to each projected vector: ``(..., m)``.

        Raises:
            TypeError: If the quantizer has not exactly one explicit codebook.
            ValueError: If ``x`` has the wrong shape, or ``num_nearest`` is out of range.
        """
        return self.quantizer.nearest_indices(self._project_down(x), num_nearest)

    def _project_down(self, x: Tensor) -> Tensor:
        check_floating("x", x)
        check_last_dim("x", x, self.dim)
        # A module without parameters computes in the dtype of the codes, or wider.
        dtype = _dtype_of(self.down) or torch.promote_types(x.dtype, self.quantizer.dtype)
        lowered = _run(self.down, x.to(dtype))
        check_shape("down(x)", lowered, (*x.shape[:-1], self.quantizer.dim))
        return lowered

    def _project_up(self, out: QuantizerOutput, x: Tensor) -> QuantizerOutput:
        raised = self._raise(out.quantized).to(x.dtype)
        check_shape("up(codes)", raised, x.shape)
        named = has_any_index(out.indices, self.num_codebooks)
        return replace_quantized(out, torch.where(named.unsqueeze(-1), raised, 0.0))

    def _raise(self, codes: Tensor) -> Tensor:
        """Runs ``up`` in one dtype for ``forward`` and ``decode``, so that both round alike."""
        dtype = _dtype_of(self.up) or self.quantizer.dtype
        return _run(self.up, codes.to(dtype)).to(dtype)


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """Returns the dtype of the first floating parameter, if there is any."""
    for parameter in module.parameters():  # torch 2.6 compiles no `next` with a default
        if parameter.is_floating_point():
            return parameter.dtype
    return None


def _run(module: nn.Module, x: Tensor) -> Tensor:
    with without_autocast(x.device.type):
        y: Tensor = module(x)
    return y
