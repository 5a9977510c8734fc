"""Makes low-resolution images from high-resolution crops: bicubic, or second-order degradation.

Both take a batch of crops and one seed per crop. Everything random about a sample depends on its
own seed only: not on the rest of the batch, its position, or the global random state, which is
never touched. Parameters come from NumPy's generator, noise from a torch generator on the CPU, so
noise is the same on a GPU.

The second-order degradation is that of Wang et al., "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data", ICCVW 2021, arXiv 2107.10833
(https://arxiv.org/abs/2107.10833), with the parameters of TVQ&RAP (arXiv 2509.23774). The official
code of both draws one resize and one kind of noise for a whole batch, and mixes batches from a pool
of older pairs. Here every sample has its own choices, so no pool is needed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tvqrap.degradations.blur_kernels import Blur, KernelChoice, Range, draw_final_sinc, sharpen
from tvqrap.degradations.jpeg import Jpeg
from tvqrap.models.assembly import SCALE

MODES = ("area", "bilinear", "bicubic")
WHITE = 255  # the highest of the 8-bit levels


class Degradation(Protocol):
    """A way to make low-resolution images."""

    def __call__(self, hr: Tensor, seeds: Sequence[int]) -> Tensor:
        """Maps crops and seeds to low-resolution images.

        Computes in float32 under autocast, too, and without gradients.

        Args:
            hr: ``(b, 3, H, W)`` RGB in [0, 1], floats; H and W are multiples of 4.
            seeds: One per sample, at least 0.

        Returns:
            ``(b, 3, H / 4, W / 4)`` in [0, 1], float32, rounded to 8-bit levels, on the device of
            ``hr``.

        Raises:
            ValueError: If ``hr`` or the number of seeds is not as described.
        """
        ...


@dataclass(frozen=True)
class Bicubic:
    """Bicubic reduction with antialiasing, as in Pillow; ignores the seeds."""

    @torch.no_grad()
    def __call__(self, hr: Tensor, seeds: Sequence[int]) -> Tensor:
        """See ``Degradation``."""
        _check(hr, seeds)
        size = _fraction(hr.shape[-2:], 1 / SCALE)
        with torch.autocast(hr.device.type, enabled=False):
            return _to_levels(F.interpolate(hr.float(), size, mode="bicubic", antialias=True))


class Scene(NamedTuple):
    """The inputs of a step besides the image."""

    size: tuple[int, int]  # of the crop
    generator: torch.Generator  # source of noise, on the CPU


# A step of a degradation of an image (1, 3, h, w), with fixed parameters.
Step = Callable[[Tensor, Scene], Tensor]


@dataclass(frozen=True)
class Resize:
    """A resize without antialiasing."""

    fraction: float  # of the sides of the crop
    mode: str  # one of ``MODES``

    def __call__(self, image: Tensor, scene: Scene) -> Tensor:
        """Returns the resized image, of at least one pixel."""
        size = _fraction(scene.size, self.fraction)
        if size == image.shape[-2:]:
            return image
        # Real-ESRGAN passes a factor in the first order, which shifts the image where the size is
        # not a whole number of pixels. Passing a size maps the whole image to the whole image.
        return F.interpolate(image, size, mode=self.mode)


@dataclass(frozen=True)
class GaussianNoise:
    """Gaussian noise."""

    sigma: float  # in 8-bit levels
    gray: bool  # all channels get the same

    def __call__(self, image: Tensor, scene: Scene) -> Tensor:
        """Returns the noisy image in [0, 1]."""
        shape = (1, 1 if self.gray else 3, *image.shape[-2:])
        noise = torch.randn(shape, generator=scene.generator).to(image.device)
        return (image + noise * (self.sigma / WHITE)).clamp(0, 1)


@dataclass(frozen=True)
class PoissonNoise:
    """Poisson noise: brighter pixels are noisier.

    White has as many events as the image has distinct 8-bit levels, rounded up to a power of two.
    """

    scale: float  # factor of the noise
    gray: bool  # all channels get the noise of the gray image

    def __call__(self, image: Tensor, scene: Scene) -> Tensor:
        """Returns the noisy image in [0, 1]."""
        seen = image
        if self.gray:
            red, green, blue = image.split(1, dim=1)
            seen = 0.299 * red + 0.587 * green + 0.114 * blue
        levels = (seen.clamp(0, 1) * WHITE).round().long()
        events = 2 ** math.ceil(math.log2(len(levels.unique())))
        # Not torch.poisson: how many random numbers it takes depends on the image, so one level
        # that a GPU rounds differently would change the noise of all pixels after it.
        uniform = torch.rand(levels.shape, generator=scene.generator).to(image.device)
        noise = _poisson(levels, uniform, events) / events - levels / WHITE
        return (image + noise * self.scale).clamp(0, 1)


@dataclass(frozen=True)
class ResizeChoice:
    """A distribution of resizes."""

    probs: tuple[float, float, float]  # of enlarging, reducing, keeping the size
    scale: Range  # smallest reduction and largest enlargement
    base: float = 1.0  # sides at scale 1, as a fraction of the crop's

    def draw(self, rng: np.random.Generator) -> Resize:
        """Draws a resize; all modes are equally likely."""
        ranges = ((1, self.scale[1]), (self.scale[0], 1), (1, 1))
        scale = float(rng.uniform(*ranges[rng.choice(3, p=self.probs)]))
        return Resize(self.base * scale, str(rng.choice(MODES)))


@dataclass(frozen=True)
class NoiseChoice:
    """A distribution of noise."""

    sigma: Range  # of Gaussian noise, in 8-bit levels
    poisson_scale: Range
    gaussian_prob: float = 0.5  # otherwise it is Poisson noise
    gray_prob: float = 0.4

    def draw(self, rng: np.random.Generator) -> GaussianNoise | PoissonNoise:
        """Draws Gaussian or Poisson noise."""
        gray = bool(rng.random() < self.gray_prob)
        if rng.random() < self.gaussian_prob:
            return GaussianNoise(float(rng.uniform(*self.sigma)), gray)
        return PoissonNoise(float(rng.uniform(*self.poisson_scale)), gray)


@dataclass(frozen=True)
class Order:
    """A distribution of one order: blur, resize, noise, JPEG."""

    kernels: KernelChoice
    resize: ResizeChoice
    noise: NoiseChoice
    jpeg: Range | None = None  # of the quality; None for no compression
    prob: float = 1.0  # of the whole order
    blur_prob: float = 1.0

    def draw(self, rng: np.random.Generator) -> tuple[Step, ...]:
        """Draws the steps; none if the order is skipped."""
        if rng.random() >= self.prob:
            return ()
        blurs = [Blur(self.kernels.draw(rng))] if rng.random() < self.blur_prob else []
        jpegs = [Jpeg(float(rng.uniform(*self.jpeg)))] if self.jpeg else []
        return (*blurs, self.resize.draw(rng), self.noise.draw(rng), *jpegs)


@dataclass(frozen=True)
class Final:
    """A distribution of the final steps: resize and sinc filter, before or after JPEG.

    JPEG is never between the two: Real-ESRGAN found that this leaves twisted lines.
    """

    jpeg: Range = (30.0, 95.0)  # of the quality
    sinc_prob: float = 0.8
    jpeg_last_prob: float = 0.5

    def draw(self, rng: np.random.Generator) -> tuple[Step, ...]:
        """Draws the steps."""
        fit: list[Step] = [Resize(1 / SCALE, str(rng.choice(MODES)))]
        if rng.random() < self.sinc_prob:
            fit.append(Blur(draw_final_sinc(rng)))
        compress = Jpeg(float(rng.uniform(*self.jpeg)))
        return (*fit, compress) if rng.random() < self.jpeg_last_prob else (compress, *fit)


class Plan(NamedTuple):
    """The steps drawn for one sample; its noise is drawn from ``noise_seed``."""

    first: tuple[Step, ...]
    second: tuple[Step, ...]
    final: tuple[Step, ...]
    noise_seed: int


FIRST = Order(
    KernelChoice(sigma=(0.2, 3.0)),
    ResizeChoice((0.2, 0.7, 0.1), scale=(0.15, 1.5)),
    NoiseChoice(sigma=(1.0, 30.0), poisson_scale=(0.05, 3.0)),
    jpeg=(30.0, 95.0),
)
SECOND = Order(
    KernelChoice(sigma=(0.2, 1.5)),
    ResizeChoice((0.3, 0.4, 0.3), scale=(0.3, 1.2), base=1 / SCALE),
    NoiseChoice(sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
    prob=0.5,
    blur_prob=0.8,
)


@dataclass(frozen=True)
class SecondOrder:
    """The degradation of Real-ESRGAN: sharpening, then blur, resize, noise and JPEG, twice.

    Samples are degraded one by one, because their intermediate sizes differ.
    """

    first: Order = FIRST
    second: Order = SECOND
    final: Final = Final()
    sharpening: float = 0.5  # weight of the unsharp masking of the crop

    def draw(self, seed: int) -> Plan:
        """Draws the steps for the sample of a seed."""
        rng = np.random.default_rng(seed)
        first, second, final = (part.draw(rng) for part in (self.first, self.second, self.final))
        return Plan(first, second, final, noise_seed=int(rng.integers(2**63)))

    @torch.no_grad()
    def __call__(self, hr: Tensor, seeds: Sequence[int]) -> Tensor:
        """See ``Degradation``."""
        _check(hr, seeds)
        with torch.autocast(hr.device.type, enabled=False):
            samples = zip(hr.float().split(1), map(self.draw, seeds), strict=True)
            return torch.cat([self._degrade(*sample) for sample in samples])

    def _degrade(self, hr: Tensor, plan: Plan) -> Tensor:
        image = sharpen(hr, self.sharpening)
        height, width = hr.shape[-2:]
        scene = Scene((height, width), torch.Generator().manual_seed(plan.noise_seed))
        for step in (*plan.first, *plan.second, *plan.final):
            image = step(image, scene)
        return _to_levels(image)


DEGRADATIONS = {"bicubic": Bicubic, "second-order": SecondOrder}


def _check(hr: Tensor, seeds: Sequence[int]) -> None:
    if hr.ndim != 4 or hr.shape[1] != 3 or 0 in hr.shape or not hr.is_floating_point():
        raise ValueError(f"`hr` must be floats (b, 3, H, W), got {hr.dtype} {tuple(hr.shape)}.")
    if any(side % SCALE for side in hr.shape[-2:]):
        raise ValueError(
            f"`hr` must have sides that are multiples of {SCALE}, got {tuple(hr.shape)}."
        )
    if len(seeds) != len(hr):
        raise ValueError(
            f"`seeds` must have one seed per sample, got {len(seeds)} for {len(hr)} samples."
        )


def _fraction(size: Sequence[int], fraction: float) -> tuple[int, int]:
    height, width = (max(int(side * fraction), 1) for side in size)
    return height, width


def _to_levels(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * WHITE).round() / WHITE


def _poisson(levels: Tensor, uniform: Tensor, events: int) -> Tensor:
    """Returns Poisson numbers of mean ``levels / 255 * events``: the smallest whose cumulative
    distribution exceeds ``uniform``, which has one number in [0, 1) per level.
    """
    exact = {"dtype": torch.float64, "device": levels.device}
    rows = torch.arange(WHITE + 1, **exact)[:, None]
    counts = torch.arange(events + 10 * math.isqrt(events) + 16, **exact)
    means = rows / WHITE * events
    logarithms = torch.xlogy(counts, means) - means - torch.lgamma(counts + 1)
    cumulative = logarithms.exp().cumsum(1)
    # Row r is shifted to [r, r + 1]: all rows form one sorted table, searched once.
    table = (cumulative.clamp(max=1) + rows).flatten()
    found = torch.searchsorted(table, (levels + uniform.double()).contiguous(), right=True)
    return (found - levels * len(counts)).float()
