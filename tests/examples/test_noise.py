"""Degradations: resizing and noise."""

import math

import pytest
import torch

from tests.examples.degrading import assert_occurs, photo, scene
from tvqrap.degradations.pipeline import (
    GaussianNoise,
    PoissonNoise,
    Resize,
    Scene,
)


def test_resize_is_relative_to_the_crop_and_never_to_nothing():
    image = torch.rand(1, 3, 50, 70)
    of = Scene((200, 280), torch.Generator())
    for mode in ("area", "bilinear", "bicubic"):
        assert Resize(0.3, mode)(image, of).shape[-2:] == (60, 84)
        assert Resize(0.1499, mode)(image, of).shape[-2:] == (29, 41)
        assert Resize(0.001, mode)(image, of).shape[-2:] == (1, 1)
        torch.testing.assert_close(Resize(0.25, mode)(image, of), image)
    assert not torch.equal(*(Resize(0.2, m)(image, of) for m in ("area", "bilinear")))


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_strength(gray):
    image = torch.full((1, 3, 200, 200), 0.5)
    noise = (GaussianNoise(20.0, gray)(image, scene(image)) - image)[0] * 255
    assert noise.std().item() == pytest.approx(20, rel=0.03)
    assert noise.mean().item() == pytest.approx(0, abs=0.3)
    likeness = torch.corrcoef(noise.flatten(1))[0, 1].item()
    assert likeness == pytest.approx(1 if gray else 0, abs=0.03)
    bright = GaussianNoise(20.0, gray)(torch.ones_like(image), scene(image))
    assert bright.max() == 1


@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise_has_the_variance_of_counting(gray):
    levels = torch.arange(20, 220).repeat_interleave(2)  # 200 different ones: 256 events are white
    image = (levels / 255).expand(1, 3, 400, 400)
    noise = (PoissonNoise(0.7, gray)(image, scene(image)) - image)[0]
    assert noise.mean().item() == pytest.approx(0, abs=1e-3)
    variance = noise.mT.reshape(3, 8, -1).var(-1).mean(0)
    mean = image[0, 0, 0].reshape(8, -1).mean(-1)
    torch.testing.assert_close(variance, 0.7**2 * mean / 256, rtol=0.04, atol=0)
    assert torch.allclose(noise[0], noise[1], atol=1e-6) == gray


@pytest.mark.parametrize(("distinct", "events"), [(1, 1), (2, 2), (3, 4), (100, 128), (129, 256)])
def test_poisson_noise_counts_as_many_events_as_there_are_levels(distinct, events):
    image = torch.full((1, 3, 128, 128), 200 / 255)
    image.view(-1)[:distinct] = torch.arange(200, 200 - distinct, -1) / 255
    noisy = PoissonNoise(0.02, gray=False)(image, scene(image))
    counts = ((noisy - image) / 0.02 + image)[..., 64:, :] * events
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=0.03)
    mean = 200 / 255 * events
    for count in {math.floor(mean), math.ceil(mean), max(math.floor(mean) - 2, 0)}:
        prob = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
        assert_occurs((counts.round() == count).flatten().tolist(), prob)


def test_poisson_noise_of_black_is_none_and_of_white_is_clipped():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 1
    noisy = PoissonNoise(3.0, gray=False)(image, scene(image))
    assert not noisy[..., :32].any()
    assert noisy.max() == 1
    assert noisy[..., 32:].min() == 0


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-24])
def test_poisson_noise_takes_the_least_and_the_greatest_random_number(drawn, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.full(shape, drawn))
    levels = torch.arange(256.0).expand(1, 3, 4, 256)
    noisy = PoissonNoise(0.001, gray=False)(levels / 255, scene(levels))
    mean = levels[..., 1:-1] / 255 * 256
    off = (noisy - levels / 255)[..., 1:-1] / 0.001 * 256 / mean.sqrt()  # in standard deviations
    assert not noisy[..., 0].any()
    assert (off <= 0 if drawn == 0 else off >= 0).all()
    assert off.abs().max() < 9


def test_one_changed_pixel_leaves_the_noise_of_the_others():
    image = photo()
    changed = image.clone()
    changed[0, 0, 0, 0] = image[0, 0, 0, 1]  # a level there already is
    one, other = (PoissonNoise(1.0, gray=False)(p, scene(p)) for p in (image, changed))
    assert torch.equal(one.flatten()[1:], other.flatten()[1:])
    assert one[0, 0, 0, 0] != other[0, 0, 0, 0]
