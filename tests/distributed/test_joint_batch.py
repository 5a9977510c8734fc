"""Law 7 for nested quantizers, losses and metrics: ranks behave as one process."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.contracts.factories import state
from tests.distributed.ranks import (
    batches,
    collected,
    ema,
    joint,
    revival,
    run,
    same_on_all_ranks,
    seeded,
)
from vqprior import (
    BSQ,
    LFQ,
    ChannelsFirst,
    CodebookRevival,
    EmbeddingCodebook,
    GroupedQuantizer,
    MultiScaleQuantizer,
    NormalizedCodebook,
    ProjectedQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    _distributed,
)
from vqprior.metrics import CodebookUsage, FrechetDistance

CHECKS = {}
RULES = {
    "ema": lambda quantizer: [ema(quantizer)],
    "revival": lambda quantizer: [revival(quantizer)],
    "both": lambda quantizer: [ema(quantizer), revival(quantizer)],
}


def check(function):
    CHECKS[function.__name__] = function
    return function


def vq(dim=3, **options):
    return VectorQuantizer(dim, 8, **options)


def projected():
    """A projection with integer weights, which do not round."""
    quantizer = ProjectedQuantizer(vq(2), nn.Linear(3, 2), nn.Linear(2, 3))
    with torch.no_grad():
        quantizer.down.weight.copy_(torch.tensor([[1.0, -2.0, 0.0], [3.0, 1.0, 1.0]]))
        quantizer.down.bias.zero_()
    return quantizer


def normalized(**options):
    return vq(codebook=NormalizedCodebook(EmbeddingCodebook(8, 3)), **options)


# For each quantizer, the shape of a sample, and whether all sums over tokens are exact sums of
# quarters. If not (a codebook sees residuals), ranks round in another order than one process: sums
# of at most 100 numbers below 20 then differ by up to 100 * 20 * 2**-24, about 1e-4, and means by
# about a tenth of that.
QUANTIZERS = {
    "plain": (lambda: vq(), (3,), True),
    "grouped": (lambda: GroupedQuantizer([vq(2), vq(3)]), (5,), True),
    "grouped_shared": (lambda: GroupedQuantizer([vq(2)] * 2), (4,), True),
    "projected": (projected, (3,), True),
    "normalized": (lambda: normalized(), (3,), True),
    "cosine": (lambda: normalized(metric="cosine"), (3,), True),
    "residual": (lambda: ResidualQuantizer([vq() for _ in range(3)]), (3,), False),
    "residual_shared": (lambda: ResidualQuantizer([vq()] * 3), (3,), False),
    "residual_beam": (
        lambda: ResidualQuantizer([vq() for _ in range(3)], beam_size=2),
        (3,),
        False,
    ),
    "multi_scale": (lambda: ChannelsFirst(MultiScaleQuantizer(vq(), (1, 2, 4))), (4, 4, 3), False),
}


def step(quantizer, rules, x, mask):
    if isinstance(quantizer, ChannelsFirst):
        x = x.movedim(-1, 1)
    out = quantizer(x, mask)
    for rule in rules:
        rule.step(out)


def learn_as_one(make, rules_of, shape, exact, *, before_the_group, world):
    """Trains one process before the yield and all ranks after it; all must end up equal."""
    one, mine = seeded(make), seeded(make)
    one_rules, my_rules = rules_of(one), rules_of(mine) if before_the_group else None
    steps = batches(*shape, world=world)
    start = state(one)
    for parts in steps:
        step(one, one_rules, *joint(parts))
    moved = [(state(one)[name] != value).any() for name, value in start.items()]
    assert any(moved)
    yield
    if not before_the_group:
        mine = seeded(make)
        my_rules = rules_of(mine)
    for parts in steps:
        step(mine, my_rules, *parts[_distributed.rank()])
        for codebook in mine.codebooks:
            same_on_all_ranks(codebook.codes().detach())
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    assert_close(state(mine), state(one), **tolerance)
    for my_rule, one_rule in zip(my_rules, one_rules, strict=True):
        assert_close(state(my_rule), state(one_rule), **tolerance)
        for buffer in my_rule.buffers():
            same_on_all_ranks(buffer)


class LearnsAsOne:
    """A check for one quantizer, set of rules and order; a class, so that it can be pickled."""

    def __init__(self, quantizer, rules, before_the_group):
        self.quantizer, self.rules, self.before_the_group = quantizer, rules, before_the_group

    def __call__(self, rank, world):
        return learn_as_one(
            QUANTIZERS[self.quantizer][0],
            RULES[self.rules],
            *QUANTIZERS[self.quantizer][1:],
            before_the_group=self.before_the_group,
            world=world,
        )


CHECKS |= {
    f"{quantizer}_learns_as_one_by_{rules}{'' if before else '_built_in_a_group'}": LearnsAsOne(
        quantizer, rules, before
    )
    for quantizer in QUANTIZERS
    for rules in RULES
    for before in ((True, False) if rules == "both" else (True,))
}


def binary_quantizers():
    options = {"commitment_weight": 0.25, "sample_entropy_weight": 0.7}
    return [kind(3, batch_entropy_weight=0.9, **options).double() for kind in (LFQ, BSQ)]


@check
def binary_losses_are_those_of_the_joint_batch(rank, world):
    """With gradients averaged over ranks. Entropies are joint for any split, the mean square for
    equal numbers of tokens."""
    weight = seeded(lambda: torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(6, 3, dtype=torch.float64, generator=generator) for _ in range(world)]
    expected = []
    for quantizer in binary_quantizers():
        out = quantizer(torch.cat(parts) @ weight)
        (gradient,) = torch.autograd.grad(sum(out.terms.values()), weight)
        expected.append((out.terms, gradient))
    yield
    for quantizer, (terms, gradient) in zip(binary_quantizers(), expected, strict=True):
        out = quantizer(parts[rank] @ weight)
        assert {"commitment"} < set(out.terms) == set(terms)
        for name, term in out.terms.items():
            mean = _distributed.all_reduce_sum_(term.detach().clone()) / world
            assert_close(mean, terms[name].detach())
            if name != "commitment":
                same_on_all_ranks(term.detach())
        (mine,) = torch.autograd.grad(sum(out.terms.values()), weight)
        # Terms are float32 scalars: their gradients carry its rounding.
        assert_close(_distributed.all_reduce_sum_(mine) / world, gradient, rtol=1e-5, atol=1e-7)


@check
def binary_entropies_are_joint_where_ranks_have_unequal_numbers_of_tokens(rank, world):
    steps = batches(3, world=world)
    options = {"commitment_weight": 0.0, "sample_entropy_weight": 0.7, "batch_entropy_weight": 0.9}
    quantizers = [kind(3, **options) for kind in (LFQ, BSQ)]
    expected = [[q(*joint(parts)).loss for parts in steps] for q in quantizers]
    yield
    for quantizer, losses in zip(quantizers, expected, strict=True):
        for parts, loss in zip(steps, losses, strict=True):
            mine = quantizer(*parts[rank]).loss
            assert_close(mine, loss)
            same_on_all_ranks(mine)


@check
def usage_is_that_of_all_ranks(rank, world):
    quantizer, one, mine = seeded(vq), CodebookUsage(8), CodebookUsage(8)
    steps = [[quantizer(*part).indices for part in parts] for parts in batches(3, world=world)]
    for parts in steps:
        one.update(torch.cat(parts))
    expected = dataclasses.asdict(one.compute())
    assert expected["skipped_tokens"] > 0
    yield
    for parts in steps:
        mine.update(parts[rank])
    for _ in range(2):
        assert dataclasses.asdict(mine.compute()) == pytest.approx(expected, rel=1e-12)


@check
def frechet_distance_is_that_of_all_ranks(rank, world):
    """Ranks have different means, so that their covariances differ from the joint one."""
    steps = [
        [(x[mask] + 100 * r, x[~mask] - 10 * r) for r, (x, mask) in enumerate(parts)]
        for parts in batches(3, world=world)
    ]
    one, mine, lopsided = (FrechetDistance(3) for _ in range(3))
    for parts in steps:
        one.update(*joint(parts))
    expected = one.compute()
    yield
    for parts in steps:
        mine.update(*parts[rank])
        if rank == world - 1:  # the other ranks have seen nothing, but take part in the sums
            lopsided.update(*joint(parts))
    valid = state(mine)
    for _ in range(2):
        for metric in (mine, lopsided):
            value = metric.compute()
            assert value == pytest.approx(expected, rel=1e-9)
            same_on_all_ranks(torch.tensor(value, dtype=torch.float64))
    assert_close(state(mine), valid, rtol=0, atol=0)
    mine.reset()
    if rank == 0:
        mine.update(torch.zeros(2, 3), torch.ones(1, 3))
    assert torch.tensor(mine.compute()).isnan()
    mine.update(torch.zeros(1, 3), torch.ones(1, 3))
    assert mine.compute() == 3.0


def accumulate(parts, steps, select, average):
    """Accumulates two micro-batches per optimizer step; rules step after every micro-batch."""
    encoder, quantizer, rules, optimizer = parts
    for micro_batches in steps:
        for micro_batch in micro_batches:
            x = select(micro_batch)
            out = quantizer(encoder(x))
            ((out.quantized - x[:, :3]).square().mean() + out.loss).div(2).backward()
            for rule in rules:
                rule.step(out)
        for parameter in encoder.parameters():
            average(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()


@check
def accumulated_gradients_and_rule_steps_are_those_of_one_process(rank, world):
    def setup():
        encoder, quantizer = nn.Linear(5, 3), vq()
        rules = [ema(quantizer), CodebookRevival(quantizer, patience=2.0)]
        return encoder, quantizer, rules, torch.optim.SGD(encoder.parameters(), lr=0.1)

    generator = torch.Generator().manual_seed(2)
    draws = torch.randint(-12, 13, (4, 2, world, 4, 5), generator=generator) / 4
    one, mine = seeded(setup), seeded(setup)
    accumulate(one, draws, lambda parts: parts.flatten(0, 1), lambda gradient: None)
    yield
    accumulate(
        mine,
        draws,
        lambda parts: parts[rank],
        lambda g: _distributed.all_reduce_sum_(g).div_(world),
    )
    # Sums over ranks are rounded in another order: a few times 2**-24 of numbers below 10.
    for ours, theirs in zip(mine[:2], one[:2], strict=True):
        assert_close(state(ours), state(theirs), rtol=1e-5, atol=1e-5)
    for codebook in mine[1].codebooks:
        same_on_all_ranks(codebook.codes().detach())


@pytest.fixture(scope="module", params=[2, 4])
def reports(request, tmp_path_factory):
    return run(collected(CHECKS, request), request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_joint_batch(reports, name):
    for rank, report in enumerate(reports):
        assert not report[name], f"rank {rank}: {report[name]}"
