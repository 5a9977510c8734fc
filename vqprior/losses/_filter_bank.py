"""Perceptual loss without learned weights, from oriented filters and local contrast."""

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import check_feature_map, check_interval, check_shape
from vqprior._placement import Placed
from vqprior._precision import without_autocast
from vqprior._transforms import is_transforming

_SIGMA = 0.8
_RADIUS = 2  # 2.5 standard deviations
_NUM_FILTERS = 6
# The neighborhood whose contrast masks a position: as large as a filter.
_POOL = 5
# Just noticeable contrast for images in [0, 1]: about the 2 % of Weber's law.
_JUST_NOTICED = 0.02
# Responses are of order 1, so the distance is quadratic below 0.1 and linear above.
_KNEE = 0.1
_MIN_SIZE = 8
# The chroma of an 8 x 8 image can be halved three times.
_MAX_SCALES = 3
# Luma (ITU-R BT.601), red-green, blue-yellow.
_OPPONENT = ((0.299, 0.587, 0.114), (0.5, -0.5, 0.0), (-0.25, -0.25, 0.5))


@final
class FilterBank(Placed):
    """Computes responses of fixed edge, bar and blob filters, normalized by local contrast.

    The image is split into luma and two opponent chroma channels. Each is filtered with six
    derivatives of a Gaussian: two first derivatives (edges), three second derivatives (bars at 0,
    60 and 120 degrees) and the Laplacian (blobs). A response never exceeds the range of the
    values under its filter. With ``E`` the sum of the six squared responses, averaged over 5 x 5
    positions, each channel gives seven maps:

    - each response divided by ``sqrt(c^2 + E)``: the position and shape of structure,
      independent of its strength;
    - ``log(1 + E / c^2) / 2``: its strength, in nepers above the just noticeable contrast.

    The constant ``c = 0.02``, the just noticeable contrast, suppresses responses in flat areas: a
    flat image gives zeros up to rounding, and no map changes faster than ``1 / c`` with a
    filter's output. Chroma is filtered at half the resolution of luma, to match human vision.

    Nothing is learned. Computed in float32 or wider, also under autocast and after ``.half()``.

    Args:
        num_scales: Number of scales, each half the size of the previous one, in ``[1, 4)``.

    Raises:
        ValueError: If ``num_scales`` is not in ``[1, 4)``.

    Shape:
        - input: ``(b, 3, h, w)`` in ``[0, 1]``, with ``h`` and ``w`` at least 8
        - output: a list of ``2 * num_scales`` maps: for each scale ``s``, luma
          ``(b, 7, h // 2**s, w // 2**s)`` and chroma ``(b, 14, h // 2**(s+1), w // 2**(s+1))``

    References:
        Freeman and Adelson, *The Design and Use of Steerable Filters*, PAMI 1991, for the
        filters; Heeger, *Normalization of Cell Responses in Cat Striate Cortex*, Visual
        Neuroscience 1992, for the normalization. The combination is our own.

    Examples:
        >>> import torch
        >>> from vqprior.losses import FilterBank
        >>> maps = FilterBank(num_scales=2)(torch.rand(1, 3, 32, 32))
        >>> [tuple(m.shape[1:]) for m in maps]
        [(7, 32, 32), (14, 16, 16), (7, 16, 16), (14, 8, 8)]
    """

    filters: Tensor
    opponent: Tensor

    def __init__(self, *, num_scales: int = 3) -> None:
        super().__init__()
        check_interval("num_scales", num_scales, 1, _MAX_SCALES + 1)
        self.num_scales = num_scales
        self._set_constant("filters", _derivative_filters)
        self._set_constant("opponent", lambda: torch.tensor(_OPPONENT, dtype=torch.float32))

    def extra_repr(self) -> str:
        """Shows the number of scales in ``repr``."""
        return f"num_scales={self.num_scales}"

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the maps of ``x`` ``(b, 3, h, w)``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If ``x`` is not of shape ``(b, 3, h, w)`` with ``h`` and ``w`` at least
                8.
        """
        check_feature_map("x", x, 3, min_size=_MIN_SIZE)
        dtype = torch.promote_types(x.dtype, torch.float32)
        opponent = self._constant("opponent", x.device)
        with without_autocast(x.device.type):
            split = torch.einsum("oc,bchw->bohw", opponent.to(dtype), x.to(dtype))
            luma, chroma = split[:, :1], F.avg_pool2d(split[:, 1:], 2)
            maps = [self._responses(luma), self._responses(chroma)]
            for _ in range(1, self.num_scales):
                luma, chroma = F.avg_pool2d(luma, 2), F.avg_pool2d(chroma, 2)
                maps += [self._responses(luma), self._responses(chroma)]
        return maps

    def _responses(self, signal: Tensor) -> Tensor:
        """Computes the maps of one scale, ``(b, c, h, w) -> (b, 7 * c, h, w)``."""
        height, width = signal.shape[2:]
        # One channels-last depthwise convolution over all images and channels: on a CPU three
        # times as fast as the plain one, forward and backward. `vmap` cannot make this layout.
        planes = F.pad(signal, (_RADIUS,) * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
        layout = torch.contiguous_format if is_transforming() else torch.channels_last
        num_planes = planes.shape[1]
        filters = self._constant("filters", signal.device)
        responses = F.conv2d(
            planes.contiguous(memory_format=layout),
            filters.to(signal.dtype).repeat(num_planes, 1, 1, 1),
            groups=num_planes,
        ).reshape(*signal.shape[:2], _NUM_FILTERS, height, width)
        energy = responses.square().sum(dim=2)
        for kernel in ((_POOL, 1), (1, _POOL)):  # separable: twice as fast
            padding = (kernel[0] // 2, kernel[1] // 2)
            energy = F.avg_pool2d(
                energy, kernel, stride=1, padding=padding, count_include_pad=False
            )
        relative = responses * (energy + _JUST_NOTICED**2).rsqrt().unsqueeze(2)
        strength = 0.5 * (energy / _JUST_NOTICED**2).log1p()
        return torch.cat([relative.flatten(1, 2), strength], dim=1)

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any; callers deserve the real type.

        def __call__(self, x: Tensor) -> list[Tensor]: ...


@final
class FilterBankLoss(nn.Module):
    """Perceptual loss: distance of two images in the maps of a ``FilterBank``.

    Averages ``5 difference^2`` for differences up to 0.1, and ``|difference| - 0.05`` above, over
    each map and then over the maps. Blur is penalized for lost contrast and misplaced texture for
    its position; noise too weak to be seen costs almost nothing. Equal images give 0.

    The gradient flows to the reconstruction only and is bounded everywhere, even in flat areas.

    Args:
        num_scales: Number of scales of the filter bank, in ``[1, 4)``.

    Raises:
        ValueError: If ``num_scales`` is not in ``[1, 4)``.

    Shape:
        - ``reconstruction``, ``target``: ``(b, 3, h, w)`` in ``[0, 1]``, with ``h`` and ``w``
          at least 8
        - returns: ``()``

    References:
        Huber, *Robust Estimation of a Location Parameter*, Annals of Mathematical Statistics
        1964, for the distance, divided by 0.1; the rest is our own.

    Examples:
        >>> import torch
        >>> from vqprior.losses import FilterBankLoss
        >>> loss, texture = FilterBankLoss(), torch.rand(1, 3, 32, 32)
        >>> blurred = torch.nn.functional.avg_pool2d(texture, 3, stride=1, padding=1)
        >>> loss(texture, texture).item(), bool(loss(blurred, texture) > 0.1)
        (0.0, True)
    """

    def __init__(self, *, num_scales: int = 3) -> None:
        super().__init__()
        self.bank = FilterBank(num_scales=num_scales)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Returns the distance of two images of the same shape.

        Raises:
            TypeError: If an image is not floating point.
            ValueError: If the shapes differ, or are not ``(b, 3, h, w)`` with ``h`` and ``w``
                at least 8.
        """
        check_shape("target", target, reconstruction.shape)
        ours = self.bank(reconstruction)
        with torch.no_grad():
            theirs = self.bank(target)
        distances = [F.smooth_l1_loss(a, b, beta=_KNEE) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(distances).mean()

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any; callers deserve the real type.

        def __call__(self, reconstruction: Tensor, target: Tensor) -> Tensor: ...


def _derivative_filters() -> Tensor:
    """Builds the six filters ``(6, 1, 5, 5)``: each sums to 0, its positive part to 1."""
    # On the CPU, since not every default device has float64.
    axis = torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64, device="cpu") / _SIGMA
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    gaussian = torch.exp(-(x.square() + y.square()) / 2)
    angles = torch.arange(3, dtype=torch.float64, device="cpu") * (torch.pi / 3)
    along = [x * angle.cos() + y * angle.sin() for angle in angles]
    shapes = [x, y, *(u.square() - 1 for u in along), x.square() + y.square() - 2]
    filters = torch.stack([shape * gaussian for shape in shapes])
    # Truncated second derivatives do not sum to 0 exactly, but a flat area must give 0.
    filters -= filters.sum(dim=(1, 2), keepdim=True) * gaussian / gaussian.sum()
    filters /= filters.clamp_min(0).sum(dim=(1, 2), keepdim=True)
    return filters.float().unsqueeze(1).to(torch.get_default_device())
