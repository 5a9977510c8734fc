"""Law 8: a state loaded strictly into fresh modules continues bit for bit; copies are complete."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.contracts.factories import every_learned_quantizer, every_quantizer, every_rule, state
from tests.contracts.layouts import arrange, draw, features_last
from tests.contracts.traits import learned_by_rules
from vqprior import CodebookEMA, CodebookRevival, SelfUpdating, VectorQuantizer


class Training:
    """A linear encoder, a quantizer, its rules and the optimizer of both."""

    def __init__(self, quantizer, *, ema):
        self.encoder, self.quantizer = nn.Linear(quantizer.dim, quantizer.dim), quantizer
        learns = learned_by_rules(quantizer)
        rules = [CodebookEMA(quantizer, decay=0.9)] if ema and learns else []
        parameters = [p for p in quantizer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *parameters], lr=0.1)
        if learns:
            options = {"patience": 4.0, "threshold": 0.5, "optimizer": self.optimizer}
            rules.append(CodebookRevival(quantizer, **options))
        self.rules = nn.ModuleList(rules)

    def parts(self):
        return self.encoder, self.quantizer, self.rules, self.optimizer

    def run(self, seeds):
        for seed in seeds:
            x = draw(self.quantizer, (40,), seed=seed)
            encoded = self.encoder(features_last(self.quantizer, x))
            out = self.quantizer(arrange(self.quantizer, encoded))
            loss = (out.quantized - x).square().mean() + out.loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            for rule in self.rules:
                rule.step(out)
        return loss.detach()


@every_quantizer
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_training_continues_bit_for_bit(make, ema):
    first = Training(make(), ema=ema)
    first.run(range(2))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first.parts()], file)
    file.seek(0)
    rng = torch.get_rng_state()  # dropout and sampling draw from torch's generator
    second = Training(make(), ema=ema)
    for part, saved in zip(second.parts(), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    torch.set_rng_state(rng)
    expected = first.run(range(2, 5))
    torch.set_rng_state(rng)
    assert_close(second.run(range(2, 5)), expected, rtol=0, atol=0)
    for ours, theirs in zip(second.parts()[:3], first.parts()[:3], strict=True):
        assert_close(state(ours), state(theirs), rtol=0, atol=0)


def clones(thing):
    return pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing)


@every_quantizer
def test_a_copy_gives_the_same(make):
    quantizer = make().eval()
    x = draw(quantizer)
    original = quantizer(x)
    for twin in clones(quantizer):
        assert type(twin) is type(quantizer)
        copied = twin(x)
        for name in ("quantized", "indices", "loss", "terms"):
            assert_close(getattr(copied, name), getattr(original, name), rtol=0, atol=0)


@every_learned_quantizer
def test_a_copy_learns_by_itself(make):
    """Rules copied with their quantizer update the copy, not the original."""
    quantizer = make()
    original = nn.ModuleList([CodebookEMA(quantizer), CodebookRevival(quantizer), quantizer])
    reverse = nn.ModuleList(original[::-1])
    before = state(original)
    for twin in (*clones(original), *(nn.ModuleList(clone[::-1]) for clone in clones(reverse))):
        assert_close(state(twin), before, rtol=0, atol=0)
        *rules, copied = twin
        for seed in range(3):
            out = copied(draw(copied, seed=seed))
            for rule in rules:
                rule.step(out)
        assert_close(state(original), before, rtol=0, atol=0)
        for codebook, mine in zip(copied.codebooks, quantizer.codebooks, strict=True):
            assert (codebook.codes() != mine.codes()).any()
        own = list(dict.fromkeys(map(id, copied.codebooks)))
        assert all([id(c) for c in rule.codebooks] == own for rule in rules)


@every_learned_quantizer
@every_rule
def test_a_rule_copied_alone_says_so(make, rule):
    """Its codebooks would be copies that no quantizer uses."""
    quantizer = make()
    learner = rule(quantizer)
    message = "^`quantizer` must exist as long as its rule, got a rule whose codebook is gone. Copy"
    for twin in clones(learner):
        out = quantizer(draw(quantizer))
        with pytest.raises(RuntimeError, match=message):
            twin.step(out)
        twin.advice()
    fresh = make()
    rule(fresh).load_state_dict(twin.state_dict())  # the way out


def test_copies_leave_the_optimizer_behind():
    """It holds the moments of the whole model."""
    quantizer = VectorQuantizer(4, 16)
    optimizer = torch.optim.Adam(quantizer.parameters())
    rule = CodebookRevival(quantizer, optimizer=optimizer)
    assert [twin.optimizer for _, twin in clones((quantizer, rule))] == [None, None]
    assert rule.optimizer is optimizer


@every_learned_quantizer
def test_a_copied_self_updating_quantizer_is_whole(make):
    original = SelfUpdating(quantizer := make(), CodebookEMA(quantizer, decay=0.5))
    before = state(original)
    for twin in clones(original):
        twin.train()(draw(quantizer))
        assert_close(state(original), before, rtol=0, atol=0)
        assert (twin.codebooks[0].codes() != original.codebooks[0].codes()).any()
