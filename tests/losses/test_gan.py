"""GAN objectives against their formulas, element by element."""

import math

import pytest
import torch
from torch.testing import assert_close

from vqprior.losses import HingeGAN, LeastSquaresGAN, NonSaturatingGAN


def softplus(x):
    return math.log1p(math.exp(x))


# Per logit: what the generator, the real and the fake side of the discriminator pay.
FORMULAS = {
    HingeGAN: (lambda f: -f, lambda r: max(0, 1 - r), lambda f: max(0, 1 + f)),
    NonSaturatingGAN: (lambda f: softplus(-f), lambda r: softplus(-r), softplus),
    LeastSquaresGAN: (lambda f: (f - 1) ** 2 / 2, lambda r: (r - 1) ** 2, lambda f: f**2),
}
every_objective = pytest.mark.parametrize("objective", FORMULAS)


def mean(formula, logits):
    values = [formula(logit) for logit in logits.double().flatten().tolist()]
    return torch.tensor(sum(values) / len(values), dtype=torch.float32)


@every_objective
def test_generator_is_its_formula(objective, dtype):
    fake = 2 * torch.randn(3, 1, 4, 5).to(dtype)
    assert_close(objective().generator(fake), mean(FORMULAS[objective][0], fake))


@every_objective
def test_discriminator_is_its_formula(objective, dtype):
    real, fake = 2 * torch.randn(3, 1, 4, 5).to(dtype), 2 * torch.randn(7).to(dtype)
    _, on_real, on_fake = FORMULAS[objective]
    expected = (mean(on_real, real) + mean(on_fake, fake)) / 2
    assert_close(objective().discriminator(real, fake), expected)


@every_objective
def test_the_two_sides_pull_in_opposite_directions(objective):
    fake, real = torch.tensor([0.25, 0.25]).requires_grad_().unbind()
    (up,) = torch.autograd.grad(objective().generator(fake), fake)
    on_real, down = torch.autograd.grad(objective().discriminator(real, fake), (real, fake))
    assert up < 0 < down
    assert on_real < 0


@every_objective
def test_large_half_precision_logits_do_not_overflow(objective):
    logits = torch.full((8,), 6e4, dtype=torch.float16)
    value = objective().discriminator(-logits, logits)
    assert value.dtype == torch.float32
    assert value.isfinite()


def test_objectives_are_values():
    assert HingeGAN() == HingeGAN()
    assert repr(LeastSquaresGAN()) == "LeastSquaresGAN()"
