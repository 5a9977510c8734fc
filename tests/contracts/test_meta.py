"""Law 8 for models built without memory: ``torch.device("meta")``, then a ``state_dict``."""

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.contracts.factories import (
    every_learned_quantizer,
    every_quantizer,
    quantizers_where,
    state,
)
from tests.contracts.layouts import draw, exactly
from tests.contracts.traits import ranks_codes, waits_for_nothing
from tests.test_public_api import CONCRETE
from vqprior import (
    ChainedRules,
    Codebook,
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    IndexPredictor,
    QuantizerBase,
    UpdateRule,
    losses,
    metrics,
)
from vqprior import nn as blocks


def image(seed):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# Every module that is neither a quantizer nor a rule: how it is built and called.
OTHERS = {
    "ChannelNorm": (lambda: blocks.ChannelNorm(3), lambda m: m(image(0))),
    "Downsample": (lambda: blocks.Downsample(3), lambda m: m(image(0))),
    "Upsample": (lambda: blocks.Upsample(3), lambda m: m(image(0))),
    "ResidualBlock": (lambda: blocks.ResidualBlock(3), lambda m: m(image(0))),
    "PatchDiscriminator": (lambda: blocks.PatchDiscriminator(width=8), lambda m: m(image(0))),
    "L2Norm": (blocks.L2Norm, lambda m: m(image(0))),
    "ScaleRefinement": (lambda: blocks.ScaleRefinement(32), lambda m: m(image(0), 0.5)),
    "SwinLayer": (
        lambda: blocks.SwinLayer(3, num_heads=1, window_size=5, shift=2),
        lambda m: (m(image(0)), m._attend_masked(image(0).movedim(1, -1))),  # as traced, too
    ),
    "IndexPredictor": (lambda: IndexPredictor(32, 8), lambda m: m(image(0))),
    "EmbeddingCodebook": (lambda: EmbeddingCodebook(8, 4, gain=8.0), lambda m: m.codes()),
    "FilterBank": (losses.FilterBank, lambda m: m(image(0))),
    "FilterBankLoss": (losses.FilterBankLoss, lambda m: m(image(0), image(1))),
    "PerceptualLoss": (
        lambda: losses.PerceptualLoss(nn.Conv2d(3, 4, 3)),
        lambda m: m(image(0), image(1)),
    ),
    "AdversarialLoss": (
        lambda: losses.AdversarialLoss(nn.Conv2d(3, 1, 3)),
        lambda m: m(image(0)),
    ),
    "ReconstructionAwareLoss": (
        lambda: losses.ReconstructionAwareLoss(perceptual=losses.FilterBankLoss()),
        lambda m: m(image(0), image(1)),
    ),
    "CodebookUsage": (lambda: metrics.CodebookUsage(8), lambda m: m.update(torch.arange(4))),
    "FrechetDistance": (
        lambda: metrics.FrechetDistance(4),
        lambda m: m.update(torch.eye(4), torch.ones(2, 4)),
    ),
    "StreamingMean": (
        lambda: metrics.StreamingMean(metrics.psnr),
        lambda m: m.update(image(0), image(1)),
    ),
}
every_other = pytest.mark.parametrize("name", OTHERS)


def on_meta(make):
    with torch.device("meta"):
        return make()


def materialized(make, saved):
    """Builds on the meta device, and fills the new memory, which holds anything, from ``saved``."""
    module = on_meta(make).to_empty(device="cpu")
    # Loading would not restore such a buffer, and some frameworks give it new memory as well.
    assert {name for name, _ in module.named_buffers()} <= saved.keys()
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(-7)
    module.load_state_dict(saved)
    return module


def assigned(make, saved):
    """Builds on the meta device, and replaces parameters and buffers by those of ``saved``."""
    module = on_meta(make)
    module.load_state_dict(saved, assign=True)
    return module


@every_quantizer
@pytest.mark.parametrize("filled", [materialized, assigned])
def test_a_quantizer_built_without_memory_gives_the_same(make, filled):
    original = make().eval()
    x = draw(original)
    expected = original(x)
    twin = filled(make, original.state_dict()).eval()
    out = twin(x)
    for name in ("quantized", "indices", "loss", "terms"):
        exactly(getattr(out, name), getattr(expected, name))
    exactly(twin.decode(out.indices), original.decode(out.indices))


@every_other
@pytest.mark.parametrize("filled", [materialized, assigned])
def test_a_module_built_without_memory_gives_the_same(name, filled):
    make, call = OTHERS[name]
    original = make().eval()
    call(original)
    saved = {key: value.clone() for key, value in original.state_dict().items()}
    twin = filled(make, saved).eval()
    exactly(call(twin), call(original))
    exactly(state(twin), state(original))


def test_every_module_is_listed():
    classes = [thing for thing in CONCRETE.values() if inspect.isclass(thing)]
    modules = {c.__name__ for c in classes if issubclass(c, nn.Module)}
    tested = {c.__name__ for c in classes if issubclass(c, (QuantizerBase, UpdateRule, Codebook))}
    assert modules - tested <= OTHERS.keys()


@every_learned_quantizer
@pytest.mark.parametrize("filled", [materialized, assigned])
def test_rules_built_without_memory_continue(make, filled):
    def pair():
        quantizer = make()
        rules = CodebookEMA(quantizer, decay=0.9), CodebookRevival(quantizer, patience=2.0)
        return nn.ModuleList([quantizer, ChainedRules(*rules)])

    def step(model):
        quantizer, rule = model.eval()
        rule.step(quantizer(draw(quantizer)))

    original = pair()
    step(original)
    twin = filled(pair, {key: value.clone() for key, value in original.state_dict().items()})
    for model in (original, twin):
        step(model)
    assert_close(state(twin), state(original), rtol=0, atol=0)


@quantizers_where(waits_for_nothing)
def test_shapes_and_dtypes_are_found_without_memory(make):
    original = make()
    x = draw(original)
    quantizer = on_meta(make)
    for training in (True, False):
        out, expected = quantizer.train(training)(x.to("meta")), original.train(training)(x)
        assert out.quantized.is_meta
        assert (out.quantized.shape, out.quantized.dtype) == (x.shape, x.dtype)
        assert (out.indices.shape, out.indices.dtype) == (expected.indices.shape, torch.int64)
        assert out.terms.keys() == expected.terms.keys()
        assert quantizer.decode(quantizer.encode(x.to("meta"))).shape == x.shape


@quantizers_where(ranks_codes, waits_for_nothing)
def test_logits_have_their_shape_without_memory(make):
    x = draw(make())
    assert on_meta(make).logits(x.to("meta")).shape == make().logits(x).shape
