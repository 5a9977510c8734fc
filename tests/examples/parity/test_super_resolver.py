"""Stages 2 and 3 against the authors' code: structure, logits, indices, images, gradients."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.examples.parity import filling
from tests.examples.parity.comparing import (
    GRADIENT,
    IMAGE,
    LOGITS,
    STRUCTURE,
    assert_near,
    assert_near_its_size,
    gradient_norms,
)
from tvqrap.models.official_checkpoint import super_resolver_to_official
from tvqrap.models.paper import from_signed, to_signed

NORMS = (nn.GroupNorm, nn.LayerNorm)


def low_resolution(side):
    return torch.from_numpy(filling.image(f"lr{side}x{side}#2", 1, 3, side, side))


@pytest.mark.parametrize("side", [32, 64])
def test_prediction_and_image(side, model, stored):
    check_prediction_and_image(model, side, stored(f"sr_{side}"))


@torch.no_grad()
def check_prediction_and_image(model, side, expected):
    lr = from_signed(low_resolution(side))
    trunk = model.predictor.trunk(lr)
    prediction = model.predict(lr)
    fused = model.predictor.gather[0](torch.cat([prediction.structure, trunk], dim=1))
    tokens = model.predictor.gather[1](fused).flatten(2).mT
    logits = prediction.logits.flatten(1, 2)
    assert_near(prediction.features, expected["lq_feat"], STRUCTURE)
    assert_close(logits.argmax(-1), expected["indices"].long(), rtol=0, atol=0)
    assert_near(logits.logsumexp(-1), expected["logits_logsumexp"], LOGITS)
    channels, rows = ("", 1) if side == 32 else ("__c8", 8)
    for ours, name in (
        (trunk, "lq_texture"),
        (prediction.structure, "struct_up"),
        (fused, "fused"),
    ):
        assert_near_its_size(ours[:, ::rows], expected[name + channels], 1e-5)
    suffix = "" if side == 32 else "__t8"
    assert_near_its_size(tokens[:, ::rows], expected["tokens" + suffix], 1e-5)
    assert_near(logits[:, ::rows], expected["logits" + suffix], LOGITS)
    image = to_signed(model.reconstruct(prediction, lr))
    assert_near(image, expected["output"], IMAGE)
    if side == 64:  # needs no padding
        assert_close(to_signed(model(lr)), image, rtol=0, atol=0)


@pytest.mark.parametrize("side", [32, 64])
def test_gradients_of_a_loss_on_the_image(side, model, stored, parameter_names):
    expected = stored(f"sr_train_{side}")
    signed = low_resolution(side).requires_grad_()
    lr = from_signed(signed)
    image = to_signed(model.train().reconstruct(model.predict(lr), lr))
    loss = image.square().mean()
    loss.backward()
    head = model.predictor.head.head.weight.grad
    assert_near(image.detach().flatten()[::7][:30000], expected["output__flat7"], IMAGE)
    assert_near_its_size(loss.detach(), expected["loss"], GRADIENT)
    assert_near_its_size(signed.grad, expected["input_grad"], GRADIENT)
    assert_near_its_size(head.norm(), expected["idx_weight_grad_norm"], GRADIENT)
    assert_near_its_size(
        head.flatten()[::262][:1000], expected["idx_weight_grad__flat262"], GRADIENT
    )
    if side == 32:
        norms = gradient_norms(model, super_resolver_to_official, parameter_names["sr"])
        assert_close(norms, expected["grad_norms"], rtol=GRADIENT, atol=1e-9)


def test_every_normalization_is_that_of_the_release(model):
    """One wrong epsilon hides in the noise of an image; tests of single layers know the right."""
    norms = {(type(m), m.eps) for m in model.modules() if isinstance(m, NORMS)}
    assert norms == {(nn.GroupNorm, 1e-6), (nn.LayerNorm, 1e-5)}
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {32}
