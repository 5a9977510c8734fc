"""What all wrappers of one quantizer share."""

from torch import Tensor

from vqprior._interfaces import Codebook, Quantizer, QuantizerBase, QuantizerOutput
from vqprior.quantizers._shared._inputs import check_quantizer


class Wrapper(QuantizerBase):
    """What all wrappers share: sizes and codebooks are those of the wrapped quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        check_quantizer("quantizer", quantizer)
        self.quantizer = quantizer

    @property
    def dim(self) -> int:
        """That of the wrapped quantizer."""
        return self.quantizer.dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Those of the wrapped quantizer."""
        return self.quantizer.codebook_sizes

    @property
    def bits_per_token(self) -> float:
        """That of the wrapped quantizer."""
        return self.quantizer.bits_per_token

    @property
    def has_index_per_token(self) -> bool:
        """That of the wrapped quantizer."""
        return self.quantizer.has_index_per_token

    @property
    def features_last(self) -> bool:
        """That of the wrapped quantizer."""
        return self.quantizer.features_last

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Those of the wrapped quantizer."""
        return self.quantizer.codebooks


class ForwardingWrapper(Wrapper, Quantizer):
    """A wrapper that passes every call on; subclasses override what they change."""

    @property
    def _learns_from_result(self) -> bool:
        """That of the wrapped quantizer."""
        return self.quantizer._learns_from_result

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x``."""
        return self.quantizer(x, mask)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices."""
        return self.quantizer.encode(x, mask)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes named by ``indices``."""
        return self.quantizer.decode(indices)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result for indices chosen elsewhere."""
        return self.quantizer.quantize_as(x, indices)

    def logits(
        self, x: Tensor, *, temperature: float = 1.0, indices: Tensor | None = None
    ) -> Tensor:
        """Returns how well each code fits."""
        return self.quantizer.logits(x, temperature=temperature, indices=indices)

    def nearest_indices(self, x: Tensor, num_nearest: int) -> Tensor:
        """Returns the indices of the nearest codes, nearest first."""
        return self.quantizer.nearest_indices(x, num_nearest)
