"""ReconstructionAwareLoss: which terms, with which weights, with which gradients."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior.losses import (
    AdversarialLoss,
    FilterBankLoss,
    ReconstructionAwareLoss,
    adaptive_weight,
)
from vqprior.nn import PatchDiscriminator


def absolute(a, b):
    return (a - b).abs().mean()


def darkness(a):
    return -a.mean()


def images(dtype=torch.float32):
    a, b = torch.rand(2, 2, 3, 16, 16).to(dtype)
    return a.requires_grad_(), b


def test_default_is_the_mean_square_alone():
    a, b = images()
    loss, terms = ReconstructionAwareLoss()(a, b)
    assert_close(loss, ((a - b) ** 2).mean())
    assert list(terms) == ["pixel"]


def test_default_weights_are_one_one_and_three_quarters():
    a, b = images()
    objective = ReconstructionAwareLoss(perceptual=absolute, adversarial=darkness)
    loss, terms = objective(a, b)
    expected = {
        "pixel": ((a - b) ** 2).mean(),
        "perceptual": (a - b).abs().mean(),
        "adversarial": -0.75 * a.mean(),
    }
    assert_close(terms, expected)
    assert_close(loss, sum(expected.values()))
    assert_close(*(torch.autograd.grad(v, a)[0] for v in (loss, sum(expected.values()))))


def test_weights_scale_and_the_others_keep_their_defaults():
    a, b = images()
    weights = {"pixel": 3.0, "adversarial": 2}
    objective = ReconstructionAwareLoss(
        pixel=absolute, perceptual=F.mse_loss, adversarial=darkness, weights=weights
    )
    _, terms = objective(a, b)
    assert_close(terms["pixel"], 3 * (a - b).abs().mean())
    assert_close(terms["perceptual"], ((a - b) ** 2).mean())
    assert_close(terms["adversarial"], -2 * a.mean())
    assert weights == {"pixel": 3.0, "adversarial": 2}
    assert "weights={'pixel': 3.0, 'perceptual': 1.0, 'adversarial': 2}" in repr(objective)


@pytest.mark.parametrize("name", ["pixel", "perceptual", "adversarial"])
def test_weight_zero_skips_the_term(name):
    def never(*_):
        raise AssertionError

    a, b = images()
    parts = {"pixel": absolute, "perceptual": absolute, "adversarial": darkness, name: never}
    objective = ReconstructionAwareLoss(**parts, weights={name: 0.0})
    loss, terms = objective(a, b)
    assert set(terms) == set(parts) - {name}
    assert_close(loss, sum(terms.values()))
    objective.weights[name] = 1.0  # weights are read at each call
    with pytest.raises(AssertionError):
        objective(a, b)


def test_no_term_gives_zero():
    loss, terms = ReconstructionAwareLoss(weights={"pixel": 0})(*images())
    assert_close(loss, torch.tensor(0.0))
    assert terms == {}


def test_reference_makes_the_weight_adaptive():
    decoder = nn.Conv2d(4, 3, 3, padding=1)
    codes, target = torch.randn(2, 4, 16, 16), torch.rand(2, 3, 16, 16)
    objective = ReconstructionAwareLoss(
        perceptual=absolute,
        adversarial=darkness,
        weights={"adversarial": 0.5, "perceptual": 0.1},
        reference=decoder.weight,
    )
    reconstruction = decoder(codes)
    loss, terms = objective(reconstruction, target)
    others = terms["pixel"] + terms["perceptual"]
    factor = adaptive_weight(others, darkness(reconstruction), decoder.weight)
    assert_close(terms["adversarial"], 0.5 * factor * darkness(reconstruction))
    # So the weight says how long the adversarial gradient is relative to the others.
    lengths = [
        torch.autograd.grad(part, decoder.weight, retain_graph=True)[0].norm()
        for part in (terms["adversarial"], others)
    ]
    # The constant of 1e-4 shortens it by 1e-4 over the length of the adversarial gradient.
    assert_close(lengths[0] / lengths[1], torch.tensor(0.5), rtol=1e-2, atol=0)
    loss.backward()
    assert decoder.weight.grad.isfinite().all()


def test_reference_is_not_a_parameter_of_the_loss():
    decoder = nn.Conv2d(4, 3, 3)
    objective = ReconstructionAwareLoss(adversarial=darkness, reference=decoder.weight)
    assert list(objective.parameters()) == []
    assert objective.state_dict() == {}
    # Copied together, the copy refers to the copied decoder.
    both = nn.ModuleDict({"decoder": decoder, "objective": objective})
    clone = copy.deepcopy(both)
    reconstruction = clone["decoder"](torch.randn(2, 4, 18, 18))
    loss, _ = clone["objective"](reconstruction, torch.rand(2, 3, 16, 16))
    assert loss.isfinite()


def test_evaluation_without_a_graph_reports_a_zero_adversarial_term():
    decoder = nn.Conv2d(4, 3, 3, padding=1)
    objective = ReconstructionAwareLoss(adversarial=darkness, reference=decoder.weight)
    with torch.no_grad():
        _, terms = objective(decoder(torch.randn(2, 4, 16, 16)), torch.rand(2, 3, 16, 16))
    assert_close(terms["adversarial"], torch.tensor(0.0))


def test_a_discriminator_gets_no_gradient():
    a, b = images()
    adversarial = AdversarialLoss(PatchDiscriminator(width=4, num_layers=2))
    objective = ReconstructionAwareLoss(perceptual=FilterBankLoss(), adversarial=adversarial)
    loss, _ = objective(a, b)
    loss.backward()
    assert a.grad.abs().sum() > 0
    assert all(p.grad is None for p in adversarial.parameters())
    assert set(objective.parameters()) == set(adversarial.parameters())


def test_pixels_are_compared_in_float32_or_wider(dtype):
    seen = []

    def pixel(a, b):
        seen.extend((a.dtype, b.dtype))
        return F.l1_loss(a, b)

    loss, terms = ReconstructionAwareLoss(pixel=pixel)(*images(dtype))
    assert seen == [torch.promote_types(dtype, torch.float32)] * 2
    assert loss.dtype == terms["pixel"].dtype == torch.float32


def test_any_layout_works():
    a, b = torch.rand(2, 5, 7, requires_grad=True), torch.rand(2, 5, 7)
    loss, _ = ReconstructionAwareLoss()(a, b)
    assert_close(loss, ((a - b) ** 2).mean())


def test_compiles_without_graph_break():
    a, b = images()
    objective = ReconstructionAwareLoss(perceptual=absolute, adversarial=darkness)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(compiled(a, b), objective(a, b))


def test_pickles():
    objective = ReconstructionAwareLoss(perceptual=FilterBankLoss(), weights={"pixel": 2.0})
    a, b = images()
    assert_close(pickle.loads(pickle.dumps(objective))(a, b), objective(a, b), rtol=0, atol=0)


def test_rejects_unknown_names_and_bad_weights():
    known = r"'pixel', 'perceptual', 'adversarial'"
    with pytest.raises(ValueError, match=rf"`weights` must have names among {known}, got 'gan'\."):
        ReconstructionAwareLoss(weights={"gan": 1.0})
    for bad, shown in ((-1.0, r"-1\.0"), (math.inf, "inf"), (math.nan, "nan")):
        message = rf"`weights\['pixel'\]` must be finite and at least 0, got {shown}\."
        with pytest.raises(ValueError, match=message):
            ReconstructionAwareLoss(weights={"pixel": bad})


@pytest.mark.parametrize("name", ["pixel", "perceptual", "adversarial"])
def test_rejects_terms_that_are_not_scalars(name):
    objective = ReconstructionAwareLoss(**{name: lambda *images: images[0]})
    message = rf"`{name}` must return a scalar, got shape \(2, 3, 16, 16\)\. Reduce it, for "
    with pytest.raises(ValueError, match=message):
        objective(*images())


def test_rejects_other_shapes():
    a, b = images()
    with pytest.raises(ValueError, match=r"`target` must have shape \(2, 3, 16, 16\), got \(1, 3"):
        ReconstructionAwareLoss()(a, b[:1])
