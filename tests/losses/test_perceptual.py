"""PerceptualLoss against LPIPS written out, and what freezing means."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior.losses import PerceptualLoss


class Pyramid(nn.Module):
    """Two maps, in whatever container; dropout shows whether it is in training mode."""

    def __init__(self, container):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 4, 3, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.container = container

    def forward(self, x):
        first = self.first(x)
        second = self.dropout(self.second(first.relu()))
        return self.container(first, second)


CONTAINERS = {
    "tensor": (lambda a, b: a, None),
    "list": (lambda a, b: [a, b], [0, 1]),
    "tuple": (lambda a, b: (a, b), [0, 1]),
    "dict": (lambda a, b: {"first": a, "second": b}, ["first", "second"]),
}


def images(dtype=torch.float32):
    return torch.rand(2, 3, 12, 14, dtype=dtype).requires_grad_(), torch.rand(
        2, 3, 12, 14, dtype=dtype
    )


def lpips(a, b):
    """Position by position: unit vectors, squared difference, mean over positions."""
    values = []
    for x, y in zip(a.flatten(2).unbind(), b.flatten(2).unbind(), strict=True):
        for u, v in zip(x.unbind(1), y.unbind(1), strict=True):
            values.append(((u / u.norm() - v / v.norm()) ** 2).sum())
    return torch.stack(values).mean()


@pytest.mark.parametrize("name", CONTAINERS)
def test_is_lpips_without_weights_summed_over_layers(name):
    network = Pyramid(CONTAINERS[name][0]).double()
    loss, (a, b) = PerceptualLoss(network), images(torch.float64)
    first_a, first_b = network.first(a), network.first(b)
    expected = lpips(first_a, first_b)
    if name != "tensor":
        expected = expected + lpips(network.second(first_a.relu()), network.second(first_b.relu()))
    # The constant in the length is 1e-8, and no feature vector is shorter than a tenth.
    assert_close(loss(a, b), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["list", "tuple", "dict"])
def test_layers_select(name):
    container, layers = CONTAINERS[name]
    network, (a, b) = Pyramid(container), images()
    parts = [PerceptualLoss(network, layers=[layer])(a, b) for layer in layers]
    both = PerceptualLoss(network, layers=layers[::-1])(a, b)
    assert_close(both, parts[0] + parts[1])
    assert abs(parts[0] - parts[1]) > 1e-3


def test_the_network_is_frozen_and_stays_in_evaluation_mode():
    loss, (a, b) = PerceptualLoss(Pyramid(CONTAINERS["list"][0])), images()
    b.requires_grad_()
    for training in (True, False, True):
        assert loss.train(training) is loss
        assert loss.training is training
        assert not any(module.training for module in loss.features.modules())
    nn.Sequential(loss).train()
    assert_close(loss(a, b), loss(a, b), rtol=0, atol=0)  # no dropout
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    loss(a, b).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad is None
    assert all(parameter.grad is None for parameter in loss.parameters())


@pytest.mark.parametrize("dead", [0.0, 1e-6])
def test_dead_features_give_finite_bounded_gradients(dead):
    a = torch.full((1, 3, 4, 4), dead, requires_grad=True)
    loss = PerceptualLoss(nn.Identity())
    loss(a, torch.rand(1, 3, 4, 4)).backward()
    # d |u - v|^2 / dx is at most 4 |v| / sqrt(1e-8), averaged over the 16 positions.
    assert a.grad.abs().max() <= 4e4 / 16


def test_half_precision_is_compared_in_float32():
    a, b = (300 * image for image in images())
    value = PerceptualLoss(nn.Identity())(a.half(), b.half())  # squares overflow in float16
    assert value.dtype == torch.float32
    assert_close(value, lpips(a.half().float(), b.half().float()))


def test_bounds():
    x = torch.rand(2, 5, 3, 3)
    loss = PerceptualLoss(nn.Identity())
    assert_close(loss(x, -x), torch.tensor(4.0))
    assert_close(loss(x, 3 * x), torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.full
def test_compiles_without_graph_break():
    loss, (a, b) = PerceptualLoss(Pyramid(CONTAINERS["dict"][0])), images()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(compiled(a, b), loss(a, b))


def test_rejects():
    a, b = images()
    with pytest.raises(ValueError, match=r"`layers` must name at least one map, got none\. Pass"):
        PerceptualLoss(nn.Identity(), layers=[])
    named = PerceptualLoss(Pyramid(CONTAINERS["dict"][0]), layers=["third"])
    with pytest.raises(ValueError, match=r"`layers` must be among \['first', 'second'\], got 'th"):
        named(a, b)
    with pytest.raises(ValueError, match=r"`layers` must be among \[0, 1\], got 2\."):
        PerceptualLoss(Pyramid(CONTAINERS["list"][0]), layers=[2])(a, b)
    with pytest.raises(ValueError, match=r"`target` must have shape \(2, 3, 12, 14\), got \(1, 3"):
        named(a, b[:1])


def test_repr_shows_the_layers():
    assert "layers=(0, 2)" in repr(PerceptualLoss(nn.Identity(), layers=[0, 2]))
