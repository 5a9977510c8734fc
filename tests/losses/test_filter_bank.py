"""FilterBank and FilterBankLoss: formulas, invariances, and what they reward."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior.losses import FilterBank, FilterBankLoss

C = 0.02
LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def kernels():
    """Derivatives of a Gaussian of deviation 0.8 by the textbook, on a 5 x 5 grid."""
    result = torch.zeros(6, 5, 5, dtype=torch.float64)
    gauss = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            y, x = (i - 2) / 0.8, (j - 2) / 0.8
            gauss[i, j] = g = math.exp(-(x * x + y * y) / 2)
            result[0, i, j], result[1, i, j] = x * g, y * g
            for k, angle in enumerate((0, 60, 120)):
                u = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
                result[2 + k, i, j] = (u * u - 1) * g
            result[5, i, j] = (x * x + y * y - 2) * g
    for k in range(6):
        result[k] -= result[k].sum() * gauss / gauss.sum()
        result[k] /= result[k].clamp(min=0).sum()
    return result


def texture(*shape, seed=0):
    """Smooth random texture between 0.2 and 0.8."""
    generator = torch.Generator().manual_seed(seed)
    noise = F.avg_pool2d(torch.rand(*shape, generator=generator), 3, stride=1, padding=1)
    low, high = noise.min(), noise.max()
    return 0.2 + 0.6 * (noise - low) / (high - low)


def blur(image, sigma):
    radius = math.ceil(3 * sigma)
    axis = torch.arange(-radius, radius + 1, dtype=image.dtype)
    window = torch.exp(-axis.square() / (2 * sigma**2))
    window = (window / window.sum()).repeat(3, 1, 1, 1)
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, window, groups=3), window.mT, groups=3)


def test_filters_are_derivatives_of_a_gaussian():
    filters = FilterBank().filters[:, 0].double()
    assert_close(filters, kernels(), rtol=0, atol=1e-7)
    assert_close(filters.sum(dim=(1, 2)), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(filters.clamp_min(0).sum(dim=(1, 2)), torch.ones(6, dtype=torch.float64))


def test_luma_map_is_its_formula():
    x = texture(1, 3, 9, 11).double()
    luma = torch.einsum("c,bchw->bhw", LUMA, x)[0]
    padded = F.pad(luma[None, None], (2, 2, 2, 2), mode="replicate")[0, 0]
    responses = torch.zeros(6, 9, 11, dtype=torch.float64)
    for k, kernel in enumerate(kernels()):
        for i in range(9):
            for j in range(11):
                responses[k, i, j] = (padded[i : i + 5, j : j + 5] * kernel).sum()
    squares = (responses**2).sum(0)
    expected = torch.zeros(7, 9, 11, dtype=torch.float64)
    for i in range(9):
        for j in range(11):
            energy = squares[max(0, i - 2) : i + 3, max(0, j - 2) : j + 3].mean()
            expected[:6, i, j] = responses[:, i, j] / (C**2 + energy).sqrt()
            expected[6, i, j] = math.log(1 + energy / C**2) / 2
    # The filters are float32.
    assert_close(FilterBank()(x)[0][0], expected, rtol=1e-5, atol=1e-5)


def test_chroma_maps_are_those_of_opponent_colors_at_half_resolution():
    x = texture(1, 3, 16, 20).double()
    red, green, blue = F.avg_pool2d(x, 2).unbind(1)
    pairs = ((red - green) / 2, blue / 2 - (red + green) / 4)
    maps = FilterBank()(x)
    for i, opponent in enumerate(pairs):
        gray = opponent.unsqueeze(1).expand(-1, 3, -1, -1)
        expected = FilterBank(num_scales=1)(gray)[0]  # the luma of gray is that gray
        assert_close(maps[1][:, 6 * i : 6 * i + 6], expected[:, :6], rtol=1e-5, atol=1e-5)
        assert_close(maps[1][:, 12 + i], expected[:, 6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_scales", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (9, 15), (32, 24)], ids=str)
def test_shapes(size, num_scales):
    maps = FilterBank(num_scales=num_scales)(torch.rand(2, 3, *size))
    expected = []
    for s in range(num_scales):
        expected.append((2, 7, size[0] // 2**s, size[1] // 2**s))
        expected.append((2, 14, size[0] // 2 ** (s + 1), size[1] // 2 ** (s + 1)))
    assert [tuple(m.shape) for m in maps] == expected


def test_scales_are_the_bank_on_halved_images():
    x = texture(1, 3, 32, 32).double()
    fine, coarse = FilterBank(num_scales=2)(x), FilterBank(num_scales=1)(F.avg_pool2d(x, 2))
    for ours, theirs in zip(fine[2:], coarse, strict=True):
        assert_close(ours, theirs)


def test_a_flat_image_gives_zeros():
    color = torch.rand(3, 3, 1, 1).expand(3, 3, 32, 32)
    for responses in FilterBank()(color):
        # Rounding is 1e-7, and the division by 0.02 magnifies it.
        assert responses.abs().max() < 1e-4


def test_responses_do_not_exceed_the_contrast():
    x = texture(2, 3, 32, 32).double()
    luma = torch.einsum("c,bchw->bhw", LUMA, x)
    responses = torch.stack([F.conv2d(luma[:, None], k[None, None])[:, 0] for k in kernels()])
    low, high = (
        f(luma.unfold(1, 5, 1).unfold(2, 5, 1).flatten(3), 3) for f in (torch.amin, torch.amax)
    )
    assert (responses.abs() <= high - low + 1e-9).all()


def test_keeps_float32_whatever_the_module_or_the_input():
    x = texture(1, 3, 16, 16)
    expected = FilterBank()(x.bfloat16().float())
    for bank in (FilterBank().bfloat16(), FilterBank().half(), FilterBank()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = bank(x.bfloat16())
        for ours, theirs in zip(maps, expected, strict=True):
            assert_close(ours, theirs, rtol=0, atol=0)
    assert FilterBank().double()(x.double())[0].dtype == torch.float64
    assert FilterBank().state_dict() == {}
    assert list(FilterBank().parameters()) == []


def test_loss_is_its_formula():
    a, b = texture(2, 3, 16, 24), texture(2, 3, 16, 24, seed=1)
    means = []
    for x, y in zip(FilterBank(num_scales=2)(a), FilterBank(num_scales=2)(b), strict=True):
        d = (x - y).abs()
        means.append(torch.where(d < 0.1, 5 * d**2, d - 0.05).mean())
    assert_close(FilterBankLoss(num_scales=2)(a, b), torch.stack(means).mean())
    assert_close(FilterBankLoss()(a, a), torch.tensor(0.0), rtol=0, atol=0)


def test_the_more_blurred_the_worse():
    x, loss = texture(2, 3, 48, 48), FilterBankLoss()
    values = [loss(blur(x, sigma), x).item() for sigma in (0.4, 0.6, 1.0, 2.0, 4.0)]
    assert values == sorted(values)
    assert values[0] > 0


def test_the_further_misplaced_the_worse():
    x, loss = texture(2, 3, 64, 64), FilterBankLoss()
    values = [loss(x.roll(shift, dims=3), x).item() for shift in (0, 1, 2)]
    assert values == sorted(values)
    assert values[1] > loss(blur(x, 0.4), x)


def test_a_blur_is_worse_than_noise_of_the_same_squared_error():
    x, loss = texture(2, 3, 64, 64), FilterBankLoss()
    blurred = blur(x, 1.5)
    noise = torch.randn_like(x)
    noise *= (x - blurred).square().mean().sqrt() / noise.square().mean().sqrt()
    assert loss(blurred, x) > 1.5 * loss(x + noise, x)


def test_halved_contrast_costs_the_logarithm_of_two():
    x = torch.rand(2, 3, 64, 64)
    halved = 0.5 + 0.5 * (x - 0.5)
    strength, full = (FilterBank()(image)[0][:, 6] for image in (halved, x))
    # E is some two hundred times c^2, so log(1 + E / c^2) is log(E / c^2) up to a percent or so.
    assert_close((full - strength).mean(), torch.tensor(math.log(2)), rtol=0.02, atol=0)


def test_invisible_noise_is_next_to_free_and_brightness_is():
    flat, loss = torch.full((1, 3, 64, 64), 0.5), FilterBankLoss()
    invisible = flat + 0.001 * torch.randn_like(flat)
    x = texture(1, 3, 64, 64)
    assert loss(invisible, flat) < 0.002
    assert loss(invisible, flat) < 0.01 * loss(flat, x)
    assert_close(loss(x + 0.1, x), torch.tensor(0.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", ["flat", "black", "texture", "noise"])
@pytest.mark.parametrize("end", ["flat", "texture"])
def test_gradients_are_bounded_everywhere(start, end):
    images = {
        "flat": torch.full((1, 3, 32, 32), 0.5),
        "black": torch.zeros(1, 3, 32, 32),
        "texture": texture(1, 3, 32, 32),
        "noise": torch.rand(1, 3, 32, 32),
    }
    x = (images[start] + 1e-4 * torch.randn(1, 3, 32, 32)).requires_grad_()
    FilterBankLoss()(x, images[end]).backward()
    assert x.grad.isfinite().all()
    # A pixel of 1 / (3 * 32 * 32) of the image moves each map by at most about 1 / 0.02 times
    # its share of the mean.
    assert x.grad.abs().max() * x.numel() < 3 / C


@pytest.mark.full
def test_descent_from_a_blur_restores_texture():
    target, loss = texture(1, 3, 32, 32), FilterBankLoss()
    start = blur(target, 1.5)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss(x, target).backward()
        optimizer.step()
    assert loss(x, target) < 0.2 * loss(start, target)
    # There is no pixel loss to keep the mean, so pixels are compared without it.
    difference = x.detach() - target
    difference -= difference.mean(dim=(2, 3), keepdim=True)
    assert difference.square().mean() < 0.5 * (start - target).square().mean()


def test_gradient_goes_to_the_reconstruction_only():
    a, b = texture(1, 3, 16, 16).requires_grad_(), texture(1, 3, 16, 16, seed=1).requires_grad_()
    FilterBankLoss()(a, b).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad is None


@pytest.mark.full
def test_compiles_without_graph_break():
    a, b = texture(2, 3, 16, 16), texture(2, 3, 16, 16, seed=1)
    loss = FilterBankLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(compiled(a, b), loss(a, b))


def test_rejects():
    for num_scales in (0, 4):
        message = rf"`num_scales` must be in \[1, 4\), got {num_scales}\."
        with pytest.raises(ValueError, match=message):
            FilterBank(num_scales=num_scales)
        with pytest.raises(ValueError, match=message):
            FilterBankLoss(num_scales=num_scales)
    form = r"`x` must have shape \(b, 3, h, w\) with h and w at least 8, got "
    with pytest.raises(ValueError, match=form + r"\(1, 3, 7, 8\)\."):
        FilterBank()(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match=form + r"\(1, 1, 16, 16\)\."):
        FilterBankLoss()(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    with pytest.raises(TypeError, match=r"`x` must be a floating-point tensor, got torch\.uint8"):
        FilterBank()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"`target` must have shape \(1, 3, 8, 8\), got \(1, 3, 9"):
        FilterBankLoss()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 8))


def test_repr_shows_the_scales():
    assert repr(FilterBank(num_scales=2)) == "FilterBank(num_scales=2)"
