"""Random choices for many samples at once, as tensors on the device.

Everything is drawn from a torch generator on the device and nothing is read back, so there is no
host synchronization.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from tvqrap.degradations.blur_kernels import SIZES, KernelChoice

AREA, BILINEAR, BICUBIC = range(3)  # modes of a resize, as in pipeline.MODES
BESSEL_END, BESSEL_POINTS = 48, 256  # end of the table of J1, and points per unit
CUBIC = -0.75  # the parameter of torch's bicubic kernel without antialiasing


@dataclasses.dataclass(frozen=True)
class Chances:
    """Draws one number for each of ``count`` samples.

    Attributes:
        count: Number of samples.
        generator: Source of randomness; results are on its device.
    """

    count: int
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        """Device of the results."""
        return self.generator.device

    def uniform(self, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        """Draws numbers in ``[low, high)``."""
        numbers = torch.rand(self.count, generator=self.generator, device=self.device)
        return low + (high - low) * numbers

    def whether(self, probability: float) -> Tensor:
        """Draws True with this probability."""
        return self.uniform() < probability

    def below(self, end: int) -> Tensor:
        """Draws whole numbers from 0 to ``end - 1``."""
        return self.uniform(0, end).long().clamp_max(end - 1)

    def among(self, probabilities: tuple[float, ...]) -> Tensor:
        """Draws positions in ``probabilities``, which sum to 1."""
        ends, total = [], 0.0
        for probability in probabilities[:-1]:
            total += probability
            ends.append(total)
        drawn = self.uniform()
        return sum(((drawn >= end).long() for end in ends), torch.zeros_like(drawn).long())


def draw_kernels(choice: KernelChoice, chances: Chances) -> Tensor:
    """Draws blur kernels as ``KernelChoice.draw`` does: ``(n, 1, 21, 21)``, each summing to 1."""
    size = 2 * chances.below(len(SIZES)) + SIZES[0]
    kind = chances.among(choice.probs)
    first, second = chances.uniform(*choice.sigma), chances.uniform(*choice.sigma)
    isotropic = kind % 2 == 0
    second = torch.where(isotropic, first, second)
    rotation = chances.uniform(-math.pi, math.pi)
    beta = torch.ones_like(first)
    for family, (low, high) in enumerate((choice.beta_generalized, choice.beta_plateau), start=1):
        drawn = torch.where(
            chances.whether(0.5), chances.uniform(low, 1.0), chances.uniform(1.0, high)
        )
        beta = torch.where(kind // 2 == family, drawn, beta)
    bells = _bells(first, second, rotation, beta, kind // 2 == 2)
    lowest = torch.where(size < 13, math.pi / 3, math.pi / 5)
    sincs = _sincs(chances.uniform(lowest, math.pi))
    chosen = torch.where(chances.whether(choice.sinc_prob)[:, None, None], sincs, bells)
    return _cut(chosen, size)


def draw_final_sincs(chances: Chances) -> Tensor:
    """Draws final sinc filters as ``draw_final_sinc`` does: ``(n, 1, 21, 21)``."""
    size = 2 * chances.below(len(SIZES)) + SIZES[0]
    return _cut(_sincs(chances.uniform(math.pi / 3, math.pi)), size)


def gaussians(sigma: Tensor, size: int) -> Tensor:
    """Returns round Gaussian kernels ``(n, 1, size, size)``; the identity for sigma 0."""
    y, x = _grid(sigma.device, size)
    spread = sigma.clamp_min(1e-2)[:, None, None]
    weights = torch.exp(-(x**2 + y**2) / (2 * spread**2))
    return (weights / weights.sum((1, 2), keepdim=True))[:, None]


def resampling(source: Tensor, target: Tensor, mode: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns matrices that resize one axis, as ``F.interpolate`` does without antialiasing.

    Samples of different sizes are at the top left of canvases of one size; beyond a sample's own
    size its border is repeated.

    Args:
        source: Sizes ``(n,)`` before, whole numbers.
        target: Sizes ``(n,)`` after.
        mode: ``AREA``, ``BILINEAR`` or ``BICUBIC`` for each.
        shape: Sides of the canvas after and before.

    Returns:
        ``(n, *shape)``.
    """
    rows, columns = (torch.arange(side, device=source.device) for side in shape)
    source, target = source[:, None], target[:, None]
    row = torch.minimum(rows, target - 1)
    ratio = source / target
    center = ((row + 0.5) * ratio - 0.5)[..., None]
    last = (source - 1)[..., None]
    column = columns[None, None]
    linear = (1 - (center.clamp_min(0).minimum(last) - column).abs()).clamp_min(0)
    left, cubic = center.floor(), torch.zeros_like(linear)
    for tap in range(-1, 3):
        where = (left + tap).clamp_min(0).minimum(last)
        cubic = cubic + _cubic(center - left - tap) * (where == column)
    # As adaptive pooling: all pixels that an area touches have equal weight.
    begin = torch.div(row * source, target, rounding_mode="floor")[..., None]
    end = -torch.div(-(row + 1) * source, target, rounding_mode="floor")[..., None]
    area = ((column >= begin) & (column < end)).float() / (end - begin)
    mode = mode[:, None, None]
    return torch.where(mode == AREA, area, torch.where(mode == BILINEAR, linear, cubic))


def _cubic(distance: Tensor) -> Tensor:
    x = distance.abs()
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    return torch.where(x <= 1, near, far)


def _bells(
    first: Tensor, second: Tensor, rotation: Tensor, beta: Tensor, plateau: Tensor
) -> Tensor:
    """Returns kernels as ``BellKernel``, at the largest size."""
    y, x = _grid(first.device, SIZES[-1])
    first, second, rotation, beta, plateau = (
        part[:, None, None] for part in (first, second, rotation, beta, plateau)
    )
    along = (rotation.cos() * x + rotation.sin() * y) / first
    across = (rotation.cos() * y - rotation.sin() * x) / second
    # Not 0 in the center: devices differ in powers of 0.
    distance = (along**2 + across**2).clamp_min(1e-12) ** beta
    return torch.where(plateau, 1 / (1 + distance), torch.exp(-distance / 2))


def _sincs(cutoff: Tensor) -> Tensor:
    """Returns kernels as ``SincKernel``, at the largest size."""
    y, x = _grid(cutoff.device, SIZES[-1])
    center, cutoff = (x == 0) & (y == 0), cutoff[:, None, None]
    radius = torch.where(center, 1.0, torch.hypot(x, y))
    weights = _bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    return torch.where(center, cutoff / (4 * math.pi), weights)


def _bessel_j1(x: Tensor) -> Tensor:
    """Looks up the Bessel function J1, in a table that covers the largest kernel.

    On a GPU, torch's own function is compiled at its first call.
    """
    place = x * BESSEL_POINTS
    left = place.long().clamp_max(BESSEL_END * BESSEL_POINTS - 1)
    table = _bessel_table(x.device)
    return torch.lerp(table[left], table[left + 1], place - left)


@functools.cache
def _bessel_table(device: torch.device) -> Tensor:
    points = torch.arange(BESSEL_END * BESSEL_POINTS + 1, dtype=torch.float64) / BESSEL_POINTS
    return torch.special.bessel_j1(points).float().to(device)


def _cut(kernels: Tensor, size: Tensor) -> Tensor:
    """Cuts kernels to their size and normalizes them to sum 1."""
    y, x = _grid(kernels.device, SIZES[-1])
    inside = torch.maximum(x.abs(), y.abs()) <= (size // 2)[:, None, None]
    kernels = kernels * inside
    return (kernels / kernels.sum((1, 2), keepdim=True))[:, None]


def _grid(device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """Returns rows and columns, 0 in the center."""
    line = torch.arange(size, device=device, dtype=torch.float32) - size // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return y, x
