"""Finite scalar quantization: each feature is rounded to one of a few levels."""

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_sequence
from vqprior._interfaces import Codebook, Quantizer
from vqprior._results import QuantizerOutput
from vqprior.functional import join_indices, split_indices, straight_through
from vqprior.quantizers._shared._columns import mask_indices
from vqprior.quantizers._shared._inputs import (
    validate_assignment,
    validate_indices,
    validate_input,
    warn_of_channels_first,
)
from vqprior.quantizers._shared._outputs import make_output


@final
class FSQ(Quantizer):
    """Bounds each feature with a tanh and rounds it to one of a few levels; nothing is learned.

    The number of codes is the product of the numbers of levels; codes are never listed. There are
    no loss terms. The gradient of ``quantized`` is that of the bounded features, passed straight
    through the rounding.

    Args:
        levels: Number of levels of each feature, each between 3 and ``2**22``, with a product of
            at most ``2**62``. The first feature varies fastest in an index. If ``symmetric``, 2
            levels are allowed too; with the bound of the paper, nearly all values would round to
            one of them.
        symmetric: Whether even numbers of levels also lie symmetrically in ``[-1, 1]``. By
            default they include 0, as in the paper.

    Raises:
        TypeError: If ``levels`` is not a sequence of integers.
        ValueError: If ``levels`` is empty, or a level or their product is out of range.

    Shape:
        - input: ``(..., len(levels))``
        - output: ``quantized`` ``(..., len(levels))`` in ``[-1, 1]``, ``indices`` ``(...)``

    References:
        Mentzer et al., *Finite Scalar Quantization: VQ-VAE Made Simple*, ICLR 2024, section 3
        and appendix A.1. <https://arxiv.org/abs/2309.15505>
        Parker et al., *Scaling Transformers for Low-Bitrate High-Quality Speech Coding*, ICLR
        2025, section 2.2 (``symmetric``). <https://arxiv.org/abs/2411.19842>

    Examples:
        >>> import torch
        >>> from vqprior import FSQ
        >>> fsq = FSQ([8, 5, 5, 5])
        >>> fsq.codebook_size, fsq(torch.randn(2, 10, 4)).indices.shape
        (1000, torch.Size([2, 10]))
        >>> FSQ([3, 3])(torch.tensor([[9.0, -9.0]])).quantized
        tensor([[ 1., -1.]])
    """

    levels: Tensor

    def __init__(self, levels: Sequence[int], *, symmetric: bool = False) -> None:
        super().__init__()
        check_sequence("levels", levels, "For example `[8, 5, 5]`.")
        if not levels:
            raise ValueError("`levels` must hold at least one number of levels, got none.")
        for level in levels:
            check_at_least("levels", level, 2)
            if level == 2 and not symmetric:
                raise ValueError(
                    "`levels` must be at least 3, got 2. Pass `symmetric=True`: otherwise nearly "
                    "all values round to one of the two levels."
                )
            if level > 2**22:  # a float32 could not tell neighbors apart
                raise ValueError(f"`levels` must be at most 2**22 each, got {level}.")
        if math.prod(levels) > 2**62:
            raise ValueError(
                f"`levels` must have a product of at most 2**62, got {list(levels)}. For more "
                "codes, combine several in a `GroupedQuantizer`."
            )
        self.symmetric = symmetric
        self._levels = tuple(levels)
        self._set_constant("levels", lambda: torch.tensor(self._levels, dtype=torch.int64))

    @property
    def dim(self) -> int:
        """Number of features, the length of ``levels``."""
        return len(self._levels)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """One codebook with all combinations of levels."""
        return (math.prod(self._levels),)

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Empty: nothing is learned."""
        return ()

    @property
    def _learns_from_result(self) -> bool:
        """False: there are no parameters."""
        return False

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return f"{list(self._levels)}, symmetric={self.symmetric}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If ``x`` or ``mask`` has the wrong shape.
        """
        x, valid = validate_input(x, mask, self.dim)
        warn_of_channels_first(self, x)
        digits = self._fractional_digits(x)
        indices = torch.where(valid, self._index(digits), -1)
        return self._output(digits, indices, valid, x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the index of each vector: ``(..., d) -> (...)``."""
        x, valid = validate_input(x, mask, self.dim)
        return torch.where(valid, self._index(self._fractional_digits(x)), -1)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` ``(...)`` had been chosen."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        indices = mask_indices(indices, valid, 1)
        return self._output(self._fractional_digits(x), indices, valid, x.dtype)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes named by ``indices``: ``(...) -> (..., d)``; -1 decodes to zeros.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If an index on the CPU names no code.
        """
        validate_indices(indices, self.codebook_sizes)
        digits = split_indices(indices.long(), self._levels)
        dtype = self.dtype
        codes = self._values(digits.to(torch.promote_types(dtype, torch.float32)))
        return torch.where((indices >= 0).unsqueeze(-1), codes, 0.0).to(dtype)

    def _fractional_digits(self, x: Tensor) -> Tensor:
        """Maps features to fractional digits, which round to 0 to ``levels - 1``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        counts = self._constant("levels", x.device)
        levels = counts.to(wide.dtype)
        if self.symmetric:
            return (levels - 1) * (wide.tanh() + 1) / 2
        # The bound exceeds the outermost levels a little: tanh reaches them without saturating.
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0).to(wide.dtype)
        shift = (offset / half).atanh()
        return (wide + shift).tanh() * half - offset + torch.floor(levels / 2)

    def _values(self, digits: Tensor) -> Tensor:
        """Maps digits, whole or fractional, to features in ``[-1, 1]``."""
        levels = self._constant("levels", digits.device).to(digits.dtype)
        if self.symmetric:
            return digits * 2 / (levels - 1) - 1
        half = torch.floor(levels / 2)
        return (digits - half) / half

    def _index(self, digits: Tensor) -> Tensor:
        # Ties go to the lower level; `round` would choose the even one.
        # With more than 1000 levels, the bound exceeds the outermost by over half a level: clamp.
        nearest = (digits - 0.5).ceil().long()
        levels = self._constant("levels", digits.device)
        whole = torch.minimum(nearest.clamp_min(0), levels - 1)
        return join_indices(whole, self._levels)

    def _output(
        self, digits: Tensor, indices: Tensor, valid: Tensor, dtype: torch.dtype
    ) -> QuantizerOutput:
        codes = self.decode(indices).to(dtype)
        quantized = straight_through(self._values(digits).to(dtype), codes)
        return make_output(torch.where(valid.unsqueeze(-1), quantized, 0.0), indices, {})
