"""Quantization of feature maps with channels first."""

from typing import final

from torch import Tensor

from vqprior._checks import check_mask, check_tensor
from vqprior._interfaces import Quantizer
from vqprior._results import QuantizerOutput
from vqprior.quantizers._shared._inputs import check_features_last, know_layout
from vqprior.quantizers._shared._outputs import replace_quantized
from vqprior.quantizers._shared._wrapper import QuantizerWrapper


@final
class ChannelsFirst(QuantizerWrapper):
    """Applies a quantizer to feature maps ``(b, d, *spatial)``, with one token per position.

    ``quantized`` has the memory format of the input: contiguous or channels last; what ``decode``
    returns is contiguous. The selections of the result, which rules and losses read, keep their
    features last.

    Args:
        quantizer: Any quantizer with features last.

    Raises:
        TypeError: If ``quantizer`` is not a quantizer.
        ValueError: If ``quantizer`` does not have features last.

    Shape:
        - input: ``(b, d, *spatial)``, ``mask`` ``(b, *spatial)``
        - output: ``quantized`` ``(b, d, *spatial)``, ``indices`` ``(b, *spatial)`` or
          ``(b, *spatial, q)``

    Examples:
        >>> import torch
        >>> from vqprior import ChannelsFirst, VectorQuantizer
        >>> vq = ChannelsFirst(VectorQuantizer(dim=64, codebook_size=512))
        >>> out = vq(torch.randn(2, 64, 8, 8))
        >>> out.quantized.shape, out.indices.shape
        (torch.Size([2, 64, 8, 8]), torch.Size([2, 8, 8]))
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        check_features_last("quantizer", quantizer)
        know_layout([quantizer])
        self.features_last = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(b, d, *spatial)``; ``mask`` ``(b, *spatial)`` is True for real tokens.

        Raises:
            ValueError: If dimension 1 of ``x`` is not ``dim``.
        """
        out = self.quantizer(self._features_last(x, mask), mask)
        return replace_quantized(out, _channels_first(out.quantized, x))

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices ``(b, *spatial)`` or ``(b, *spatial, q)``."""
        return self.quantizer.encode(self._features_last(x, mask), mask)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes ``(b, d, *spatial)`` named by ``indices``.

        Raises:
            ValueError: If ``indices`` has no batch dimension.
        """
        codes = self.quantizer.decode(indices)
        if codes.ndim < 2:
            raise ValueError(
                f"`indices` must have a batch dimension, got {tuple(indices.shape)}. For a single "
                "vector, call the wrapped quantizer."
            )
        return codes.movedim(-1, 1).contiguous()

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` had been chosen.

        Raises:
            ValueError: If dimension 1 of ``x`` is not ``dim``.
        """
        out = self.quantizer.quantize_as(self._features_last(x, None), indices)
        return replace_quantized(out, _channels_first(out.quantized, x))

    def logits(
        self, x: Tensor, *, temperature: float = 1.0, indices: Tensor | None = None
    ) -> Tensor:
        """Returns logits over the codes at each position: ``(b, *spatial, [q,] k)``.

        Raises:
            TypeError: If the quantizer has no explicit codebook.
            ValueError: If dimension 1 of ``x`` is not ``dim``.
        """
        x = self._features_last(x, None)
        return self.quantizer.logits(x, temperature=temperature, indices=indices)

    def nearest_indices(self, x: Tensor, num_nearest: int) -> Tensor:
        """Returns the indices of the nearest codes ``(b, *spatial, m)``, nearest first.

        Raises:
            TypeError: If the quantizer has not exactly one explicit codebook.
            ValueError: If dimension 1 of ``x`` is not ``dim``.
        """
        return self.quantizer.nearest_indices(self._features_last(x, None), num_nearest)

    def _features_last(self, x: Tensor, mask: Tensor | None) -> Tensor:
        check_tensor("x", x)
        if x.ndim < 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"`x` must have shape (b, {self.dim}, *spatial), got {tuple(x.shape)}. For "
                "features in the last dimension, call the wrapped quantizer."
            )
        if mask is not None:
            check_mask(mask, (x.shape[0], *x.shape[2:]))
        return x.movedim(1, -1)


def _channels_first(vectors: Tensor, x: Tensor) -> Tensor:
    """Moves the features to dimension 1; contiguous, and not only in value, if ``x`` is."""
    moved = vectors.movedim(-1, 1)
    return moved.contiguous() if x.is_contiguous() else moved
