"""Second-order degradation: which steps are drawn, how often, and with which settings."""

import math
from collections import Counter

import numpy as np
import pytest

from tests.examples.degrading import assert_occurs, photo
from tvqrap.degradations.blur_kernels import (
    KINDS,
    SIZES,
    BellKernel,
    Blur,
    SincKernel,
)
from tvqrap.degradations.jpeg import Jpeg
from tvqrap.degradations.pipeline import (
    FIRST,
    Final,
    GaussianNoise,
    Order,
    PoissonNoise,
    Resize,
    SecondOrder,
)

SEEDS = 4000


@pytest.fixture(scope="module")
def plans():
    return [SecondOrder().draw(seed) for seed in range(SEEDS)]


def pick(plans, kind, part):
    """Every step of a kind in one part of the plans."""
    return [step for plan in plans for step in getattr(plan, part) if isinstance(step, kind)]


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
