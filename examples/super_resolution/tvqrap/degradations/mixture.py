"""A mixture of clean, mildly and severely degraded low-resolution images.

``pipeline.py`` degrades samples one by one, each from its own seed. Here a whole batch is degraded
at once on its device, from one generator: a few hundred launches for any number of samples. The
distribution is the same; samples of different sizes share canvases of one size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tvqrap.degradations.blur_kernels import UNSHARP, Range, blur, sharpen
from tvqrap.degradations.chances import (
    Chances,
    draw_final_sincs,
    draw_kernels,
    gaussians,
    resampling,
)
from tvqrap.degradations.jpeg import jpeg
from tvqrap.degradations.pipeline import FIRST, SECOND, WHITE, Final, NoiseChoice, Order
from tvqrap.models.assembly import SCALE


@dataclass(frozen=True)
class Mild:
    """The mild degradation: a little blur, noise and JPEG compression of the small image.

    Attributes:
        sigma: Range of the blur's standard deviation, in low-resolution pixels.
        noise: Range of the noise's standard deviation, in 8-bit levels.
        quality: Range of the JPEG quality.
        sigma_prob: Probability of blur.
        noise_prob: Probability of noise.
        quality_prob: Probability of compression.
        gray_prob: Probability that noise is the same in all channels.
    """

    sigma: Range = (0.1, 1.0)
    noise: Range = (1.0, 10.0)
    quality: Range = (30.0, 95.0)
    sigma_prob: float = 0.5
    noise_prob: float = 0.55
    quality_prob: float = 0.7
    gray_prob: float = 0.3

    def __call__(self, lr: Tensor, generator: torch.Generator) -> Tensor:
        """Degrades clean small images ``(n, 3, h, w)``."""
        chances = Chances(len(lr), generator)
        sigma = chances.uniform(*self.sigma) * chances.whether(self.sigma_prob)
        image = blur(lr, gaussians(sigma, 9))
        strength = chances.uniform(*self.noise) * chances.whether(self.noise_prob)
        noise = _normal(image, chances.whether(self.gray_prob), generator)
        image = (image + noise * (strength / WHITE)[:, None, None, None]).clamp(0, 1)
        compressed = jpeg(image, chances.uniform(*self.quality))
        return _choose(chances.whether(self.quality_prob), compressed, image)


class Share:
    """Splits off a share of whole numbers that is exact in the long run."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.rest = 0.0

    def of(self, count: int) -> int:
        """Returns the share of ``count``, rounded down; the remainder is kept for the next call."""
        self.rest += self.share * count
        whole = int(self.rest + 1e-6)
        self.rest -= whole
        return min(whole, count)


class SecondOrderBatch:
    """The degradation of ``SecondOrder`` for a batch of square crops."""

    def __init__(
        self, first: Order = FIRST, second: Order = SECOND, final: Final | None = None
    ) -> None:
        self.first, self.second = first, second
        self.final = Final() if final is None else final
        self.unsharp = UNSHARP.weights()
        self.twice = Share(second.prob)

    def __call__(self, hr: Tensor, generator: torch.Generator) -> Tensor:
        """Degrades crops ``(n, 3, H, H)`` to ``(n, 3, H/4, H/4)``, not rounded."""
        side = hr.shape[-1]
        self.unsharp = self.unsharp.to(hr.device)
        image = sharpen(hr, weights=self.unsharp)
        size = torch.full((len(hr),), side, device=hr.device)
        image, size = _order(self.first, image, size, side, generator)
        # The first samples of the batch are degraded twice.
        twice = self.twice.of(len(hr))
        parts = []
        if twice:
            again = _order(self.second, image[:twice], size[:twice], side, generator)
            parts.append(again)
        if twice < len(hr):
            parts.append((image[twice:], size[twice:]))
        return torch.cat([self._finish(*part, side // SCALE, generator) for part in parts])

    def _finish(self, image: Tensor, size: Tensor, side: int, generator: torch.Generator) -> Tensor:
        """Resizes to the final size, filters and compresses, in either order."""
        chances = Chances(len(image), generator)
        quality = chances.uniform(*self.final.jpeg)
        last = chances.whether(self.final.jpeg_last_prob)
        image = _choose(last, image, jpeg(image.clamp(0, 1), quality))
        image = _resize(image, size, torch.full_like(size, side), chances.below(3), side)
        filtered = blur(image, draw_final_sincs(chances))
        image = _choose(chances.whether(self.final.sinc_prob), filtered, image)
        return _choose(last, jpeg(image.clamp(0, 1), quality), image)


class Mixture:
    """Leaves a share of a batch clean and degrades the rest mildly or severely, at random.

    Args:
        mild: Share of the samples degraded by ``Mild``.
        severe: Share degraded by ``SecondOrderBatch``; the rest stays clean.
    """

    def __init__(self, mild: float = 0.49, severe: float = 0.18) -> None:
        self.mild, self.severe = Share(mild), Share(severe)
        self.little, self.badly = Mild(), SecondOrderBatch()

    @torch.no_grad()
    def __call__(self, hr: Tensor, generator: torch.Generator) -> Tensor:
        """Maps square crops to low-resolution images.

        Args:
            hr: ``(n, 3, H, H)`` RGB in [0, 1], float32; H is a multiple of 4.
            generator: On the device of ``hr``.

        Returns:
            ``(n, 3, H/4, H/4)`` in [0, 1], rounded to 8-bit levels.
        """
        with torch.autocast(hr.device.type, enabled=False):
            lr = reduce(hr)
            order = torch.randperm(len(hr), generator=generator, device=hr.device)
            mild, severe = self.mild.of(len(hr)), self.severe.of(len(hr))
            if mild:
                chosen = order[:mild]
                lr[chosen] = self.little(lr[chosen], generator)
            if severe:
                chosen = order[mild : mild + severe]
                lr[chosen] = self.badly(hr[chosen], generator)
            return _to_levels(lr)


def reduce(hr: Tensor) -> Tensor:
    """Reduces by 4 with Pillow's bicubic filter, rounded to 8-bit levels."""
    size = [side // SCALE for side in hr.shape[-2:]]
    return _to_levels(F.interpolate(hr, size, mode="bicubic", antialias=True))


def _order(
    order: Order, image: Tensor, size: Tensor, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Applies blur, resize, noise and JPEG; returns images on canvases, and their sizes."""
    chances = Chances(len(image), generator)
    blurred = blur(image, draw_kernels(order.kernels, chances))
    image = _choose(chances.whether(order.blur_prob), blurred, image)
    low, high = order.resize.scale
    kind = chances.among(order.resize.probs)
    scale = torch.where(kind == 0, chances.uniform(1.0, high), chances.uniform(low, 1.0))
    scale = torch.where(kind == 2, 1.0, scale)
    target = (side * order.resize.base * scale).long().clamp_min(1)
    canvas = math.ceil(side * order.resize.base * high)
    image = _resize(image, size, target, chances.below(3), canvas)
    image = _add_noise(order.noise, image, chances)
    if order.jpeg is not None:
        image = jpeg(image, chances.uniform(*order.jpeg))
    return image, target


def _resize(image: Tensor, source: Tensor, target: Tensor, mode: Tensor, canvas: int) -> Tensor:
    matrix = resampling(source, target, mode, (canvas, image.shape[-1]))[:, None]
    return matrix @ image @ matrix.transpose(-1, -2)


def _add_noise(choice: NoiseChoice, image: Tensor, chances: Chances) -> Tensor:
    gray = chances.whether(choice.gray_prob)
    sigma = chances.uniform(*choice.sigma) / WHITE
    gaussian = _normal(image, gray, chances.generator) * sigma[:, None, None, None]
    scale = chances.uniform(*choice.poisson_scale)[:, None, None, None]
    red, green, blue = image.split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    poisson = scale * _choose(
        gray, _poisson(luma, chances.generator).expand_as(image),
        _poisson(image, chances.generator),
    )  # fmt: skip
    noise = _choose(chances.whether(choice.gaussian_prob), gaussian, poisson)
    return (image + noise).clamp(0, 1)


def _normal(image: Tensor, gray: Tensor, generator: torch.Generator) -> Tensor:
    """Draws standard normal noise, the same for all channels where it is gray."""
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return _choose(gray, noise[:, :1].expand_as(noise), noise)


def _poisson(seen: Tensor, generator: torch.Generator) -> Tensor:
    """Draws Poisson noise; see ``PoissonNoise``."""
    levels = (seen.clamp(0, 1) * WHITE).round()
    found = torch.zeros(len(seen), WHITE + 1, device=seen.device)
    found.scatter_(1, levels.flatten(1).long(), 1.0)
    events = 2 ** found.sum(1).log2().ceil()[:, None, None, None]
    return torch.poisson(levels / WHITE * events, generator=generator) / events - levels / WHITE


def _choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition[:, None, None, None], yes, no)


def _to_levels(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * WHITE).round() / WHITE
