"""The blur kernels of the second-order degradation: drawing and applying them.

Kernels and their probabilities: Wang et al., "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data", ICCVW 2021, arXiv 2107.10833
(https://arxiv.org/abs/2107.10833), section 3.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Range = tuple[float, float]

SIZES = range(7, 22, 2)
KINDS = (
    "iso",
    "aniso",
    "generalized-iso",
    "generalized-aniso",
    "plateau-iso",
    "plateau-aniso",
)


@dataclass(frozen=True)
class BellKernel:
    """A Gaussian, generalized Gaussian or plateau kernel, round or elliptic.

    With d = x^T S^-1 x for a position x and the covariance S, it is exp(-d / 2) for a Gaussian,
    exp(-d^beta / 2) for a generalized Gaussian and 1 / (1 + d^beta) for a plateau.

    Attributes:
        kind: One of ``KINDS``.
        size: Pixels along a side, odd.
        sigma: Standard deviations along the two axes, in pixels; equal for the ``iso`` kinds.
        rotation: Angle from the horizontal to the first axis, in radians.
        beta: The exponent above; 1 for Gaussians.
    """

    kind: str
    size: int
    sigma: Range
    rotation: float = 0.0
    beta: float = 1.0

    def weights(self) -> Tensor:
        """Returns ``(size, size)``, not negative, summing to 1."""
        y, x = _positions(self.size)
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        along, across = (cos * x + sin * y) / self.sigma[0], (cos * y - sin * x) / self.sigma[1]
        distance = (along**2 + across**2) ** self.beta
        plateau = self.kind.startswith("plateau")
        return _normalized(1 / (1 + distance) if plateau else torch.exp(-distance / 2))


@dataclass(frozen=True)
class SincKernel:
    """The circular low-pass filter, cut to a square; it causes ringing and overshoot at edges.

    Its value at radius r is c J1(c r) / (2 pi r), with the Bessel function J1 and the cut-off c.

    Attributes:
        size: Pixels along a side, odd.
        cutoff: Highest frequency that passes, in radians per pixel; pi passes everything.
    """

    size: int
    cutoff: float

    def weights(self) -> Tensor:
        """Returns ``(size, size)``, summing to 1; some are negative."""
        radius = torch.hypot(*_positions(self.size))
        center = self.size // 2
        radius[center, center] = 1.0  # avoids 0 / 0; the limit is filled in below
        weights = torch.special.bessel_j1(self.cutoff * radius) / (2 * math.pi * radius)
        weights[center, center] = self.cutoff / (4 * math.pi)
        return _normalized(weights)


Kernel = BellKernel | SincKernel


@dataclass(frozen=True)
class KernelChoice:
    """A distribution of kernels.

    Attributes:
        sigma: Range of the standard deviations, in pixels.
        beta_generalized: Range of the exponent of generalized Gaussians; includes 1.
        beta_plateau: Range of the exponent of plateaus; includes 1.
        sinc_prob: Probability of a sinc kernel.
        probs: Probabilities of ``KINDS`` if the kernel is not a sinc.
    """

    sigma: Range
    beta_generalized: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)
    sinc_prob: float = 0.1
    probs: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)

    def draw(self, rng: np.random.Generator) -> Kernel:
        """Draws a kernel of random size."""
        size = int(rng.choice(SIZES))
        if rng.random() < self.sinc_prob:
            # Small kernels are too short for the long waves of a low cut-off.
            lowest = math.pi / 3 if size < 13 else math.pi / 5
            return SincKernel(size, float(rng.uniform(lowest, math.pi)))
        kind = KINDS[rng.choice(len(KINDS), p=self.probs)]
        first, second = (float(s) for s in rng.uniform(*self.sigma, size=2))
        if not kind.endswith("aniso"):
            return BellKernel(kind, size, (first, first), beta=self._beta(kind, rng))
        rotation = float(rng.uniform(-math.pi, math.pi))
        return BellKernel(kind, size, (first, second), rotation, self._beta(kind, rng))

    def _beta(self, kind: str, rng: np.random.Generator) -> float:
        """Draws the exponent: below and above 1 with equal probability.

        Half of the plateaus, whose range begins at 1, therefore have exactly 1, as in BasicSR.
        """
        name = kind.split("-")[0]
        if name not in ("generalized", "plateau"):
            return 1.0
        low, high = self.beta_generalized if name == "generalized" else self.beta_plateau
        return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))


def draw_final_sinc(rng: np.random.Generator) -> SincKernel:
    """Draws the sinc filter of the final step; its cut-off is at least pi / 3 at all sizes."""
    return SincKernel(int(rng.choice(SIZES)), float(rng.uniform(math.pi / 3, math.pi)))


def blur(image: Tensor, weights: Tensor) -> Tensor:
    """Filters all channels of an image with one kernel, with reflected borders.

    If the radius of the kernel is the image's short side or more, borders are replicated instead.

    The kernel is applied by Fourier transforms. On one CPU thread that takes 2 ms where the direct
    convolution takes 8 (21 x 21) to 47 (51 x 51, both on 3 x 256 x 256); on a GPU it stays in full
    float32, where convolutions are rounded to TF32 by default.

    Args:
        image: ``(b, c, h, w)``, float32.
        weights: ``(k, k)``, k odd, or one kernel for each image, ``(b, 1, k, k)``; moved to the
            image's device.

    Returns:
        ``(b, c, h, w)``; equals ``conv2d`` for symmetric kernels, which all kernels here are.
    """
    margin = weights.shape[-1] // 2
    mode = "reflect" if margin < min(image.shape[-2:]) else "replicate"
    padded = F.pad(image, (margin,) * 4, mode=mode)
    height, width = padded.shape[-2:]
    # Multiples of 16 transform fast. The wrap-around stays within the margins.
    size = (height + -height % 16, width + -width % 16)
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(weights.to(image.device), s=size)
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * margin : height, 2 * margin : width]


@dataclass(frozen=True)
class Blur:
    """A blur step. The official code pads kernels to 21 x 21, which does not change the result."""

    kernel: Kernel

    def __call__(self, image: Tensor, scene: object = None) -> Tensor:
        """Maps ``(b, c, h, w)`` to the same shape."""
        return blur(image, self.kernel.weights())


# A window of 51 pixels with OpenCV's sigma for it, 0.3 (radius - 1) + 0.8.
UNSHARP = BellKernel("iso", 51, (8.0, 8.0))
UNSHARP_THRESHOLD = 10 / 255


def sharpen(image: Tensor, weight: float = 0.5, weights: Tensor | None = None) -> Tensor:
    """Applies the unsharp masking of Real-ESRGAN: adds the difference from a wide blur.

    It acts only where the difference exceeds 10 levels, with a soft edge, so that noise is not
    amplified.

    Args:
        image: ``(b, c, h, w)`` in [0, 1], float32.
        weight: Factor of the difference.
        weights: Kernel of the wide blur, if it is on the device already.

    Returns:
        ``(b, c, h, w)`` in [0, 1].
    """
    weights = UNSHARP.weights() if weights is None else weights
    residual = image - blur(image, weights)
    where = blur((residual.abs() > UNSHARP_THRESHOLD).float(), weights)
    sharp = (image + weight * residual).clamp(0, 1)
    return image + where * (sharp - image)


def _positions(size: int) -> tuple[Tensor, Tensor]:
    """Returns rows and columns, 0 in the center, in double precision."""
    line = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return y, x


def _normalized(weights: Tensor) -> Tensor:
    return (weights / weights.sum()).float()
