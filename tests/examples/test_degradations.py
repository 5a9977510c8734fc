"""Degradations: what holds for all of them, and what they do to a photo."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.examples.degrading import photo, psnr
from tvqrap.degradations.blur_kernels import (
    KernelChoice,
)
from tvqrap.degradations.pipeline import (
    DEGRADATIONS,
    Bicubic,
    Final,
    NoiseChoice,
    Order,
    ResizeChoice,
    SecondOrder,
)


@pytest.fixture(scope="module")
def crops():
    return torch.cat([photo(height=64, width=64, left=64 * i) for i in range(8)])


@pytest.fixture(params=DEGRADATIONS)
def degradation(request):
    return DEGRADATIONS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_are_a_quarter_of_the_size_and_have_8_bit_levels(degradation, dtype, crops):
    lr = degradation(crops[:, :, :, :48].to(dtype).requires_grad_(), range(8))
    assert lr.shape == (8, 3, 16, 12)
    assert lr.dtype == torch.float32
    assert not lr.requires_grad
    assert 0 <= lr.min() < 0.2
    assert 0.8 < lr.max() <= 1
    torch.testing.assert_close(lr * 255, (lr * 255).round(), rtol=0, atol=1e-4)


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(degradation, crops):
    seeds = [3, 1, 4, 1, 5, 9, 2, 6]
    together = degradation(crops, seeds)
    assert torch.equal(together, degradation(crops, seeds))
    for i, seed in enumerate(seeds):
        assert torch.equal(together[i : i + 1], degradation(crops[i : i + 1], [seed]))
    assert torch.equal(together.flip(0), degradation(crops.flip(0), seeds[::-1]))


def test_other_seeds_give_other_images(crops):
    same = crops[:1].expand(8, -1, -1, -1)
    lr = SecondOrder()(same, range(8))
    assert len({image.numpy().tobytes() for image in lr}) == 8
    assert torch.equal(Bicubic()(same, range(8)), Bicubic()(same, range(8, 16)))


def test_global_random_states_are_neither_read_nor_changed(degradation, crops):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (the state that must not matter)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
        results.append(degradation(crops, range(8)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert random.getstate() == before[2]
    assert torch.equal(*results)


def test_autocast_changes_nothing(degradation, crops):
    expected = degradation(crops, range(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert (crops.flatten(1) @ crops.flatten(1).T).dtype == torch.bfloat16  # it is on
        assert torch.equal(degradation(crops, range(8)), expected)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(degradation, crops):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    lr = degradation(crops.cuda(), range(8))
    assert lr.is_cuda
    # A coefficient that rounds to the other side changes a block of pixels by a few levels.
    assert psnr(lr.cpu() + 1e-9, degradation(crops, range(8))) > 40


@pytest.mark.parametrize(
    ("shape", "dtype", "seeds", "message"),
    [
        ((3, 8, 8), torch.float32, 3, r"floats \(b, 3, H, W\), got torch.float32 \(3, 8, 8\)\.$"),
        ((2, 1, 8, 8), torch.float32, 2, r"floats \(b, 3, H, W\)"),
        ((2, 3, 8, 8), torch.uint8, 2, r"floats \(b, 3, H, W\), got torch.uint8"),
        ((0, 3, 8, 8), torch.float32, 0, r"floats \(b, 3, H, W\)"),
        ((2, 3, 8, 10), torch.float32, 2, r"multiples of 4, got \(2, 3, 8, 10\)\.$"),
        ((2, 3, 6, 8), torch.float32, 2, r"multiples of 4"),
        ((2, 3, 8, 8), torch.float32, 1, r"one seed per sample, got 1 for 2 samples\.$"),
        ((2, 3, 8, 8), torch.float32, 3, r"one seed per sample, got 3 for 2 samples\.$"),
    ],
)
def test_wrong_inputs_are_named(degradation, shape, dtype, seeds, message):
    with pytest.raises(ValueError, match=message) as raised:
        degradation(torch.zeros(shape, dtype=dtype), range(seeds))
    assert "\n" not in str(raised.value)


def test_bicubic_is_that_of_pillow():
    hr = photo()
    # In floats: Pillow rounds 8-bit images between the two directions.
    channels = (Image.fromarray(channel.numpy()) for channel in hr[0])
    small = (channel.resize((64, 64), Image.Resampling.BICUBIC) for channel in channels)
    expected = torch.from_numpy(np.stack([np.array(channel) for channel in small]))
    difference = Bicubic()(hr, [0])[0] - expected.clamp(0, 1)
    assert difference.abs().max() < 0.501 / 255


@pytest.mark.parametrize(
    ("size", "tolerance"), [((32, 32), 0.03), ((4, 64), 0.05), ((8, 12), 0.15), ((4, 4), 0.3)]
)
def test_tiny_crops_work(size, tolerance):
    hr = photo(height=size[0], width=size[1])
    lr = SecondOrder()(hr.expand(60, -1, -1, -1), range(60))
    assert lr.shape == (60, 3, size[0] // 4, size[1] // 4)
    assert lr.isfinite().all()
    assert (lr.mean((0, 2, 3)) - hr.mean((0, 2, 3))).abs().max() < tolerance


@pytest.mark.parametrize("fraction", [0.3, 0.61, 1.0, 1.37])
def test_mild_settings_neither_move_the_image_nor_change_its_colors(fraction):
    order = Order(
        KernelChoice(sigma=(0.3, 1.0)),
        ResizeChoice((0.0, 0.0, 1.0), scale=(1.0, 1.0), base=fraction),
        NoiseChoice(sigma=(1.0, 2.0), poisson_scale=(0.05, 0.1)),
        jpeg=(90.0, 95.0),
    )
    mild = SecondOrder(order, order, Final(jpeg=(90.0, 95.0)), sharpening=0.0)
    hr = photo("chelsea.png", top=20, left=100)
    lr = mild(hr.expand(12, -1, -1, -1), range(12))
    assert (lr.mean((2, 3)) - hr.mean((2, 3))).abs().max() < 1 / 255
    upscaled = F.interpolate(lr, scale_factor=4, mode="bicubic").mean(0, keepdim=True)
    inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    for axis in (2, 3):
        errors = [(upscaled - hr.roll(s, axis))[inside].square().mean() for s in (-1, 0, 1)]
        before, here, after = (error.item() for error in errors)
        # The parabola through the three errors is least where the image is: within 1/10 pixel.
        assert here < min(before, after)
        assert abs((before - after) / (2 * (before + after - 2 * here))) < 0.1


def test_degraded_images_still_show_what_they_showed():
    hr = photo()
    clean = Bicubic()(hr, [0])
    lr = SecondOrder()(hr.expand(60, -1, -1, -1), range(60))
    ratios = np.array([psnr(image[None], clean) for image in lr])
    assert 18 < np.median(ratios) < 30  # spoilt, but not beyond recognition
    assert ratios.max() - ratios.min() > 8  # to very different degrees
    assert (lr.mean((0, 2, 3)) - clean.mean((0, 2, 3))).abs().max() < 4 / 255
