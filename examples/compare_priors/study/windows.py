"""A quantizer of maps of one size, on maps of any multiple of it."""

import dataclasses

from einops import rearrange
from torch import Tensor

from vqprior import Codebook, Quantizer, QuantizerOutput

CUT = "b (r h) (w v) ... -> b r w h v ..."
JOIN = "b r w h v ... -> b (r h) (w v) ..."


class Windows(Quantizer):
    """Cuts maps ``(b, rows, columns, d)`` into windows and quantizes each by itself.

    Indices are those of the windows, ``(b, r, w, ...)``.

    Args:
        quantizer: Of maps with features last.
        side: Of a window.
    """

    def __init__(self, quantizer: Quantizer, side: int) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.side = side

    @property
    def dim(self) -> int:
        """That of the quantizer."""
        return self.quantizer.dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Those of the quantizer."""
        return self.quantizer.codebook_sizes

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Those of the quantizer."""
        return self.quantizer.codebooks

    @property
    def bits_per_token(self) -> float:
        """That of the quantizer."""
        return self.quantizer.bits_per_token

    @property
    def has_index_per_token(self) -> bool:
        """That of the quantizer."""
        return self.quantizer.has_index_per_token

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(b, rows, columns, d)``."""
        return self._joined(self.quantizer(self._cut(x), None if mask is None else self._cut(mask)))

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices of all windows."""
        return self.quantizer.encode(self._cut(x), None if mask is None else self._cut(mask))

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the map of all windows."""
        return rearrange(self.quantizer.decode(indices), JOIN)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result for indices chosen elsewhere."""
        return self._joined(self.quantizer.quantize_as(self._cut(x), indices))

    def _cut(self, x: Tensor) -> Tensor:
        return rearrange(x, CUT, h=self.side, v=self.side)

    def _joined(self, out: QuantizerOutput) -> QuantizerOutput:
        return dataclasses.replace(out, quantized=rearrange(out.quantized, JOIN))
