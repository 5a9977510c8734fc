"""A convolution for what each scale of a multi-scale quantizer adds."""

from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import check_at_least, check_floating, check_fraction


@final
class ScaleRefinement(nn.Module):
    """Mixes enlarged codes with a 3x3 convolution of them: for ``MultiScaleQuantizer``.

    Computes ``(1 - ratio) * codes + ratio * conv(codes)``. Scales that lie close to each other
    share a convolution: each convolution has a tick in ``[0, 1]``, and the nearest to
    ``position`` is used, the first of two equally near. Ticks are evenly spaced from ``m`` to
    ``1 - m``, with ``m`` one third of ``1 / num_refinements`` where there are four and half of
    it otherwise. Codes keep their dtype; the convolution is computed in the wider of their
    dtype and that of its weights.

    Args:
        dim: Number of features ``d``, at least 1.
        num_refinements: Number of convolutions, at least 1.
        ratio: Share of the convolution in the result, in ``[0, 1]``.

    Raises:
        ValueError: If an argument is out of range.

    Shape:
        - ``codes``: ``(b, h, w, d)``
        - output: ``(b, h, w, d)``

    References:
        Tian et al., *Visual Autoregressive Modeling*, NeurIPS 2024, section 3.2 (the
        convolutions ``phi``); the ticks are those of the authors' code.
        <https://arxiv.org/abs/2404.02905>

    Examples:
        >>> import torch
        >>> from vqprior import MultiScaleQuantizer, VectorQuantizer
        >>> from vqprior.nn import ScaleRefinement
        >>> vq = VectorQuantizer(dim=8, codebook_size=64)
        >>> refine = ScaleRefinement(8)
        >>> var = MultiScaleQuantizer(vq, scales=(1, 2, 4), refine=refine, codebook_weight=1.0)
        >>> var(torch.randn(3, 4, 4, 8)).quantized.shape
        torch.Size([3, 4, 4, 8])
    """

    def __init__(self, dim: int, num_refinements: int = 4, *, ratio: float = 0.5) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("num_refinements", num_refinements, 1)
        check_fraction("ratio", ratio)
        self.dim = dim
        self.ratio = ratio
        self.convolutions = nn.ModuleList(
            nn.Conv2d(dim, dim, kernel_size=3, padding=1) for _ in range(num_refinements)
        )
        margin = 1 / (3 if num_refinements == 4 else 2) / num_refinements
        # With numpy, as the authors: halfway between two ticks, the last bit decides.
        self._ticks: list[float] = np.linspace(margin, 1 - margin, num_refinements).tolist()

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return f"{self.dim}, {len(self._ticks)}, ratio={self.ratio}"

    def forward(self, codes: Tensor, position: float) -> Tensor:
        """Refines ``codes`` ``(b, h, w, d)`` of the scale at ``position`` in ``[0, 1]``.

        Raises:
            TypeError: If ``codes`` is not floating point.
            ValueError: If ``codes`` has another shape, or ``position`` is out of range.
        """
        check_floating("codes", codes)
        if codes.ndim != 4 or codes.shape[-1] != self.dim:
            raise ValueError(
                f"`codes` must have shape (b, h, w, {self.dim}), got {tuple(codes.shape)}. "
                "Features come last, and the spatial dimensions are two."
            )
        check_fraction("position", position)
        convolution = self.convolutions[self._nearest(position)]
        weight, bias = convolution.get_parameter("weight"), convolution.get_parameter("bias")
        dtype = torch.promote_types(codes.dtype, weight.dtype)
        channels_first = codes.movedim(-1, 1).to(dtype)
        added = F.conv2d(channels_first, weight.to(dtype), bias.to(dtype), padding=1)
        # Autocast can make the convolution narrower than the codes.
        mixed = channels_first.lerp(added.to(dtype), self.ratio)
        return mixed.movedim(1, -1).to(codes.dtype)

    def _nearest(self, position: float) -> int:
        best = 0
        for number, tick in enumerate(self._ticks):
            if abs(tick - position) < abs(self._ticks[best] - position):
                best = number
        return best
