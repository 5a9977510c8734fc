"""Residual quantization of maps over several scales, coarse to fine."""

from collections.abc import Sequence
from typing import Protocol, cast, final

import torch
from torch import Tensor, nn

from vqprior._checks import (
    check_at_least,
    check_callable,
    check_floating,
    check_integer,
    check_mask,
    check_scales,
    check_shape,
)
from vqprior._interfaces import Codebook, Quantizer
from vqprior._precision import without_autocast
from vqprior._results import QuantizerOutput
from vqprior._transforms import is_learning
from vqprior.functional import straight_through
from vqprior.functional._losses import commitment_and_codebook_mse
from vqprior.functional._resizing import average_down, enlarge
from vqprior.quantizers._shared._columns import mask_indices
from vqprior.quantizers._shared._inputs import check_index_per_token, know_layout
from vqprior.quantizers._shared._outputs import code_dtype, make_output, merge_outputs
from vqprior.quantizers._shared._scales import ScaleLayout


class Refine(Protocol):
    """Refines enlarged codes ``(b, *spatial, d)`` of the scale at ``position`` in [0, 1]."""

    def __call__(self, codes: Tensor, position: float) -> Tensor: ...


@final
class MultiScaleQuantizer(Quantizer):
    """Residual quantization of a map over growing scales.

    At each scale the residual is averaged down and quantized; the codes are enlarged and
    subtracted from it. The indices of all scales are concatenated in one dimension, smallest
    scale first. The gradient of ``quantized`` is the identity. Masked positions are left out of
    all averages; in ``quantized`` they hold the sum of the codes that cover them, as ``decode``
    computes it.

    Loss terms of ``quantizer`` are summed over scales. The two weights here apply to the
    cumulative losses of the paper, between the map and the sum up to each scale, averaged over
    scales; they also train ``refine``. For the paper's tokenizer, give ``quantizer`` weights of 0.

    Args:
        quantizer: The quantizer of every scale.
        scales: Sizes, smallest first: tuples over the spatial dimensions (1 to 3), or ``p`` for
            ``(p, p)``. The last is the size of the map.
        refine: A function or module ``(codes, position) -> codes``, applied to the enlarged codes
            ``(b, *spatial, d)``; ``position`` goes from 0 at the first scale to 1 at the last. By
            default codes are not refined.
        commitment_weight: Weight of the mean of ``(x - sg[sum])^2``, at least 0.
        codebook_weight: Weight of the mean of ``(sg[x] - sum)^2``, at least 0.

    Raises:
        ValueError: If ``scales`` is empty, mixes numbers of dimensions or shrinks, a weight is
            negative, ``quantizer`` does not have features last or indices for each token, or
            ``refine`` has trainable parameters and ``codebook_weight`` is 0.

    Shape:
        - input, ``quantized``: ``(..., *spatial, d)``, ``mask`` ``(..., *spatial)``
        - ``indices``: ``(..., n)`` or ``(..., n, q)`` with ``n`` the positions of all scales

    References:
        Tian et al., *Visual Autoregressive Modeling*, NeurIPS 2024, algorithms 1 and 2.
        <https://arxiv.org/abs/2404.02905>

    Examples:
        >>> import torch
        >>> from vqprior import MultiScaleQuantizer, VectorQuantizer
        >>> vq = MultiScaleQuantizer(VectorQuantizer(dim=8, codebook_size=64), scales=(1, 2, 4))
        >>> out = vq(torch.randn(3, 4, 4, 8))
        >>> out.indices.shape  # 1 + 4 + 16
        torch.Size([3, 21])
        >>> torch.equal(vq.decode(out.indices), out.quantized)
        True
    """

    def __init__(
        self,
        quantizer: Quantizer,
        scales: Sequence[int | tuple[int, ...]],
        *,
        refine: Refine | None = None,
        commitment_weight: float = 0.0,
        codebook_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.scales = check_scales(scales)
        check_index_per_token("quantizer", quantizer)
        know_layout([quantizer])
        if refine is not None:
            check_callable("refine", refine, "For example `nn.ScaleRefinement`.")
        check_at_least("commitment_weight", commitment_weight, 0.0)
        check_at_least("codebook_weight", codebook_weight, 0.0)
        learns = isinstance(refine, nn.Module) and any(
            parameter.requires_grad for parameter in refine.parameters()
        )
        if learns and codebook_weight == 0:
            raise ValueError(
                "`codebook_weight` must be greater than 0 for `refine` to learn, got "
                f"{codebook_weight}. Freeze `refine`, or pass a positive weight."
            )
        self.quantizer = quantizer
        self._layout = ScaleLayout(self.scales, quantizer.num_codebooks)
        self.has_index_per_token = False  # indices belong to scales, not to tokens
        self._positions_per_token = sum(self._layout.counts) / self._layout.counts[-1]
        self.refine = refine
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight

    @property
    def dim(self) -> int:
        """Number of features of the wrapped quantizer."""
        return self.quantizer.dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codebook sizes of the wrapped quantizer, which all scales share."""
        return self.quantizer.codebook_sizes

    @property
    def _learns_from_result(self) -> bool:
        """False: as in the paper, modules learn from the cumulative losses."""
        return False

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Codebooks of the wrapped quantizer, repeated for each scale."""
        return self.quantizer.codebooks * len(self.scales)

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return (
            f"scales={self.scales}, commitment_weight={self.commitment_weight}, "
            f"codebook_weight={self.codebook_weight}"
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., *spatial, d)``; ``mask`` is True for real positions.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If ``x`` or ``mask`` has the wrong shape.
        """
        return self._run(x, mask, None)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices ``(..., n)`` of all scales, smallest scale first."""
        flat, valid, leading = self._validate_input(x, mask)
        rest, found = flat, []
        total = torch.zeros_like(flat, dtype=code_dtype(self))
        for number in range(len(self.scales)):
            small, seen = self._shrink(rest, valid, number)
            indices = self.quantizer.encode(small, seen)
            # Rounded as in `forward`, so that indices are the same.
            total = total + self._enlarged(indices, number)
            rest = flat - total.to(flat.dtype)
            found.append(indices)
        return self._layout.join(found, leading)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the sum over scales ``(..., *spatial, d)``; a scale of -1 adds nothing.

        For a coarse version, set the indices of later scales to -1. Where only a part of a scale
        is -1, ``refine`` sees codes of zeros there.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If ``indices`` has the wrong shape, or one on the CPU names no code.
        """
        parts, leading = self._layout.split(indices)
        total = sum(self._enlarged(part, number) for number, part in enumerate(parts))
        whole = cast("Tensor", total).reshape(*leading, *self.scales[-1], self.dim)
        return whole.to(self.dtype)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` ``(..., n)`` had been chosen.

        Indices do not say which positions are masked: set masked positions of ``x`` to NaN.
        """
        check_integer("indices", indices)
        return self._run(x, None, indices)

    def logits(
        self, x: Tensor, *, temperature: float = 1.0, indices: Tensor | None = None
    ) -> Tensor:
        """Returns logits over the codes at each position of each scale: ``(..., n, [q,] k)``.

        Args:
            x: The map ``(..., *spatial, d)``.
            temperature: Divides the logits, greater than 0.
            indices: Indices ``(..., n)`` to use for smaller scales (teacher forcing); by default
                those that ``encode`` chooses. -1 is a choice not made yet, as in ``decode``.

        Raises:
            TypeError: If the quantizer has no explicit codebook.
            ValueError: If ``temperature`` is not greater than 0, or a shape is wrong.
        """
        flat, valid, leading = self._validate_input(x, None)
        given = None if indices is None else self._layout.split_for(indices, leading)
        rest, parts = flat, []
        total = torch.zeros_like(flat, dtype=code_dtype(self))
        for number in range(len(self.scales)):
            small, seen = self._shrink(rest, valid, number)
            known = None if given is None else given[number]
            logits = self.quantizer.logits(small, temperature=temperature, indices=known)
            with torch.no_grad():
                chosen = self.quantizer.encode(small, seen) if known is None else known
                total = total + self._enlarged(chosen, number)
            rest = flat - total.to(flat.dtype)
            parts.append(logits)
        return self._layout.join(parts, leading)

    def _run(self, x: Tensor, mask: Tensor | None, indices: Tensor | None) -> QuantizerOutput:
        flat, valid, leading = self._validate_input(x, mask)
        given = None if indices is None else self._layout.split_for(indices, leading)
        rest, outs = flat, []
        total = torch.zeros_like(flat, dtype=code_dtype(self))
        losses = {"commitment": total.new_zeros(()), "codebook": total.new_zeros(())}
        weights = self._weights()
        pulled = flat if weights["commitment"] > 0 else flat.detach()
        for number in range(len(self.scales)):
            small, seen = self._shrink(rest, valid, number)
            if given is None:
                out = self.quantizer(small, seen)
            else:
                chosen = mask_indices(given[number], seen, self.num_codebooks)
                out = self.quantizer.quantize_as(small, chosen)
            # `decode` carries the gradient to codes and modules.
            total = total + self._enlarged(out.indices, number)
            rest = flat - total.detach().to(flat.dtype)
            outs.append(out)
            pulling = total if weights["codebook"] > 0 else total.detach()
            both = commitment_and_codebook_mse(pulled, pulling, valid)
            for name, loss in zip(losses, both, strict=True):
                losses[name] = losses[name] + loss
        joined = merge_outputs(
            outs, flat, self._layout.join([out.indices for out in outs], leading)
        )
        terms = dict(joined.terms)
        for name, weight in weights.items():
            if weight > 0:
                term = weight * losses[name] / len(self.scales)
                terms[name] = terms[name] + term if name in terms else term
        codes = total.detach().reshape(*leading, *self.scales[-1], self.dim)
        codes = codes.to(self.dtype).to(x.dtype)  # rounded as in `decode`
        inputs = torch.where(valid.reshape(codes.shape[:-1]).unsqueeze(-1), x, 0.0)
        quantized = straight_through(inputs, codes)
        return make_output(quantized, joined.indices, terms, joined.selections)

    def _weights(self) -> dict[str, float]:
        learns = any(is_learning(parameter) for parameter in self.parameters())
        codebook_weight = self.codebook_weight if learns else 0.0
        return {"commitment": self.commitment_weight, "codebook": codebook_weight}

    def _validate_input(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, torch.Size]:
        """Checks the map; returns it as ``(b, *spatial, d)``, its validity and leading sizes."""
        check_floating("x", x)
        last = (*self.scales[-1], self.dim)
        if tuple(x.shape[-len(last) :]) != last:
            raise ValueError(
                f"`x` must have shape (..., {', '.join(map(str, last))}), got {tuple(x.shape)}. "
                "The last scale is the size of the map, and features come last: for feature maps "
                "(b, d, *spatial), wrap the quantizer in `ChannelsFirst`."
            )
        valid = x.isfinite().all(dim=-1)
        if mask is not None:
            check_mask(mask, x.shape[:-1])
            valid = valid & mask
        leading = x.shape[: -len(last)]
        x = torch.where(valid.unsqueeze(-1), x, 0.0)
        x = x.to(torch.promote_types(x.dtype, code_dtype(self)))
        return x.reshape(-1, *last), valid.reshape(-1, *last[:-1]), leading

    def _shrink(self, rest: Tensor, valid: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Averages over the valid positions of each cell; cells without any are invalid."""
        if number == len(self.scales) - 1:
            return rest, valid
        return average_down(rest, valid, self.scales[number])

    def _enlarged(self, indices: Tensor, number: int) -> Tensor:
        """Returns the refined codes of one scale at full size ``(b, *spatial, d)``."""
        codes = self.quantizer.decode(indices).to(code_dtype(self))
        with without_autocast(codes.device.type):
            if number < len(self.scales) - 1:
                codes = enlarge(codes, self.scales[-1])
            if self.refine is None:
                return codes
            refined = self.refine(codes, number / max(len(self.scales) - 1, 1))
        check_shape("refine(codes, position)", refined, codes.shape)
        known = (indices >= 0).flatten(1).any(dim=1)  # `refine` may have a bias
        return torch.where(known.reshape(-1, *[1] * (codes.ndim - 1)), refined, 0.0)
