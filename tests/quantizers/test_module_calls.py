"""How often the modules inside a quantizer run in one call."""

import pytest
import torch
from torch import nn

from tests.contracts.factories import DIM, projected, simvq, textured, vq
from vqprior import ChannelsFirst, GroupedQuantizer, ResidualQuantizer, SelfUpdating

ONCE = {
    "projected": lambda: projected(vq(d=2)),
    "simvq": simvq,
    "channels-first": lambda: ChannelsFirst(projected(vq(d=2))),
    "self-updating": lambda: SelfUpdating(projected(vq(d=2))),
    "texture": lambda: textured(projected(vq(d=2))),
    "grouped": lambda: GroupedQuantizer([projected(vq(d=2)), projected(vq(d=2))]),
    "grouped-simvq": lambda: GroupedQuantizer([simvq(), simvq()]),
    "projected-residual-simvq": lambda: projected(ResidualQuantizer([simvq(), simvq()])),
}
RESIDUAL = {
    "residual": lambda: ResidualQuantizer([projected(vq(d=2)), projected(vq(d=2))]),
    "residual-of-grouped": lambda: ResidualQuantizer([GroupedQuantizer([projected(vq(d=2))])]),
    "residual-self-updating": lambda: ResidualQuantizer([SelfUpdating(projected(vq(d=2)))]),
}


def calls(quantizer, x):
    """Counts the runs of every linear layer in one call."""
    linear = [module for module in quantizer.modules() if isinstance(module, nn.Linear)]
    count = dict.fromkeys(map(id, linear), 0)

    def see(module, *_):
        count[id(module)] += 1

    for module in linear:
        module.register_forward_hook(see)
    quantizer(x)
    return set(count.values())


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("make", ONCE.values(), ids=ONCE)
def test_modules_run_once(make, needs_gradient):
    quantizer = make()
    assert calls(quantizer, torch.randn(9, quantizer.dim, requires_grad=needs_gradient)) == {1}


@pytest.mark.parametrize("make", RESIDUAL.values(), ids=RESIDUAL)
def test_modules_of_residual_stages_run_twice_only_for_the_gradient_of_the_input(make):
    assert calls(make(), torch.randn(9, DIM, requires_grad=True)) == {2}
    assert calls(make(), torch.randn(9, DIM)) == {1}
    with torch.no_grad():
        assert calls(make(), torch.randn(9, DIM, requires_grad=True)) == {1}
