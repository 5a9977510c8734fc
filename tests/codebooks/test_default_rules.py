"""`default_rules` and `ChainedRules`: one object for a loop, whatever the quantizer."""

import logging

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior import (
    FSQ,
    ChainedRules,
    ChannelsFirst,
    CodebookEMA,
    EmbeddingCodebook,
    NormalizedCodebook,
    ResidualQuantizer,
    SelfUpdating,
    TransformedCodebook,
    UpdateRule,
    VectorQuantizer,
    default_rules,
)


def computed():
    frozen = EmbeddingCodebook(16, 4).requires_grad_(requires_grad=False)
    return VectorQuantizer(4, 16, codebook=TransformedCodebook(frozen, nn.Linear(4, 4)))


def blob(n=2000):
    """Tokens in one small place, as an encoder gives them before it is trained."""
    return 10 + 0.01 * torch.randn(n, 4)


@pytest.mark.parametrize("stages", [1, 2])
def test_codebooks_far_from_the_data_are_in_use_after_a_few_steps(stages):
    quantizer = ResidualQuantizer([VectorQuantizer(4, 64) for _ in range(stages)])
    rules = default_rules(quantizer)
    for _ in range(5):
        rules.step(quantizer(blob()))
    x = blob()
    out = quantizer(x)
    for column in out.indices.reshape(len(x), stages).unbind(1):
        assert column.unique().numel() > 56
    spread = (x - x.mean(dim=0)).square().mean()
    assert (out.quantized - x).square().mean() < 0.5 * spread


def test_they_are_those_of_self_updating():
    automatic = SelfUpdating(ChannelsFirst(VectorQuantizer(4, 16)))
    quantizer = ChannelsFirst(VectorQuantizer(4, 16))
    quantizer.load_state_dict(automatic.quantizer.state_dict())
    rules = default_rules(quantizer)
    for _ in range(3):
        x = torch.randn(2, 4, 6, 6)
        automatic(x)
        rules.step(quantizer(x))
    assert_close(automatic.rules.state_dict(), rules.state_dict(), rtol=0, atol=0)


def test_in_the_model_they_are_saved_with_it():
    model = nn.Module()
    model.quantizer = VectorQuantizer(4, 16)
    model.rules = default_rules(model.quantizer)
    assert {"rules.0.counts_0", "rules.1.uses_0"} <= model.state_dict().keys()
    assert not list(model.parameters())  # the codebook learns by rule


@pytest.mark.parametrize("make", [lambda: FSQ([8, 5, 5, 5]), computed])
def test_where_no_codebook_can_be_set_they_do_nothing(make):
    quantizer = SelfUpdating(make())
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(10, 4))
    assert_close(quantizer.state_dict(), before, rtol=0, atol=0)
    assert len(default_rules(quantizer)) == 0
    assert default_rules(quantizer).codebooks == ()


@pytest.mark.parametrize("normalized", [False, True])
def test_computed_codes_keep_learning_by_gradient_beside_others(normalized):
    first, second = computed(), VectorQuantizer(4, 16)
    if normalized:  # what is computed stays so under what normalizes it
        first.codebook = NormalizedCodebook(first.codebook)
    quantizer = ResidualQuantizer([first, second])
    rules = default_rules(quantizer)
    assert rules.codebooks == (second.codebook,)
    out = quantizer(torch.randn(100, 4))
    out.loss.backward()
    rules.step(out)
    assert any(p.grad is not None and p.grad.any() for p in first.parameters())
    assert all(p.grad is None for p in second.parameters())
    with pytest.raises(TypeError, match="which computes them"):
        CodebookEMA(first)  # alone, there is nothing to do for it


def test_chained_rules_step_in_order():
    calls = []

    class Noted(UpdateRule):
        def __init__(self, quantizer, name):
            super().__init__(quantizer)
            self.name = name

        def step(self, *outs):
            calls.append((self.name, len(outs)))

        def advice(self):
            return f"{self.name} advises" if self.name != "first" else None

    vq = VectorQuantizer(4, 16)
    rules = ChainedRules(*(Noted(vq, name) for name in ("first", "second", "third")))
    out = vq(torch.randn(5, 4))
    rules.step(out, out)
    assert calls == [("first", 2), ("second", 2), ("third", 2)]
    assert rules.advice() == "second advises"
    assert rules.codebooks == (vq.codebook,)
    assert rules[2].name == "third"


def test_chained_rules_are_rules():
    message = r"^`rules` must be update rules, got VectorQuantizer\. For example `CodebookEMA\(q"
    with pytest.raises(TypeError, match=message):
        ChainedRules(VectorQuantizer(4, 16))


def test_a_moving_average_of_few_codes_says_so_once(caplog):
    vq = VectorQuantizer(4, 16)
    ema = CodebookEMA(vq, decay=0.5)
    assert ema.advice() is None  # before the first step nothing is known
    for _ in range(20):
        ema.step(vq(100 + torch.randn(64, 4)))
    sentence = (
        "Codebook 0: 1 of 16 codes were chosen lately. `CodebookRevival` brings unused codes "
        "back; if it is stepped already, use fewer codes."
    )
    with caplog.at_level(logging.WARNING, logger="vqprior"):
        nn.ModuleDict({"vq": vq, "rules": ema}).state_dict()
        ema.state_dict()
    assert caplog.messages == [ema.advice()] == [sentence]


def test_codes_in_use_are_no_reason_for_advice(caplog):
    vq = VectorQuantizer(4, 16)
    rules = default_rules(vq)
    for _ in range(20):
        rules.step(vq(100 + torch.randn(64, 4)))
    rules.state_dict()
    assert rules.advice() is None
    assert not caplog.messages
