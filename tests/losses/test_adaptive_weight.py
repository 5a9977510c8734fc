"""adaptive_weight against gradients written by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from vqprior.losses import _adaptive_weight, adaptive_weight


def weight(shape=(2,)):
    return torch.full(shape, 1.0, requires_grad=True)


def test_is_the_ratio_of_gradient_lengths():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.3, -0.4])
    # Gradients 2 w + a = (7, 10) and b; eps is that of the authors' code.
    expected = math.sqrt(149) / (0.5 + 1e-4)
    value = adaptive_weight((w * w + a * w).sum(), (b * w).sum(), w)
    assert_close(value, torch.tensor(expected))
    assert not value.requires_grad


def test_weighted_gradients_are_equally_long():
    layer = torch.nn.Conv2d(4, 3, 3)
    out = layer(torch.randn(2, 4, 8, 8))
    reconstruction, adversarial = out.square().mean(), -(out.sigmoid() ** 3).mean()
    factor = adaptive_weight(reconstruction, adversarial, layer.weight, eps=1e-12)
    first, second = (
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, factor * adversarial)
    )
    assert_close(first, second)
    assert layer.weight.grad is None


def test_the_graphs_are_kept():
    w = weight()
    reconstruction, adversarial = w.square().sum(), w.sum()
    value = adaptive_weight(reconstruction, adversarial, w)
    (reconstruction + value * adversarial).backward()
    assert_close(w.grad, 2 + value * torch.ones(2))


def test_is_clamped():
    w = weight()
    assert_close(adaptive_weight(1e9 * w.sum(), w.sum(), w), torch.tensor(1e4))
    assert_close(adaptive_weight(w.sum(), w.sum(), w, max_weight=0.5), torch.tensor(0.5))
    assert_close(adaptive_weight(w.sum(), 0 * w.sum(), w), torch.tensor(1e4))
    assert_close(adaptive_weight(0 * w.sum(), w.sum(), w), torch.tensor(0.0))


@pytest.mark.parametrize("factor", [0.0, 1.0, math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("other", [0.0, 1.0, math.inf, math.nan, 1e30, 1e-30])
def test_is_always_finite_and_in_range(factor, other):
    w = weight()
    value = adaptive_weight(factor * w.sum(), other * w.sum(), w)
    assert 0 <= value <= 1e4
    if math.isnan(factor) or math.isnan(other):
        assert value == 0


def test_half_precision_gives_a_float32_scalar():
    w = torch.ones(3, dtype=torch.float16, requires_grad=True)
    value = adaptive_weight(300 * w.sum(), 100 * w.sum(), w)  # 300^2 overflows in float16
    assert_close(value, torch.tensor(3.0), rtol=1e-5, atol=0)  # eps is 6e-7 of the length
    assert value.dtype == torch.float32


def test_without_a_graph_the_weight_is_zero():
    w = weight()
    with torch.no_grad():
        value = adaptive_weight(w.square().sum(), w.sum(), w)
    assert_close(value, torch.tensor(0.0))


def test_ranks_average_squared_lengths(monkeypatch):
    """Two ranks: ours, and one with squared lengths 144 and 36."""
    monkeypatch.setattr(_adaptive_weight, "world_size", lambda: 2)
    other = torch.tensor([144.0, 36.0])
    monkeypatch.setattr(_adaptive_weight, "all_reduce_sum_", lambda squares: squares + other)
    w = weight((4,))
    value = adaptive_weight(4 * w.sum(), 3 * w.sum(), w, eps=1.0)  # squared lengths 64 and 36
    expected = math.sqrt((144 + 64) / 2) / (math.sqrt((36 + 36) / 2) + 1)
    assert_close(value, torch.tensor(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            lambda w: (w, w.sum(), w),
            r"`reconstruction_loss` must have shape \(\), got \(2,\)\.",
        ),
        (lambda w: (w.sum(), w, w), r"`adversarial_loss` must have shape \(\), got \(2,\)\."),
        (
            lambda w: (w.sum(), w.sum(), torch.ones(2)),
            r"`parameter` must require gradients, got one that does not\. Pass a trainable weight",
        ),
        (
            lambda w: (w.sum(), w.sum(), weight((5,))),
            r"`parameter` must be used by `reconstruction_loss`, got one of shape \(5,\) that "
            r"is not\. Pass a trainable weight",
        ),
        (
            lambda w: (w.sum(), weight().sum(), w),
            r"`parameter` must be used by `adversarial_loss`, got one of shape \(2,\)",
        ),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        adaptive_weight(*arguments(weight()))


@pytest.mark.parametrize("name", ["max_weight", "eps"])
def test_rejects_limits(name):
    w = weight()
    with pytest.raises(ValueError, match=rf"`{name}` must be greater than 0, got 0\.0\."):
        adaptive_weight(w.sum(), w.sum(), w, **{name: 0.0})
