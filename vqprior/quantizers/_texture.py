"""Texture vector quantization: the residual given a structure."""

from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor, nn

from vqprior._checks import check_floating, check_shape
from vqprior._interfaces import Codebook, Quantizer, QuantizerBase
from vqprior._results import QuantizerOutput
from vqprior.quantizers._shared._inputs import check_quantizer
from vqprior.quantizers._shared._outputs import replace_quantized


class Fuse(Protocol):
    """A function or module that returns what to quantize: ``(structure, texture) -> x``."""

    def __call__(self, structure: Tensor, texture: Tensor) -> Tensor: ...


def _residual(structure: Tensor, texture: Tensor) -> Tensor:
    check_shape("texture", texture, structure.shape)
    return texture - structure


@final
class TextureQuantizer(QuantizerBase):
    """Quantizes the residual of ``texture`` given ``structure``.

    ``quantized = structure + quantizer(fuse(structure, texture)).quantized``: the codebook models
    the residual. The structure is a side signal that the decoder has or predicts, so it costs no
    codes. The layout is that of ``quantizer``: for feature maps, wrap ``quantizer`` in
    ``ChannelsFirst``. For masked tokens, ``quantized`` is the structure.

    Args:
        quantizer: Any quantizer of one tensor.
        fuse: A function or module ``(structure, texture) -> x`` that returns what to quantize; by
            default ``texture - structure``. The paper uses a network.

    Raises:
        TypeError: If ``quantizer`` is not a quantizer of one tensor.

    Shape:
        - ``texture``, ``structure``, ``quantized``: as the input of ``quantizer``
        - ``indices``: those of ``quantizer``

    References:
        Li et al., *Texture Vector-Quantization and Reconstruction Aware Prediction for
        Generative Super-Resolution*, ICLR 2026, section on texture vector-quantization.
        <https://arxiv.org/abs/2509.23774>

    Examples:
        >>> import torch
        >>> from vqprior import TextureQuantizer, VectorQuantizer
        >>> tvq = TextureQuantizer(VectorQuantizer(dim=8, codebook_size=32))
        >>> texture, structure = torch.randn(2, 10, 8), torch.randn(2, 10, 8)
        >>> out = tvq(texture, structure)
        >>> torch.equal(tvq.decode(out.indices, structure), out.quantized)
        True
    """

    def __init__(self, quantizer: Quantizer, *, fuse: Fuse | None = None) -> None:
        super().__init__()
        check_quantizer("quantizer", quantizer)
        self.quantizer = quantizer
        self.fuse: Fuse | nn.Module = _residual if fuse is None else fuse
        self.has_index_per_token = quantizer.has_index_per_token
        self.features_last = quantizer.features_last
        self._positions_per_token = quantizer._positions_per_token

    @property
    def dim(self) -> int:
        """Number of features of the wrapped quantizer."""
        return self.quantizer.dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codebook sizes of the wrapped quantizer."""
        return self.quantizer.codebook_sizes

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Codebooks of the wrapped quantizer."""
        return self.quantizer.codebooks

    def forward(
        self, texture: Tensor, structure: Tensor, mask: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantizes ``texture`` given ``structure``; ``mask`` is True for real tokens.

        Raises:
            TypeError: If ``texture`` or ``structure`` is not floating point.
            ValueError: If the result of ``fuse`` does not have the shape of ``structure``; by
                default, if ``texture`` does not.
        """
        out = self.quantizer(self._fused(texture, structure), mask)
        return replace_quantized(out, structure + out.quantized.to(structure.dtype))

    def encode(self, texture: Tensor, structure: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices of ``texture`` given ``structure``, without gradients."""
        return self.quantizer.encode(self._fused(texture, structure), mask)

    def quantize_as(self, texture: Tensor, structure: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` had been chosen."""
        out = self.quantizer.quantize_as(self._fused(texture, structure), indices)
        return replace_quantized(out, structure + out.quantized.to(structure.dtype))

    def logits(
        self,
        texture: Tensor,
        structure: Tensor,
        *,
        temperature: float = 1.0,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Returns logits over the codes for ``texture`` given ``structure``.

        Raises:
            TypeError: If the quantizer has no explicit codebook.
        """
        fused = self._fused(texture, structure)
        return self.quantizer.logits(fused, temperature=temperature, indices=indices)

    def decode(self, indices: Tensor, structure: Tensor) -> Tensor:
        """Returns ``structure`` plus the codes named by ``indices``, in the dtype of ``structure``.

        An index of -1 adds nothing.
        """
        check_floating("structure", structure)
        return structure + self.quantizer.decode(indices).to(structure.dtype)

    def _fused(self, texture: Tensor, structure: Tensor) -> Tensor:
        check_floating("texture", texture)
        check_floating("structure", structure)
        usable = structure.isfinite()
        if texture.shape == structure.shape:
            usable = usable & texture.isfinite()
            texture = torch.where(usable, texture, 0.0)
        fused: Tensor = self.fuse(torch.where(usable, structure, 0.0), texture)
        # A broadcast sum would hide a structure of the wrong size.
        check_shape("fuse(structure, texture)", fused, structure.shape)
        # The quantizer masks these tokens. `fuse` must not see them: even a gradient of 0 would
        # become NaN in its parameters.
        return torch.where(usable, fused, torch.nan)

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any; callers deserve the real type.

        def __call__(
            self, texture: Tensor, structure: Tensor, mask: Tensor | None = None
        ) -> QuantizerOutput: ...
