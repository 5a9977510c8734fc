"""PSNR, SSIM and GMSD of single images, against their formulas written as loops."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vqprior.metrics import gmsd, psnr, rgb_to_luma, ssim


def pair(*shape, noise=0.1):
    target = torch.rand(*shape)
    return (target + noise * torch.randn(*shape)).clamp(0, 1), target


def psnr_by_hand(x, y, peak):
    return 10 * math.log10(peak**2 / np.mean((x - y) ** 2))


def ssim_by_hand(x, y, peak):
    """Wang et al. 2004 on one channel, window by window."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            values.append(numerator / (mean_a**2 + mean_b**2 + c1) / (var_a + var_b + c2))
    return np.mean(values)


def gmsd_by_hand(x, y, peak):
    """Xue et al. 2014 on one channel, in [0, 255] with T = 170 as in the authors' code."""

    def magnitude(image):
        image = image * 255 / peak
        height, width = image.shape[0] // 2, image.shape[1] // 2
        half = np.zeros((height + 2, width + 2))
        for i in range(height):
            for j in range(width):
                half[i + 1, j + 1] = image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()
        result = np.zeros((height, width))
        for i in range(height):
            for j in range(width):
                around = half[i : i + 3, j : j + 3]
                across = (around[:, 0] - around[:, 2]).sum() / 3
                down = (around[0] - around[2]).sum() / 3
                result[i, j] = math.hypot(across, down)
        return result

    a, b = magnitude(x), magnitude(y)
    similarity = (2 * a * b + 170) / (a**2 + b**2 + 170)
    return math.sqrt(((similarity - similarity.mean()) ** 2).mean())


def numpy(tensor):
    return tensor.double().numpy()


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_psnr_is_its_formula(peak):
    x, y = (peak * p for p in pair(3, 3, 5, 7))
    expected = [psnr_by_hand(numpy(a), numpy(b), peak) for a, b in zip(x, y, strict=True)]
    assert_close(psnr(x, y, data_range=peak), torch.tensor(expected))


def test_psnr_of_known_errors():
    x = torch.zeros(3, 1, 4, 4)
    x[1], x[2, 0, 0, 0] = 0.1, 0.4  # the mean square of one pixel in 16 is 0.01
    assert_close(psnr(x, torch.zeros_like(x)), torch.tensor([math.inf, 20.0, 20.0]))


@pytest.mark.parametrize("peak", [1.0, 255.0])
@pytest.mark.parametrize("size", [(11, 11), (13, 16)], ids=str)
def test_ssim_is_its_formula(size, peak):
    x, y = (peak * p for p in pair(2, 2, *size))
    expected = [
        np.mean([ssim_by_hand(numpy(a[c]), numpy(b[c]), peak) for c in range(2)])
        for a, b in zip(x, y, strict=True)
    ]
    assert_close(ssim(x, y, data_range=peak), torch.tensor(expected, dtype=torch.float32))


def test_ssim_of_constant_images_is_the_luminance_term():
    x, y = torch.full((1, 1, 12, 12), 0.4), torch.full((1, 1, 12, 12), 0.6)
    expected = (2 * 0.4 * 0.6 + 1e-4) / (0.16 + 0.36 + 1e-4)
    assert_close(ssim(x, y), torch.tensor([expected]))
    assert_close(ssim(x, x), torch.ones(1))


def test_ssim_survives_a_bright_offset():
    """In float32, E[x^2] - E[x]^2 of an image near 1e4 would be all rounding."""
    x, y = pair(1, 1, 16, 16)
    offset = 1e4
    ours = ssim((x + offset).double(), (y + offset).double())
    a, b = numpy((x + offset).double())[0, 0], numpy((y + offset).double())[0, 0]
    assert_close(
        ours, torch.tensor([ssim_by_hand(a, b, 1.0)], dtype=torch.float32), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("peak", [1.0, 255.0])
@pytest.mark.parametrize("size", [(12, 16), (9, 13)], ids=str)
def test_gmsd_is_its_formula(size, peak):
    x, y = (peak * p for p in pair(2, 1, *size))
    expected = [gmsd_by_hand(numpy(a[0]), numpy(b[0]), peak) for a, b in zip(x, y, strict=True)]
    assert_close(gmsd(x, y, data_range=peak), torch.tensor(expected, dtype=torch.float32))


def test_gmsd_of_color_is_that_of_full_swing_luma():
    x, y = pair(2, 3, 16, 16)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    gray = [(weights * p).sum(1, keepdim=True) for p in (x, y)]
    assert_close(gmsd(x, y), gmsd(*gray))


def test_gmsd_of_a_constant_offset_and_of_even_damage_is_zero():
    x = torch.rand(1, 1, 16, 16)
    interior = gmsd(x, x)
    assert_close(interior, torch.zeros(1), rtol=0, atol=0)
    flat = torch.full((1, 3, 2, 2), 0.3)
    assert_close(gmsd(flat, flat + 0.2), torch.zeros(1), rtol=0, atol=0)


def test_luma_is_bt601_in_studio_swing():
    colors = {
        (0, 0, 0): 16,
        (1, 1, 1): 235,
        (1, 0, 0): 81.481,
        (0, 1, 0): 144.553,
        (0, 0, 1): 40.966,
    }
    for color, expected in colors.items():
        image = torch.tensor(color, dtype=torch.float64).view(1, 3, 1, 1)
        luma = 255 * rgb_to_luma(image)
        assert_close(luma, torch.full((1, 1, 1, 1), expected, dtype=torch.float64))


def test_luma_keeps_wide_dtypes_and_widens_narrow_ones(dtype):
    assert rgb_to_luma(torch.rand(1, 3, 2, 2).to(dtype)).dtype == torch.promote_types(
        dtype, torch.float32
    )


@pytest.mark.parametrize("metric", [psnr, ssim, gmsd])
def test_images_are_judged_one_by_one(metric):
    x, y = pair(3, 3, 16, 20)
    together = metric(x, y)
    assert together.shape == (3,)
    assert_close(together, torch.cat([metric(a[None], b[None]) for a, b in zip(x, y, strict=True)]))


@pytest.mark.parametrize("metric", [psnr, ssim, gmsd])
def test_narrow_dtypes_and_autocast_do_not_change_the_arithmetic(metric):
    x, y = (p.bfloat16() for p in pair(2, 3, 16, 20))
    expected = metric(x.double(), y.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(metric(x, y), expected, rtol=0, atol=0)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("metric", [psnr, ssim, gmsd])
def test_rejects(metric):
    x = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"`data_range` must be greater than 0, got 0\.0\."):
        metric(x, x, data_range=0.0)
    with pytest.raises(ValueError, match=r"`target` must have shape \(2, 3, 16, 16\), got \(1, 3"):
        metric(x, x[:1])
    with pytest.raises(
        ValueError, match=r"`reconstruction` must have shape \(b, c, h, w\) with h "
    ):
        metric(x[0], x[0])
    with pytest.raises(
        TypeError, match=r"`reconstruction` must be a floating-point .* torch\.uint8"
    ):
        metric(x.byte(), x.byte())
    with pytest.raises(TypeError, match=r"`target` must be a floating-point .* torch\.int64"):
        metric(x, x.long())


def test_rejects_small_images_and_other_channels():
    form = r"`reconstruction` must have shape \(b, c, h, w\) with h and w at least"
    small = torch.rand(1, 3, 16, 10)
    with pytest.raises(ValueError, match=form + r" 11, got \(1, 3, 16, 10\)\."):
        ssim(small, small)
    with pytest.raises(ValueError, match=form + r" 2, got \(1, 3, 16, 1\)\."):
        gmsd(small[..., :1], small[..., :1])
    two = small[:, :2]
    message = (
        r"`reconstruction` must have 3 channels \(color\) or 1 \(gray\), got \(1, 2, 16, 10\)\."
    )
    with pytest.raises(ValueError, match=message):
        gmsd(two, two)
    with pytest.raises(ValueError, match=r"`image` must have shape \(b, 3, h, w\) .* \(1, 2, 16"):
        rgb_to_luma(two)
