"""Degradations: what is drawn, what each step does to an image, and what depends on what."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.examples.degrading import photo, psnr, scene
from tvqrap.degradations.blur_kernels import (
    KINDS,
    SIZES,
    BellKernel,
    Blur,
    KernelChoice,
    SincKernel,
)
from tvqrap.degradations.jpeg import Jpeg
from tvqrap.degradations.pipeline import (
    DEGRADATIONS,
    FIRST,
    Bicubic,
    Final,
    GaussianNoise,
    NoiseChoice,
    Order,
    PoissonNoise,
    Resize,
    ResizeChoice,
    Scene,
    SecondOrder,
)

SEEDS = 4000


@pytest.fixture(scope="module")
def crops():
    return torch.cat([photo(height=64, width=64, left=64 * i) for i in range(8)])


@pytest.fixture(params=DEGRADATIONS)
def degradation(request):
    return DEGRADATIONS[request.param]()


# --- both degradations ---------------------------------------------------------------------------


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


# --- what is drawn -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans():
    return [SecondOrder().draw(seed) for seed in range(SEEDS)]


def pick(plans, kind, part):
    """Every step of a kind in one part of the plans."""
    return [step for plan in plans for step in getattr(plan, part) if isinstance(step, kind)]


def assert_occurs(happened, prob):
    """How often something happened is within 4 standard errors of what is expected."""
    happened = list(happened)
    error = math.sqrt(prob * (1 - prob) / len(happened))
    assert abs(np.mean(happened) - prob) < 4 * error


def assert_uniform(values, low, high):
    """Within the range, and its tenths are equally frequent."""
    values = np.array(list(values))
    assert low <= values.min()
    assert values.max() <= high
    for tenth in np.histogram(values, 10, (low, high))[0]:
        assert abs(tenth / len(values) - 0.1) < 4 * math.sqrt(0.09 / len(values))


def test_steps_have_their_order_and_probability(plans):
    noise = GaussianNoise | PoissonNoise
    for plan in plans:
        blurred, resized, noisy, compressed = plan.first
        assert isinstance(blurred, Blur)
        assert isinstance(resized, Resize)
        assert isinstance(noisy, noise)
        assert isinstance(compressed, Jpeg)
        if plan.second:
            assert isinstance(plan.second[-2], Resize)
            assert isinstance(plan.second[-1], noise)
            assert len(plan.second) == 2 or isinstance(plan.second[0], Blur)
    assert_occurs((len(plan.second) > 0 for plan in plans), 0.5)
    assert_occurs((len(plan.second) == 3 for plan in plans if plan.second), 0.8)
    ends = Counter(tuple(type(step) for step in plan.final) for plan in plans)
    expected = {
        (Resize, Blur, Jpeg): 0.4,
        (Jpeg, Resize, Blur): 0.4,
        (Resize, Jpeg): 0.1,
        (Jpeg, Resize): 0.1,
    }
    assert ends.keys() == expected.keys()
    for end, prob in expected.items():
        assert_occurs((i < ends[end] for i in range(SEEDS)), prob)


@pytest.mark.parametrize(("part", "sigma"), [("first", 3.0), ("second", 1.5)])
def test_kernels_are_drawn_as_stated(plans, part, sigma):
    kernels = [step.kernel for step in pick(plans, Blur, part)]
    for size in range(7, 22, 2):
        assert_occurs((kernel.size == size for kernel in kernels), 1 / 8)
    assert_occurs((isinstance(kernel, SincKernel) for kernel in kernels), 0.1)
    bells = [kernel for kernel in kernels if isinstance(kernel, BellKernel)]
    for kind, prob in zip(KINDS, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), strict=True):
        assert_occurs((kernel.kind == kind for kernel in bells), prob)
    assert_uniform((kernel.sigma[0] for kernel in bells), 0.2, sigma)
    round_ones = [kernel for kernel in bells if not kernel.kind.endswith("aniso")]
    assert all(k.sigma[0] == k.sigma[1] and k.rotation == 0 for k in round_ones)
    others = [kernel for kernel in bells if kernel.kind.endswith("aniso")]
    assert_uniform((kernel.sigma[1] for kernel in others), 0.2, sigma)
    assert_uniform((kernel.rotation for kernel in others), -math.pi, math.pi)
    assert abs(np.corrcoef([kernel.sigma for kernel in others], rowvar=False)[0, 1]) < 0.2


def test_exponents_are_drawn_half_below_and_half_above_one(plans):
    kernels = [step.kernel for part in ("first", "second") for step in pick(plans, Blur, part)]
    betas = {
        name: [k.beta for k in kernels if isinstance(k, BellKernel) and k.kind.startswith(name)]
        for name in ("iso", "aniso", "generalized", "plateau")
    }
    assert set(betas["iso"] + betas["aniso"]) == {1.0}
    assert_occurs((beta < 1 for beta in betas["generalized"]), 0.5)
    assert_uniform((beta for beta in betas["generalized"] if beta < 1), 0.5, 1)
    assert_uniform((beta for beta in betas["generalized"] if beta >= 1), 1, 4)
    assert_occurs((beta == 1 for beta in betas["plateau"]), 0.5)
    assert_uniform((beta for beta in betas["plateau"] if beta != 1), 1, 2)


def test_cutoffs_are_lower_in_larger_kernels_but_not_in_the_last(plans):
    kernels = [step.kernel for part in ("first", "second") for step in pick(plans, Blur, part)]
    sincs = [kernel for kernel in kernels if isinstance(kernel, SincKernel)]
    assert_uniform((kernel.cutoff for kernel in sincs if kernel.size < 13), math.pi / 3, math.pi)
    assert_uniform((kernel.cutoff for kernel in sincs if kernel.size >= 13), math.pi / 5, math.pi)
    last = [step.kernel for step in pick(plans, Blur, "final")]
    assert all(isinstance(kernel, SincKernel) for kernel in last)
    assert_uniform((kernel.cutoff for kernel in last), math.pi / 3, math.pi)
    for size in SIZES:
        assert_occurs((kernel.size == size for kernel in last), 1 / 8)


@pytest.mark.parametrize(
    ("part", "probs", "low", "high", "base"),
    [("first", (0.2, 0.7, 0.1), 0.15, 1.5, 1), ("second", (0.3, 0.4, 0.3), 0.3, 1.2, 0.25)],
)
def test_resizes_are_drawn_as_stated(plans, part, probs, low, high, base):
    steps = pick(plans, Resize, part)
    scales = np.array([step.fraction for step in steps]) / base
    assert_occurs(scales > 1, probs[0])
    assert_occurs(scales < 1, probs[1])
    assert_occurs(scales == 1, probs[2])
    assert_uniform(scales[scales > 1], 1, high)
    assert_uniform(scales[scales < 1], low, 1)
    for mode in ("area", "bilinear", "bicubic"):
        assert_occurs((step.mode == mode for step in steps), 1 / 3)


def test_the_last_resize_is_to_a_quarter(plans):
    steps = pick(plans, Resize, "final")
    assert {step.fraction for step in steps} == {0.25}
    for mode in ("area", "bilinear", "bicubic"):
        assert_occurs((step.mode == mode for step in steps), 1 / 3)


@pytest.mark.parametrize(("part", "sigma", "scale"), [("first", 30, 3.0), ("second", 25, 2.5)])
def test_noise_is_drawn_as_stated(plans, part, sigma, scale):
    gaussian, poisson = (pick(plans, kind, part) for kind in (GaussianNoise, PoissonNoise))
    assert_occurs((i < len(gaussian) for i in range(len(gaussian) + len(poisson))), 0.5)
    assert_uniform((noise.sigma for noise in gaussian), 1, sigma)
    assert_uniform((noise.scale for noise in poisson), 0.05, scale)
    for noises in (gaussian, poisson):
        assert_occurs((noise.gray for noise in noises), 0.4)


def test_quality_is_drawn_as_stated(plans):
    for part in ("first", "final"):
        qualities = [step.quality for step in pick(plans, Jpeg, part)]
        assert len(qualities) == SEEDS
        assert_uniform(qualities, 30, 95)


def test_noise_of_no_two_seeds_is_the_same(plans):
    assert len({plan.noise_seed for plan in plans}) == SEEDS


def test_other_choices_can_be_made():
    never = Order(FIRST.kernels, FIRST.resize, FIRST.noise, prob=0.0)
    calm = Final(jpeg=(80.0, 90.0), sinc_prob=0.0, jpeg_last_prob=1.0)
    for seed in range(50):
        plan = SecondOrder(first=never, second=never, final=calm).draw(seed)
        assert plan.first == plan.second == ()
        assert [type(step) for step in plan.final] == [Resize, Jpeg]
        assert 80 <= plan.final[1].quality <= 90
    hr = photo()
    sharp, plain = (SecondOrder(never, never, calm, sharpening=w)(hr, [0]) for w in (0.5, 0.0))
    assert sharp.std() > 1.02 * plain.std()


# --- resize and noise ----------------------------------------------------------------------------


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


# --- the whole -----------------------------------------------------------------------------------


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
