"""Rules and `initialize_codebooks_` on quantizers with several or shared codebooks."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.codebooks.pair import one_shared_codebook, two_codebooks
from tests.contracts.factories import state
from vqprior import CodebookEMA, CodebookRevival, initialize_codebooks_

RULES = {
    "ema": lambda quantizer, **options: CodebookEMA(quantizer, decay=0.9, **options),
    "revival": lambda quantizer, **options: CodebookRevival(quantizer, patience=5.0, **options),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


@every_rule
def test_each_codebook_learns_as_if_alone(rule):
    pair = two_codebooks()
    first, second = copy.deepcopy((pair.first, pair.second))
    both, seed_of_second = rule(pair), {} if rule is RULES["ema"] else {"seed": 1}
    alone = rule(first), rule(second, **seed_of_second)
    for _ in range(6):
        x = torch.randn(40, 5)
        both.step(pair(x))
        alone[0].step(first(x[:, :2]))
        alone[1].step(second(x[:, 2:]))
    exactly(state(pair.first), state(first))
    exactly(state(pair.second), state(second))


@every_rule
def test_a_shared_codebook_learns_from_all_its_selections_at_once(rule):
    pair = one_shared_codebook()
    single = copy.deepcopy(pair.first)
    shared, alone = rule(pair), rule(single)
    assert len(shared.codebooks) == 1
    for _ in range(6):
        x = torch.randint(-8, 9, (40, 4)) / 4  # sums of quarters do not round, in any order
        shared.step(pair(x))
        alone.step(single(torch.cat([x[:, :2], x[:, 2:]])))
    exactly(state(pair.first), state(single))
    exactly(state(shared), state(alone))


def test_each_codebook_starts_from_what_it_sees():
    pair, x = two_codebooks(), torch.randn(200, 5)
    initialize_codebooks_(pair, x, method="sample", generator=torch.Generator().manual_seed(0))
    for row in pair.first.codebook.codes().detach():
        assert (x[:, :2] == row).all(dim=1).any()
    for row in pair.second.codebook.codes().detach():
        assert (x[:, 2:] == row).all(dim=1).any()


def test_a_shared_codebook_starts_once():
    pair, x = one_shared_codebook(), torch.randn(200, 4)
    initialize_codebooks_(pair, x, method="sample", generator=torch.Generator().manual_seed(0))
    for row in pair.first.codebook.codes().detach():
        assert (x[:, :2] == row).all(dim=1).any()
