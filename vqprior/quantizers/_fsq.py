"""Finite scalar quantization: each feature is rounded to one of a few levels."""

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from vqprior._checks import (
    check_at_least,
    check_floating,
    check_last_dim,
    check_mask,
    check_sequence,
)
from vqprior._interfaces import Codebook, Quantizer
from vqprior._results import QuantizerOutput
from vqprior.quantizers._shared._columns import mask_indices
from vqprior.quantizers._shared._inputs import (
    validate_assignment,
    validate_indices,
    validate_input,
    warn_of_channels_first,
)
from vqprior.quantizers._shared._levels import (
    Bounds,
    can_fuse,
    pass_scaled,
    round_digits,
    round_fused,
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
        strides = [math.prod(levels[:place]) for place in range(len(levels))]
        self._set_constant("_strides", lambda: torch.tensor(strides, dtype=torch.int64))
        self._set_constant("_unnamed", lambda: torch.tensor(-1))
        self._set_constant("_bounds", lambda: self._find_bounds(torch.float32))

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
        fused = self._fused(x, mask)
        if fused is not None:
            warn_of_channels_first(self, x)
            return make_output(*fused, {})
        x, valid = validate_input(x, mask, self.dim)
        warn_of_channels_first(self, x)
        inner, bounds = self._squash(x)
        digits = round_digits(inner.detach(), bounds)
        codes = self._codes(digits, bounds)
        return self._output(inner, codes, self._join(digits, valid), valid, x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the index of each vector: ``(..., d) -> (...)``."""
        fused = self._fused(x, mask)
        if fused is not None:
            return fused[1]
        x, valid = validate_input(x, mask, self.dim)
        return self._join(round_digits(*self._squash(x)), valid)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` ``(...)`` had been chosen."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        indices = mask_indices(indices, valid, 1)
        return self._output(self._squash(x)[0], self.decode(indices), indices, valid, x.dtype)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes named by ``indices``: ``(...) -> (..., d)``; -1 decodes to zeros.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If an index on the CPU names no code.
        """
        validate_indices(indices, self.codebook_sizes)
        strides = self._constant("_strides", indices.device)
        index = indices.long().unsqueeze(-1)
        digits = index.div(strides, rounding_mode="floor") % self._constant("levels", index.device)
        dtype = torch.promote_types(self.dtype, torch.float32)
        bounds = self._bounds_in(dtype, indices.device)
        codes = self._codes(digits.to(dtype), bounds)
        return torch.where(index >= 0, codes, bounds.zero.to(self.dtype))

    def _find_bounds(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """Returns the rows of ``Bounds`` as one tensor."""
        counts = self.levels if device is None else self._constant("levels", device)
        levels = counts.to(dtype)
        steps = (levels - 1) / 2
        zero = torch.zeros_like(levels)
        if self.symmetric:
            rows = [zero, steps, steps - 0.5, steps * 2, steps, torch.ones_like(levels), zero]
            return torch.stack(rows)
        # The bound exceeds the outermost levels a little: tanh reaches them without saturating.
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0).to(dtype)
        shift = (offset / half).atanh()
        middle = torch.floor(levels / 2)
        rows = [shift, half, middle - offset - 0.5, steps * 2, middle, half / middle, zero]
        return torch.stack(rows)

    def _bounds_in(self, dtype: torch.dtype, device: torch.device) -> Bounds:
        """Returns the bounds in float32 or wider."""
        if dtype == torch.float32:
            return Bounds(*self._constant("_bounds", device).unbind())
        return Bounds(*self._find_bounds(dtype, device).unbind())

    def _squash(self, x: Tensor) -> tuple[Tensor, Bounds]:
        """Maps features to ``(-1, 1)``, in float32 or wider."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        bounds = self._bounds_in(wide.dtype, x.device)
        return (wide if self.symmetric else wide + bounds.shift).tanh(), bounds

    def _codes(self, digits: Tensor, bounds: Bounds) -> Tensor:
        """Maps digits to features in ``[-1, 1]``, in the dtype of the module."""
        wide = digits.to(torch.promote_types(self.dtype, torch.float32))
        if wide.dtype != bounds.middle.dtype:
            bounds = self._bounds_in(wide.dtype, wide.device)
        if self.symmetric:
            return (wide / bounds.middle - 1).to(self.dtype)
        return ((wide - bounds.middle) / bounds.middle).to(self.dtype)

    def _join(self, digits: Tensor, valid: Tensor) -> Tensor:
        joined = (digits.long() * self._constant("_strides", digits.device)).sum(dim=-1)
        return torch.where(valid, joined, self._constant("_unnamed", digits.device))

    def _output(
        self, inner: Tensor, codes: Tensor, indices: Tensor, valid: Tensor, dtype: torch.dtype
    ) -> QuantizerOutput:
        bounds = self._bounds_in(inner.dtype, inner.device)
        quantized = pass_scaled(inner, codes.to(dtype), valid, bounds)
        return make_output(quantized, indices, {})

    def _fused(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Returns ``quantized`` and ``indices`` by one kernel, or None where it cannot be used."""
        check_floating("x", x)
        if self.dtype not in (torch.float32, x.dtype) or not can_fuse(x, mask):
            return None
        check_last_dim("x", x, self.dim)
        if mask is not None:
            check_mask(mask, x.shape[:-1])
        bounds, strides = self._constant("_bounds", x.device), self._constant("_strides", x.device)
        return round_fused(x, mask, bounds, strides, self.symmetric)
