"""Claims on state: 7 and 15."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.claims.cast import (
    RULES,
    every_quantizer,
    is_pure,
    maps,
    quantizers_where,
    rules_can_write,
    seeded,
    some_tokens,
)
from tests.contracts.factories import arrange, features_last, state, vq
from vqprior import CodebookRevival, ResidualQuantizer


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def call_everything(quantizer):
    x = maps(quantizer)
    for mask in (None, some_tokens()):
        out = quantizer(x, mask)
        quantizer.encode(x, mask)
    quantizer.decode(out.indices)
    quantizer.quantize_as(x, out.indices)
    if quantizer.codebooks:
        quantizer.logits(x)


@every_quantizer
def test_claim_07_a_call_in_eval_changes_no_state(make):
    """vector-quantize-pytorch starts codebooks, moves its affine statistics and revives shared
    codes in eval. Here no call changes a bit of the state."""
    quantizer = make().eval()
    before, versions = state(quantizer), [p._version for p in quantizer.parameters()]
    call_everything(quantizer)
    exactly(state(quantizer), before)
    assert [p._version for p in quantizer.parameters()] == versions


@quantizers_where(is_pure)
def test_claim_07_frozen_in_training_changes_no_state(make):
    """vector-quantize-pytorch ignores `freeze_codebook` in residual quantizers, with beams and at
    its start. Here codes move by an optimizer or a rule alone: with `requires_grad_(False)` and no
    rule stepped, training changes nothing."""
    quantizer = make().requires_grad_(requires_grad=False).train()
    before = state(quantizer)
    call_everything(quantizer)
    call = lambda x: (out := quantizer(x)).quantized.sum() + out.loss  # noqa: E731
    checkpoint(call, maps(quantizer).requires_grad_(), use_reentrant=False).backward()
    exactly(state(quantizer), before)
    assert "codebook" not in quantizer(maps(quantizer)).terms


class Training:
    """A linear encoder, a quantizer, its rules and the optimizer of both."""

    def __init__(self, make, *, ema):
        self.quantizer = seeded(make)
        rules = rules_can_write(self.quantizer)
        self.encoder = nn.Linear(self.quantizer.dim, self.quantizer.dim)
        parts = [RULES["ema"](self.quantizer)] if ema and rules else []
        learned = [p for p in self.quantizer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *learned], lr=0.1)
        if rules:
            parts.append(
                CodebookRevival(
                    self.quantizer, patience=1.0, threshold=0.5, optimizer=self.optimizer
                )
            )
        self.rules = nn.ModuleList(parts)

    def parts(self):
        return self.encoder, self.quantizer, self.rules, self.optimizer

    def run(self, seeds):
        for seed in seeds:
            torch.manual_seed(seed)  # for what draws: that generator is the user's to save
            encoded = self.encoder(features_last(self.quantizer, maps(self.quantizer, seed)))
            out = self.quantizer(arrange(self.quantizer, encoded))
            self.optimizer.zero_grad()
            (out.quantized.square().mean() + out.loss).backward()
            self.optimizer.step()
            for rule in self.rules:
                rule.step(out)


@every_quantizer
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_claim_15_a_resumed_run_continues_bit_for_bit(make, ema):
    """vector-quantize-pytorch fails to load its affine statistics and does not save its inner
    optimizer or pending sums. Here a state loads strictly into fresh modules and training
    continues bit for bit, in the middle of a window of revival too."""
    first = Training(make, ema=ema)
    first.run(range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first.parts()], file)
    file.seek(0)
    second = Training(make, ema=ema)
    for part, saved in zip(second.parts(), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    first.run(range(3, 6))
    second.run(range(3, 6))
    for ours, theirs in zip(second.parts()[:3], first.parts()[:3], strict=True):
        exactly(state(ours), state(theirs))


@every_quantizer
@pytest.mark.parametrize("clone", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_claim_15_quantizers_can_be_pickled_and_copied(make, clone):
    """vector-quantize-pytorch holds lambdas that cannot be pickled. Here every quantizer can be,
    and the copy gives the same results."""
    quantizer = make().eval()
    twin = clone(quantizer)
    exactly(state(twin), state(quantizer))
    x = maps(quantizer)
    exactly(twin(x).quantized, quantizer(x).quantized)


def test_claim_15_a_shared_codebook_is_saved_once():
    """vector-quantize-pytorch saves a shared codebook once for each stage. Here it is saved
    once."""
    assert sum(t.numel() for t in ResidualQuantizer([vq()] * 5).state_dict().values()) == 16 * 4
