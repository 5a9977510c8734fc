"""A check for NaN and infinity."""

import itertools
from typing import final

import torch
from torch import Tensor

from vqprior._checks import check_floating, check_last_dim, check_mask
from vqprior._interfaces import Quantizer
from vqprior._results import QuantizerOutput
from vqprior._transforms import unwrap
from vqprior.quantizers._shared._inputs import check_features_last
from vqprior.quantizers._shared._wrapper import QuantizerWrapper


@final
class RequireFinite(QuantizerWrapper):
    """Raises if an unmasked token, a parameter or a buffer is not finite.

    Quantizers mask such tokens and never choose such codes. Use this wrapper to find where a NaN
    or an infinity comes from. Each call synchronizes with the device and cannot be compiled into
    one graph. ``forward`` and ``encode`` check; ``quantize_as``, ``logits`` and
    ``nearest_indices`` do not.

    Args:
        quantizer: Any quantizer with features last. For feature maps, wrap the result in
            ``ChannelsFirst``.

    Raises:
        TypeError: If ``quantizer`` is not a quantizer.
        ValueError: If ``quantizer`` does not have features last.

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
        `x` must be finite, got a NaN or an infinity in 2 of 2 tokens. Mask them, or remove
        `RequireFinite`: quantizers mask such tokens.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        check_features_last("quantizer", quantizer)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If an unmasked token, a parameter or a buffer is not finite, or a shape is
                wrong.
        """
        self._check(x, mask)
        return self.quantizer(x, mask)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices.

        Raises:
            ValueError: If an unmasked token, a parameter or a buffer is not finite, or a shape is
                wrong.
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
        broken = unwrap(broken)
        count = int(torch.count_nonzero(broken))
        if count:
            raise ValueError(
                f"`x` must be finite, got a NaN or an infinity in {count} of {broken.numel()} "
                "tokens. Mask them, or remove `RequireFinite`: quantizers mask such tokens."
            )
        state = itertools.chain(self.quantizer.named_parameters(), self.quantizer.named_buffers())
        for name, tensor in state:
            count = int(torch.count_nonzero(~unwrap(tensor).isfinite()))
            if count:
                raise ValueError(
                    f"`quantizer` must hold finite numbers, got a NaN or an infinity in {count} of "
                    f"{tensor.numel()} numbers of `{name}`. Quantizers never choose such a code, "
                    "and `CodebookRevival` replaces it."
                )
