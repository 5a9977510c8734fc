"""The base class of wrappers."""

from torch import Tensor

from vqprior._interfaces import Codebook, Quantizer
from vqprior._results import QuantizerOutput
from vqprior._transforms import is_learning
from vqprior.quantizers._shared._inputs import check_quantizer


class QuantizerWrapper(Quantizer):
    """Base class of wrappers: passes every call on to ``self.quantizer``.

    Derive from it to change one thing about any quantizer, and override the methods that change.
    All other methods, sizes and codebooks are those of ``self.quantizer``. A wrapper that changes
    vectors must do so in ``forward``, ``encode``, ``decode``, ``quantize_as``, ``logits`` and
    ``nearest_indices``.

    Args:
        quantizer: The quantizer to wrap.

    Raises:
        TypeError: If ``quantizer`` is not a quantizer.

    Shape:
        - input, output: those of ``quantizer``

    Examples:
        >>> import torch
        >>> from vqprior import QuantizerWrapper, VectorQuantizer
        >>> class Counting(QuantizerWrapper):
        ...     calls = 0
        ...
        ...     def forward(self, x, mask=None):
        ...         self.calls += 1
        ...         return self.quantizer(x, mask)
        >>> vq = Counting(VectorQuantizer(dim=4, codebook_size=16))
        >>> vq(torch.randn(10, 4)).indices.shape, vq.calls, vq.bits_per_token
        (torch.Size([10]), 1, 4.0)
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        check_quantizer("quantizer", quantizer)
        self.quantizer = quantizer
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
        """Returns the result as if ``indices`` had been chosen."""
        return self.quantizer.quantize_as(x, indices)

    def logits(
        self, x: Tensor, *, temperature: float = 1.0, indices: Tensor | None = None
    ) -> Tensor:
        """Returns logits over the codes."""
        return self.quantizer.logits(x, temperature=temperature, indices=indices)

    def nearest_indices(self, x: Tensor, num_nearest: int) -> Tensor:
        """Returns the indices of the nearest codes, nearest first."""
        return self.quantizer.nearest_indices(x, num_nearest)

    @property
    def _learns_from_result(self) -> bool:
        """Whether the wrapped quantizer or a part of the wrapper learns from the result."""
        parts = (part for name, part in self.named_children() if name != "quantizer")
        own = (*self.parameters(recurse=False), *(p for part in parts for p in part.parameters()))
        return any(is_learning(p) for p in own) or self.quantizer._learns_from_result
