"""Stopping at a NaN instead of leaving it out."""

from typing import final

import torch
from torch import Tensor

from vqprior._checks import check_floating, check_last_dim, check_mask
from vqprior._interfaces import Quantizer, QuantizerOutput
from vqprior.quantizers._shared._inputs import check_features_last
from vqprior.quantizers._shared._wrapper import QuantizerWrapper


@final
class RequireFinite(QuantizerWrapper):
    """Raises at a token with a NaN or an infinity, which quantizers by themselves leave out.

    For finding out where such a token comes from. Reads one number back to the host in each
    call, so it waits for the device and does not compile. Masked tokens may hold anything.
    ``forward`` and ``encode`` check; ``quantize_as``, ``logits`` and ``nearest_indices`` do not.

    Args:
        quantizer: Any quantizer with features last; ``ChannelsFirst`` goes outside.

    Raises:
        TypeError: If ``quantizer`` is not a quantizer.
        ValueError: If its features are not last.

    Shape:
        - input, output: those of ``quantizer``

    Examples:
        >>> import torch
        >>> from vqprior import RequireFinite, VectorQuantizer
        >>> vq = RequireFinite(VectorQuantizer(dim=4, codebook_size=16))
        >>> try:
        ...     vq(torch.full((2, 4), torch.nan))
        ... except ValueError as error:
        ...     print(error)
        `x` must be finite, got a NaN or an infinity in 2 of 2 tokens. Mask them, or leave out
        `RequireFinite`: quantizers skip such tokens.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        check_features_last("quantizer", quantizer)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If an unmasked token is not finite, or on a wrong shape.
        """
        self._check(x, mask)
        return self.quantizer(x, mask)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices.

        Raises:
            ValueError: If an unmasked token is not finite, or on a wrong shape.
        """
        self._check(x, mask)
        return self.quantizer.encode(x, mask)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        check_floating("x", x)
        check_last_dim("x", x, self.dim)
        broken = ~x.isfinite().all(dim=-1)
        if mask is not None:
            check_mask(mask, x.shape[:-1])
            broken = broken & mask
        count = int(torch.count_nonzero(broken))
        if count:
            raise ValueError(
                f"`x` must be finite, got a NaN or an infinity in {count} of {broken.numel()} "
                "tokens. Mask them, or leave out `RequireFinite`: quantizers skip such tokens."
            )
