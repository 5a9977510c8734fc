"""Claims on several ranks: 1, 18, 19. One spawn runs all checks: see ``tests/distributed``."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.contracts.factories import state
from tests.distributed.ranks import batches, exactly, run, same_on_all_ranks, seeded
from vqprior import (
    BSQ,
    LFQ,
    CodebookEMA,
    CodebookRevival,
    ResidualQuantizer,
    SelfUpdating,
    VectorQuantizer,
    _distributed,
    initialize_codebooks_,
)
from vqprior.metrics import CodebookUsage

WORLD = 2
pytestmark = pytest.mark.distributed
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class Autoencoder(nn.Module):
    def __init__(self, *, self_updating):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 3), nn.Linear(3, 5)
        quantizer = VectorQuantizer(3, 16)
        rules = [CodebookEMA(quantizer, decay=0.8), CodebookRevival(quantizer, patience=1.0)]
        self.quantizer = SelfUpdating(quantizer, *rules) if self_updating else quantizer
        self.rules = [] if self_updating else rules

    def forward(self, x):
        out = self.quantizer(self.encoder(x))
        return self.decoder(out.quantized), out


def train(model, rules, steps, select):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for parts in steps:
        x = select(parts)
        y, out = model(x)
        optimizer.zero_grad()
        ((y - x).square().mean() + out.loss).backward()
        optimizer.step()
        for rule in rules:
            rule.step(out)


def built_before_the_group(world, *, self_updating):
    generator = torch.Generator().manual_seed(4)
    steps = [[torch.randn(20, 5, generator=generator) for _ in range(world)] for _ in range(5)]
    one, mine = (seeded(lambda: Autoencoder(self_updating=self_updating)) for _ in range(2))
    train(one, one.rules, steps, torch.cat)
    yield
    rank = _distributed.rank()
    train(DistributedDataParallel(mine), mine.rules, steps, lambda parts: parts[rank])
    for tensor in state(mine).values():
        same_on_all_ranks(tensor)
    assert_close(state(mine), state(one), rtol=1e-5, atol=1e-5)  # as the claim has it


@check
def built_before_the_group_with_rules(rank, world):
    yield from built_before_the_group(world, self_updating=False)


@check
def built_before_the_group_with_rules_inside(rank, world):
    yield from built_before_the_group(world, self_updating=True)


@check
def built_before_and_after_the_group(rank, world):
    """A second module, built inside the group, learns as the first does."""
    before = seeded(lambda: VectorQuantizer(3, 8))
    rule_before = CodebookEMA(before)
    steps = batches(3, world=world)
    yield
    after = seeded(lambda: VectorQuantizer(3, 8))
    rule_after = CodebookEMA(after)
    for parts in steps:
        rule_before.step(before(*parts[rank]))
        rule_after.step(after(*parts[rank]))
    exactly(state(after), state(before))


@check
def usage_is_that_of_the_union(rank, world):
    one, mine = CodebookUsage(8), CodebookUsage(8)
    parts = [torch.tensor([0, 1, 1, -1]), torch.tensor([5, -1, -1])]
    one.update(torch.cat(parts))
    expected = dataclasses.asdict(one.compute())
    yield
    mine.update(parts[rank])
    assert dataclasses.asdict(mine.compute()) == pytest.approx(expected)


@check
def a_rank_without_a_token(rank, world):
    """Masked as a whole on rank 0, with codes to revive; one process sees rank 1's tokens."""
    make = lambda: ResidualQuantizer([VectorQuantizer(3, 8)] * 2)  # noqa: E731
    one, mine = seeded(make), seeded(make)
    rules = [
        [CodebookEMA(q, decay=0.5), CodebookRevival(q, patience=0.1, threshold=1.0)]
        for q in (one, mine)
    ]
    x = torch.randint(-12, 13, (6, 3), generator=torch.Generator().manual_seed(1)) / 4
    mask = [torch.zeros(6) > 0, torch.ones(6) > 0]
    for _ in range(3):
        out = one(x)
        for rule in rules[0]:
            rule.step(out)
    yield
    for _ in range(3):
        out = mine(x, mask[rank])
        for rule in rules[1]:
            rule.step(out)
        same_on_all_ranks(mine.codebooks[0].codes().detach())
    # Counted tokens are the same, in the same order: nothing is rounded otherwise.
    exactly(state(mine), state(one))


@check
def a_call_on_one_rank_alone(rank, world):
    """A call reaches no collective, except for a joint entropy in training; a rule's step does."""
    quantizer = seeded(lambda: VectorQuantizer(3, 8))
    yield
    before = state(quantizer)
    if rank == 0:
        quantizer.train()(torch.randn(4, 3))
        LFQ(3).eval()(torch.randn(4, 3))
        BSQ(3).eval()(torch.randn(4, 3))
    exactly(state(quantizer), before)
    same_on_all_ranks(quantizer.codebook.weight.detach())


@check
def entropies_are_those_of_the_union(rank, world):
    options = {"commitment_weight": 0.0, "sample_entropy_weight": 0.3, "temperature": 1.0}
    quantizers = [LFQ(4, **options), BSQ(4, **options)]
    x = torch.randn(4 * world, 4, generator=torch.Generator().manual_seed(2))
    expected = [quantizer(x).loss for quantizer in quantizers]
    alone = [[quantizer(part).loss for part in x.chunk(world)] for quantizer in quantizers]
    yield
    for quantizer, value, parts in zip(quantizers, expected, alone, strict=True):
        loss = quantizer(x.chunk(world)[rank]).loss
        assert_close(loss, value)
        assert (loss - parts[rank]).abs() > 1e-3  # it is not that of the rank


@check
def a_start_is_broadcast(rank, world):
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(30, 3, generator=generator) for _ in range(world)]
    yield
    torch.manual_seed(rank)
    quantizer = ResidualQuantizer(
        [VectorQuantizer(3, 8) for _ in range(2)]
    )  # other codes on each rank
    initialize_codebooks_(quantizer, parts[rank])
    for codebook in quantizer.codebooks:
        same_on_all_ranks(codebook.codes().detach())


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return run(CHECKS, WORLD, tmp_path_factory.mktemp("ranks"))


def passed(reports, *names):
    for rank, report in enumerate(reports):
        for name in names:
            assert not report[name], f"rank {rank}, {name}: {report[name]}"


def test_claim_01_a_model_built_before_the_group_learns_from_all_ranks(reports):
    """vector-quantize-pytorch decides when it is built whether there are other ranks: built before
    the group, its codebook silently learns from rank 0 alone. Here the question is asked at call
    time: after five steps in DistributedDataParallel the codebook is that of one process with the
    joint batches, on all ranks."""
    passed(
        reports,
        "built_before_the_group_with_rules",
        "built_before_the_group_with_rules_inside",
        "built_before_and_after_the_group",
    )


def test_claim_18_usage_over_ranks_is_that_of_one_process(reports):
    """vector-quantize-pytorch measures no usage. Here the meter adds up exact counts of all ranks,
    and each gets the summary of one process."""
    passed(reports, "usage_is_that_of_the_union")


def test_claim_19_a_rank_without_tokens_reaches_every_collective(reports):
    """vector-quantize-pytorch leaves out a collective on a rank without tokens, and the others
    wait; a forward on one rank alone hangs too. Here every rank reaches every collective of a
    rule's step, and calls have none, but for LFQ and BSQ in training."""
    passed(reports, "a_rank_without_a_token", "a_call_on_one_rank_alone")


def test_claim_19_entropies_are_those_of_the_union(reports):
    """vector-quantize-pytorch drops the result of the collective and halves the mean of its batch
    entropy. Here the entropy of LFQ and BSQ is that of all ranks' tokens."""
    passed(reports, "entropies_are_those_of_the_union")


def test_claim_19_codebooks_start_alike(reports):
    """vector-quantize-pytorch lets codebooks of ranks with other seeds differ. Here
    `initialize_codebooks_` sets those of rank 0 on all."""
    passed(reports, "a_start_is_broadcast")
