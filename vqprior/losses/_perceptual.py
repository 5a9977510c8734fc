"""Perceptual loss on the features of a frozen network."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from vqprior._checks import check_shape

# Added to the squared norm of a feature vector. LPIPS adds 1e-10 to the norm instead, which gives
# a gradient of 1e10 where all features are zero.
_EPS = 1e-8


@final
class PerceptualLoss(nn.Module):
    """Perceptual loss: squared distance of normalized features, as LPIPS with all weights 1.

    The features at each position are scaled to length 1; the squared difference is summed over
    channels, averaged over positions and images, and summed over layers. Each layer contributes
    between 0 and 4 (at most 2 for nonnegative features).

    The network is frozen: the constructor sets ``requires_grad=False`` on its parameters, and it
    stays in eval mode even if ``train()`` is called. The gradient flows to the reconstruction
    only. Distances are computed in float32 or wider.

    Args:
        features: Module that maps an image to a feature map, a sequence of maps, or a mapping of
            names to maps. It must normalize its input itself.
        layers: Names of the maps to compare, or their positions in a sequence; by default all.

    Raises:
        ValueError: If ``layers`` is empty.

    Shape:
        - ``reconstruction``, ``target``: any that ``features`` accepts
        - each map: ``(b, c, ...)``
        - returns: ``()``

    References:
        Zhang et al., *The Unreasonable Effectiveness of Deep Features as a Perceptual Metric*,
        CVPR 2018, equation 1 with all weights 1, and a constant in the norm that keeps
        gradients finite. <https://arxiv.org/abs/1801.03924>

    Examples:
        >>> import torch
        >>> from vqprior.losses import PerceptualLoss
        >>> loss = PerceptualLoss(torch.nn.Conv2d(3, 8, kernel_size=3))
        >>> image = torch.rand(1, 3, 16, 16)
        >>> loss(image, image).item()
        0.0
        >>> bool(loss(1 - image, image) > 0)
        True
    """

    def __init__(
        self, features: nn.Module, *, layers: Sequence[str] | Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if layers is not None and len(layers) == 0:
            raise ValueError("`layers` must name at least one map, got none. Pass None for all.")
        self.features = features.requires_grad_(requires_grad=False).eval()
        self.layers: tuple[str | int, ...] | None = None if layers is None else tuple(layers)

    def extra_repr(self) -> str:
        """Shows the layers in ``repr``."""
        return f"layers={self.layers}"

    def train(self, mode: bool = True) -> "PerceptualLoss":  # noqa: FBT001, FBT002
        """Sets the mode of the loss; the network stays in eval mode."""
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Returns the distance of two images of the same shape.

        Raises:
            ValueError: If the shapes differ, or the network does not return a map in ``layers``.
        """
        check_shape("target", target, reconstruction.shape)
        ours = self._maps(reconstruction)
        with torch.no_grad():
            theirs = self._maps(target)
        distances = [
            (_unit(a) - _unit(b)).square().sum(dim=1).mean()
            for a, b in zip(ours, theirs, strict=True)
        ]
        return torch.stack(distances).sum()

    def _maps(self, image: Tensor) -> list[Tensor]:
        """Returns the maps to compare, in the order of ``layers``."""
        out = self.features(image)
        maps: dict[str | int, Tensor]
        if isinstance(out, Tensor):
            maps = {0: out}
        else:
            maps = dict(out) if isinstance(out, Mapping) else dict(enumerate(out))
        layers = list(maps) if self.layers is None else self.layers
        for layer in layers:
            if layer not in maps:
                raise ValueError(f"`layers` must be among {list(maps)}, got {layer!r}.")
        return [maps[layer] for layer in layers]

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any; callers deserve the real type.

        def __call__(self, reconstruction: Tensor, target: Tensor) -> Tensor: ...


def _unit(features: Tensor) -> Tensor:
    """Scales the features at each position to length 1."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return wide * (wide.square().sum(dim=1, keepdim=True) + _EPS).rsqrt()
