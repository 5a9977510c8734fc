"""What residual stages cost, in operators and numbers; seconds are for benchmarks to measure."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqprior import CodebookEMA, CodebookRevival, ResidualQuantizer, VectorQuantizer

DIM = 4


def vq():
    return VectorQuantizer(DIM, 16)


class Operators(TorchDispatchMode):
    """Counts operators, and the entries of all their results."""

    count = entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(result, torch.Tensor):
            self.entries += result.numel()
        return result


def cost(quantizer, call):
    x = torch.randn(64, DIM, requires_grad=True)
    with Operators() as operators:
        call(quantizer, x)
    return operators.count, operators.entries


def train_step(quantizer, x):
    out = quantizer(x)
    (out.loss + out.quantized.square().sum()).backward()
    return out


def step_with_rules(quantizer, x):
    out = train_step(quantizer, x)
    CodebookEMA(quantizer).step(out)
    CodebookRevival(quantizer).step(out)


CALLS = {
    "encode": lambda quantizer, x: quantizer.encode(x),
    "train": train_step,
    "rules": step_with_rules,
    "logits": lambda quantizer, x: quantizer.logits(x),
}
STACKS = {
    "own": lambda count: ResidualQuantizer([vq() for _ in range(count)]),
    "shared": lambda count: ResidualQuantizer([vq()] * count),
    "beam": lambda count: ResidualQuantizer([vq() for _ in range(count)], beam_size=4),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_each_further_stage_costs_as_much_as_the_one_before(call, stack):
    costs = [cost(stack(count), call) for count in (4, 8, 12, 16)]
    for measure, results in zip(("operators", "entries"), zip(*costs, strict=True), strict=True):
        growth = torch.tensor(results).diff()
        assert (growth > 0).all()
        # A search of a beam, and a concatenation of all stages, may add a little here and there.
        assert growth.max() <= 1.15 * growth.min(), (measure, results)


def test_a_stage_costs_what_its_quantizer_costs():
    stages = [vq() for _ in range(32)]

    def loop(_, x):
        rest = x.detach()
        for stage in stages:
            rest = rest - stage.decode(stage.encode(rest))

    by_hand = cost(None, loop)
    ours = cost(ResidualQuantizer(stages), CALLS["encode"])
    assert ours[1] <= 1.3 * by_hand[1]
