"""Convolutional refinement of the scales of a ``MultiScaleQuantizer``, as in VAR."""

from typing import cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import check_at_least, check_floating, check_fraction


@final
class ScaleRefinement(nn.Module):
    """Refines upsampled codes with a 3x3 convolution: the ``refine`` of a ``MultiScaleQuantizer``.

    Computes ``(1 - ratio) * codes + ratio * conv(codes)``. Neighboring scales share a
    convolution: each convolution has a tick in ``[0, 1]``, and the one nearest to ``position`` is
    used, the first in case of a tie. Ticks are evenly spaced from ``m`` to ``1 - m``, where ``m``
    is ``1 / (3 * num_refinements)`` for 4 convolutions and ``1 / (2 * num_refinements)``
    otherwise. The result has the dtype of the codes; the convolution is computed in the wider of
    the dtypes of codes and weights.

    Args:
        dim: Number of features ``d``, at least 1.
        num_refinements: Number of convolutions, at least 1.
        ratio: Weight of the convolution in the result, in ``[0, 1]``.

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
        # numpy, as in the authors' code: halfway between two ticks, the last bit decides.
        self._ticks: list[float] = np.linspace(margin, 1 - margin, num_refinements).tolist()

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return f"{self.dim}, {len(self._ticks)}, ratio={self.ratio}"

    def forward(self, codes: Tensor, position: float) -> Tensor:
        """Refines ``codes`` ``(b, h, w, d)`` of the scale at ``position`` in ``[0, 1]``.

        Raises:
            TypeError: If ``codes`` is not floating point.
            ValueError: If ``codes`` is not of shape ``(b, h, w, d)``, or ``position`` is out of
                range.
        """
        check_floating("codes", codes)
        if codes.ndim != 4 or codes.shape[-1] != self.dim:
            raise ValueError(
                f"`codes` must have shape (b, h, w, {self.dim}), got {tuple(codes.shape)}. "
                "Features come last, after two spatial dimensions."
            )
        check_fraction("position", position)
        convolution = self.convolutions[self._nearest(position)]
        # Not by `get_parameter`: in `torch.func.functional_call` it is no `nn.Parameter`.
        weight, bias = cast("Tensor", convolution.weight), cast("Tensor", convolution.bias)
        dtype = torch.promote_types(codes.dtype, weight.dtype)
        channels_first = codes.movedim(-1, 1).to(dtype)
        added = F.conv2d(channels_first, weight.to(dtype), bias.to(dtype), padding=1)
        # Autocast can compute the convolution in a narrower dtype than that of the codes.
        mixed = channels_first.lerp(added.to(dtype), self.ratio)
        return mixed.movedim(1, -1).to(codes.dtype)

    def _nearest(self, position: float) -> int:
        best = 0
        for number, tick in enumerate(self._ticks):
            if abs(tick - position) < abs(self._ticks[best] - position):
                best = number
        return best
