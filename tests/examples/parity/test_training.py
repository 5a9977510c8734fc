"""One training step of each stage against the authors', without the learned perceptual loss.

The release keeps running statistics of the discriminator for what the generator sees, too; here
they follow what the discriminator is trained on, so these statistics alone are not compared.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.examples.parity import filling
from tests.examples.parity.comparing import (
    GRADIENT,
    assert_near_its_size,
    by_official_name,
    gradient,
    gradient_norms,
)
from tvqrap.models.official_checkpoint import super_resolver_to_official, tokenizer_to_official
from tvqrap.models.paper import from_signed, to_signed
from vqprior.functional import index_cross_entropy
from vqprior.losses import (
    AdversarialLoss,
    HingeGAN,
    ReconstructionAwareLoss,
    adaptive_weight,
    alignment_loss,
)

# The discriminator has kinks, which turn rounding into noise: 1.2e-3 in the stored gradients of
# stage 1, between one thread of the authors' code and two.
THROUGH_THE_DISCRIMINATOR = 1e-2


@pytest.fixture
def images():
    """High- and low-resolution images in [-1, 1]."""
    return {
        name: torch.from_numpy(filling.image(f"step/{name}", 2, 3, side, side))
        for name, side in (("hr", 128), ("lq8", 16), ("lq4", 32))
    }


def adversarial_objective(discriminator, reference):
    """The paper's loss on images, but for its perceptual term."""
    adversary = AdversarialLoss(discriminator.train())
    return adversary, ReconstructionAwareLoss(
        pixel=F.mse_loss, adversarial=adversary, reference=reference
    )


def check_logged(log, **ours):
    """Losses within the noise of gradients, which is more than theirs."""
    for name, value in ours.items():
        assert_close(value.item(), log[name], rtol=GRADIENT, atol=0)


def check_discriminator(adversary, image, target, expected, names, limit):
    """Its loss and the norms of its gradients."""
    loss = adversary.discriminator_loss(image, target)
    (0.75 * loss).backward()
    check_logged(expected.log(), l_d=loss)
    gradients = {
        name.replace("layers.", "main."): parameter.grad.norm()
        for name, parameter in adversary.discriminator.named_parameters()
    }
    ours = torch.stack([gradients[name] for name in names]).float()
    assert_close(ours, expected["d_grad_norms"], rtol=limit, atol=0)


def test_stage_1(tokenizer, discriminator, images, stored, parameter_names):
    expected = stored("train_stage1")
    tokenizer.train()
    hr = from_signed(images["hr"])
    reference = tokenizer.decoder.last_layer.weight
    adversary, objective = adversarial_objective(discriminator, reference)
    texture = tokenizer.texture(hr)
    features = tokenizer.structure.features(hr, hr, texture)
    out = tokenizer.quantizer(texture, tokenizer.structure.expand(features))
    image = to_signed(tokenizer.decoder(out.quantized, hr))
    weight = adaptive_weight(F.mse_loss(image, images["hr"]), adversary(image), reference)
    assert_near_its_size(weight, expected["adaptive_weight_raw"], THROUGH_THE_DISCRIMINATOR)
    loss, terms = objective(image, images["hr"])
    small = tokenizer.structure.align(features, images["lq8"])
    (loss + out.loss + sum(small.values())).backward()
    check_logged(
        expected.log(), l_g_pix=terms["pixel"], l_codebook=out.loss, l_align=small["alignment"],
        l_g_pix_lr=small["small"],
    )  # fmt: skip
    assert_close(
        terms["adversarial"].item(),
        expected.log()["l_g_gan"],
        rtol=THROUGH_THE_DISCRIMINATOR,
        atol=0,
    )
    gradients = by_official_name(tokenizer, tokenizer_to_official, gradient)
    assert_near_its_size(
        gradients["generator.blocks_3.18.weight"],
        expected["g_last_layer_grad"],
        THROUGH_THE_DISCRIMINATOR,
    )
    codebook = gradients["quantize.embedding.weight"].flatten()
    assert_near_its_size(codebook[::262][:1000], expected["g_codebook_grad__flat262"], GRADIENT)
    norms = gradient_norms(tokenizer, tokenizer_to_official, parameter_names["stage1"])
    # A bias before a normalization with one channel a group has no effect; rounding gives it one.
    acts = expected["g_grad_norms"] >= 1e-6
    assert int((~acts).sum()) == 7
    assert_close(
        norms[acts], expected["g_grad_norms"][acts], rtol=THROUGH_THE_DISCRIMINATOR, atol=0
    )
    check_discriminator(
        adversary,
        image,
        images["hr"],
        expected,
        parameter_names["disc"],
        THROUGH_THE_DISCRIMINATOR,
    )


def test_stage_2(model, images, stored, parameter_names):
    expected = stored("train_stage2")
    hr, lr = from_signed(images["hr"]), from_signed(images["lq4"])
    truth = model.tokenizer.describe(hr, lr)
    assert_close(truth.indices.flatten(1), expected["idx_gt"].long(), rtol=0, atol=0)
    prediction = model.train().predict(lr)
    code = index_cross_entropy(prediction.logits, truth.indices)
    structure = alignment_loss(prediction.features, truth.features)
    (structure + 0.5 * code).backward()
    check_logged(expected.log(), cross_entropy_loss=0.5 * code, l_feat_encoder=structure)
    head = model.predictor.head.head.weight.grad.flatten()
    assert_near_its_size(head[::262][:1000], expected["idx_weight_grad__flat262"], GRADIENT)
    norms = gradient_norms(model, super_resolver_to_official, parameter_names["sr"])
    assert_close(norms, expected["g_grad_norms"], rtol=GRADIENT, atol=1e-9)


def test_stage_3(model, discriminator, images, stored, parameter_names):
    """In float64, where no rounding meets the kinks of the discriminator."""
    expected = stored("train_stage3")
    model, discriminator = model.double(), discriminator.double()
    hr, lr = images["hr"].double(), from_signed(images["lq4"].double())
    reference = model.predictor.head.head.weight
    adversary, objective = adversarial_objective(discriminator, reference)
    image = to_signed(model.train().reconstruct(model.predict(lr), lr))
    weight = adaptive_weight(F.mse_loss(image, hr), adversary(image), reference)
    assert_near_its_size(weight, expected["adaptive_weight_raw"], GRADIENT)
    loss, terms = objective(image, hr)
    loss.backward()
    check_logged(expected.log(), l_g_pix=terms["pixel"], l_g_gan=terms["adversarial"])
    head = reference.grad.flatten()
    assert_near_its_size(head[::262][:1000], expected["idx_weight_grad__flat262"], GRADIENT)
    norms = gradient_norms(model, super_resolver_to_official, parameter_names["sr"])
    assert_close(norms, expected["g_grad_norms"], rtol=GRADIENT, atol=1e-9)
    check_discriminator(
        adversary,
        image,
        hr,
        expected,
        parameter_names["disc"],
        THROUGH_THE_DISCRIMINATOR,
    )


def test_hinge_objective(stored):
    expected = stored("disc")
    real, fake = (
        torch.from_numpy(filling.noise(f"hinge/{name}", 2, 1, 5, 7)).requires_grad_()
        for name in ("real", "fake")
    )
    objective = HingeGAN()
    loss = objective.discriminator(real, fake)
    loss.backward()
    on_real, on_fake = F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    generator = objective.generator(fake)
    ours = torch.stack([on_real, on_fake, generator, loss]).detach()
    assert_near_its_size(ours, expected["hinge"], 1e-6)
    # The stored gradients are those of the two halves, before they are averaged.
    assert_near_its_size(2 * real.grad, expected["hinge_grad_real"], 1e-6)
    assert_near_its_size(2 * fake.grad, expected["hinge_grad_fake"], 1e-6)


def test_adaptive_weight_limits(stored):
    """Stored for one pair of losses: as it is, limited to 1, and without adversarial gradient."""
    _, limited, unopposed = stored("disc")["adaptive_weight"]
    parameter = nn.Parameter(torch.from_numpy(np.ones(3, dtype=np.float32)))
    steep, flat = 50 * parameter.sum(), parameter.sum()
    assert_close(adaptive_weight(steep, flat, parameter, max_weight=1), limited)
    assert_close(adaptive_weight(steep, 0 * flat, parameter), unopposed)
