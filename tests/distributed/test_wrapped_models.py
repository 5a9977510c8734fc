"""Models inside DistributedDataParallel train as they do in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from tests.contracts.factories import state
from tests.distributed.models import (
    CLOSE,
    MODELS,
    Model,
    both_rules,
    data,
    train,
    trained_by_one_process,
)
from tests.distributed.ranks import collected, run, same_on_all_ranks, seeded
from vqprior import CodebookEMA, VectorQuantizer
from vqprior.metrics import CodebookUsage

WORLD = 2
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class TrainsAsOne:
    """A check for one model, with or without broadcasts; a class, so that it can be pickled."""

    def __init__(self, kind, broadcast_buffers):
        self.kind, self.broadcast_buffers = kind, broadcast_buffers

    def __call__(self, rank, world):
        make, rules_of = MODELS[self.kind]
        one = trained_by_one_process(self.kind, world)
        model = seeded(lambda: Model(make()))
        rules = rules_of(model.quantizer)
        yield
        # Without `find_unused_parameters`: every parameter has a gradient.
        wrapped = nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=self.broadcast_buffers
        )
        train(wrapped, rules, data(world), lambda parts: parts[rank])
        for tensor in state(model).values():
            same_on_all_ranks(tensor)
        assert_close(state(model), one, **CLOSE)


CHECKS |= {
    f"{kind}_in_ddp{'' if broadcast else '_without_broadcasts'}": TrainsAsOne(kind, broadcast)
    for kind in MODELS
    for broadcast in (True, False)
}


@check
def gradients_accumulate_in_ddp(rank, world):
    """The first of two micro-batches runs under ``no_sync``, as DDP's documentation advises."""
    steps = data(world)
    one = seeded(lambda: Model(VectorQuantizer(3, 8)))
    rules = both_rules(one.quantizer)
    mine = seeded(lambda: Model(VectorQuantizer(3, 8)))
    my_rules = both_rules(mine.quantizer)

    def backward(model, rules, x):
        y, out = model(x)
        ((y - x).square().mean() + out.loss).div(2).backward()
        for rule in rules:
            rule.step(out)

    for parts in steps[:2]:
        backward(one, rules, torch.cat(parts))
    yield
    wrapped = nn.parallel.DistributedDataParallel(mine)
    with wrapped.no_sync():
        backward(wrapped, my_rules, steps[0][rank])
    backward(wrapped, my_rules, steps[1][rank])
    learned = [p for p in one.parameters() if p.requires_grad]
    for ours, theirs in zip(
        (p for p in mine.parameters() if p.requires_grad), learned, strict=True
    ):
        assert_close(ours.grad, theirs.grad, **CLOSE)
    assert_close(state(mine), state(one), **CLOSE)


def two_steps(wrapped, rank, world):
    for parts in data(world)[:2]:
        y, out = wrapped(parts[rank])
        (y.square().mean() + out.loss).backward()


@check
def what_no_loss_reaches_needs_to_be_looked_for(rank, world):
    """A codebook with weight 0, and one that a rule took over after wrapping, have no gradient."""
    unweighted = [Model(VectorQuantizer(3, 8, codebook_weight=0.0)) for _ in range(2)]
    taken_over = Model(VectorQuantizer(3, 8))
    yield
    ddp = nn.parallel.DistributedDataParallel
    two_steps(ddp(unweighted[0], find_unused_parameters=True), rank, world)
    wrapped = [ddp(unweighted[1]), ddp(taken_over)]
    CodebookEMA(taken_over.quantizer)
    for model in wrapped:
        with pytest.raises(RuntimeError, match="not used in producing loss"):
            two_steps(model, rank, world)
    dist.barrier()


@check
def a_meter_belongs_beside_the_wrapped_model(rank, world):
    """Inside the model, DDP would overwrite the counts of a rank with those of rank 0."""
    model, beside = seeded(lambda: Model(VectorQuantizer(3, 8))), CodebookUsage(8)
    model.inside = CodebookUsage(8)
    yield
    wrapped = nn.parallel.DistributedDataParallel(model)
    for number in range(2):
        out = wrapped(data(world)[number][rank][: 4 + 2 * rank])[1]
        beside.update(out.indices)
        model.inside.update(out.indices)
    assert beside.compute().num_tokens == 2 * (4 + 6)
    assert model.inside.compute().num_tokens == 2 * 4 + (4 + 6)


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    return run(collected(CHECKS, request), WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_wrapped_models(reports, name):
    for rank, report in enumerate(reports):
        assert not report[name], f"rank {rank}: {report[name]}"
