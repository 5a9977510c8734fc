"""Blur kernels: their shapes, how an image is blurred, and how it is sharpened."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.examples.degrading import photo
from tvqrap.degradations.blur_kernels import (
    BellKernel,
    SincKernel,
    blur,
    sharpen,
)
from tvqrap.degradations.pipeline import (
    FIRST,
    SECOND,
)


@pytest.mark.parametrize("order", [FIRST, SECOND])
def test_kernels_sum_to_one_and_are_symmetric(order):
    rng = np.random.default_rng(0)
    for _ in range(300):
        kernel = order.kernels.draw(rng)
        weights = kernel.weights()
        assert weights.shape == (kernel.size, kernel.size)
        assert weights.dtype == torch.float32
        assert weights.isfinite().all()
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
        # Otherwise it would move the image, and convolution would differ from correlation.
        torch.testing.assert_close(weights, weights.flip(0, 1), rtol=1e-4, atol=1e-7)
        if isinstance(kernel, BellKernel):
            assert weights.min() >= 0
            assert weights.argmax() == kernel.size**2 // 2
        if isinstance(kernel, SincKernel) or not kernel.kind.endswith("aniso"):
            torch.testing.assert_close(weights, weights.rot90(), rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(weights, weights.T, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "beta", "profile"),
    [
        ("iso", 1.0, lambda d: np.exp(-d / 2)),
        ("generalized-iso", 0.6, lambda d: np.exp(-(d**0.6) / 2)),
        ("generalized-iso", 3.0, lambda d: np.exp(-(d**3) / 2)),
        ("plateau-iso", 1.0, lambda d: 1 / (1 + d)),
        ("plateau-iso", 1.7, lambda d: 1 / (1 + d**1.7)),
    ],
)
def test_round_kernels_have_their_closed_form(kind, beta, profile):
    line = np.arange(-5, 6)
    expected = profile((line[:, None] ** 2 + line**2) / 1.3**2)
    weights = BellKernel(kind, 11, (1.3, 1.3), beta=beta).weights()
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["aniso", "generalized-aniso"])
def test_elongated_kernels_have_the_covariance_they_say(kind):
    angle, sigma = math.radians(30), (3.0, 1.0)
    weights = BellKernel(kind, 41, sigma, angle).weights().double()
    y, x = torch.meshgrid(*[torch.arange(-20.0, 21)] * 2, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    expected = turn @ np.diag(np.square(sigma)) @ turn.T
    covariance = [[(weights * a * b).sum() for a in (x, y)] for b in (x, y)]
    np.testing.assert_allclose(covariance, expected, rtol=1e-3)


@pytest.mark.parametrize("cutoff", [math.pi / 3, math.pi / 2, 2.2])
def test_sinc_kernels_pass_what_is_below_their_cutoff(cutoff):
    weights = SincKernel(21, cutoff).weights().double()
    gains = torch.fft.fft2(weights, s=(512, 512)).abs()

    def gain(frequency, *directions):
        """In radians a pixel; along the rows, and along a diagonal."""
        step = frequency * 512 / (2 * math.pi)
        diagonal = round(step / math.sqrt(2))
        return gains[0, round(step)].item(), gains[diagonal, diagonal].item()

    assert gain(0) == pytest.approx((1, 1))
    assert gain(0.7 * cutoff) == pytest.approx((1, 1), abs=0.2)
    assert gain(cutoff) == pytest.approx((0.5, 0.5), abs=0.12)
    assert max(gain(1.3 * cutoff)) < 0.12


def test_sinc_kernels_overshoot_at_an_edge():
    edge = torch.zeros(1, 1, 40, 40)
    edge[..., 20:] = 1
    result = blur(edge, SincKernel(21, math.pi / 3).weights())
    assert result.max() > 1.05
    assert result.min() < -0.05


@pytest.mark.parametrize(
    ("size", "shape"),
    [(21, (64, 64)), (7, (33, 50)), (51, (64, 27)), (21, (8, 64)), (51, (25, 25)), (21, (1, 1))],
)
def test_blur_is_a_convolution_that_mirrors_where_it_can(size, shape):
    image = torch.rand(2, 3, *shape)
    kernels = [
        BellKernel("aniso", size, (4.0, 1.0), 0.5).weights(),
        SincKernel(size, 1.2).weights(),
    ]
    mode = "reflect" if min(shape) > size // 2 else "replicate"
    padded = F.pad(image, (size // 2,) * 4, mode=mode)
    for weights in kernels:
        expected = F.conv2d(padded, weights.expand(3, 1, -1, -1), groups=3)
        torch.testing.assert_close(blur(image, weights), expected, rtol=0, atol=5e-6)


def test_sharpening_leaves_flat_and_faint_images_alone():
    flat = torch.full((1, 3, 64, 64), 0.3)
    assert torch.equal(sharpen(flat), flat)
    faint = 0.5 + 18 / 255 * (torch.rand(1, 3, 64, 64) - 0.5)
    assert torch.equal(sharpen(faint), faint)


def test_sharpening_deepens_an_edge_and_fades_away_from_it():
    edge = torch.full((1, 3, 200, 200), 0.3)
    edge[..., 100:] = 0.7
    sharp = sharpen(edge)
    middle = sharp[0, 0, 100]
    assert middle[99] < 0.24
    assert middle[100] > 0.76
    assert middle[[0, 60]].tolist() == pytest.approx([0.3, 0.3], abs=1e-5)
    assert middle[[140, 199]].tolist() == pytest.approx([0.7, 0.7], abs=1e-5)
    assert (sharpen(edge, 0.0) - edge).abs().max() < 1e-6


def test_sharpening_is_unsharp_masking_with_a_soft_mask():
    hr = photo().double()
    line = torch.exp(-(torch.arange(-25, 26, dtype=torch.float64) ** 2) / (2 * 8**2))
    line = (line / line.sum()).expand(3, 1, 1, 51)

    def wide(image):
        padded = F.pad(image, (25,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, line, groups=3), line.mT, groups=3)

    residual = hr - wide(hr)
    mask = wide((residual.abs() * 255 > 10).double())
    expected = mask * (hr + 0.5 * residual).clamp(0, 1) + (1 - mask) * hr
    assert (expected - hr).abs().max() > 0.05
    torch.testing.assert_close(sharpen(hr.float()).double(), expected, rtol=0, atol=5e-4)
