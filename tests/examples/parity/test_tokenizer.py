"""Stage 1 against the authors' code: every intermediate tensor, the indices, the losses."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.examples.parity import filling
from tests.examples.parity.comparing import IMAGE, STRUCTURE, assert_near, assert_near_its_size
from tvqrap.models.paper import from_signed, to_signed
from vqprior.functional import commitment_loss

# 256 x 256 is the size for which the release stores masks, the other one where it makes new ones.
INPUTS = {"stage1_256": ("hr256x256#1", 256, 256), "stage1_128x256": ("hr128x256#8", 128, 256)}


@pytest.mark.parametrize("name", INPUTS)
def test_tokenizer(name, tokenizer, stored):
    expected = stored(name)
    key, height, width = INPUTS[name]
    hr = from_signed(torch.from_numpy(filling.image(key, 1, 3, height, width)))
    noise = filling.noise(f"{key}/lr", 1, 3, height // 8, width // 8)
    small = torch.from_numpy(0.5 * np.clip(noise, -2, 2))
    structure = tokenizer.structure
    with torch.no_grad():
        texture = tokenizer.texture(hr)
        features = structure.features(hr, hr, texture)
        expanded = structure.expand(features)
        fused = tokenizer.quantizer.fuse(expanded, texture)
        out = tokenizer.quantizer(texture, expanded)
        latent = structure.small_encoder(small)
        image = to_signed(tokenizer.decoder(out.quantized, hr))
        whole = tokenizer(hr, hr)
    assert_near(features, expected["struct"], STRUCTURE)
    assert_near(latent, expected["lr_latent"], STRUCTURE)
    assert_near(structure.small_decoder(latent).detach(), expected["lr_image"], STRUCTURE)
    for ours, theirs in ((texture, "texture"), (expanded, "struct_up"), (fused, "fused")):
        assert_near_its_size(ours[:, ::8], expected[f"{theirs}__c8"], 1e-5)
    assert_close(out.indices.flatten(), expected["indices"].long(), rtol=0, atol=0)
    assert_near_its_size(out.loss, expected["codebook_loss"], 1e-5)
    assert_near(image, expected["output"], IMAGE)
    # What the pieces give, the whole gives; it goes another way around only for the loss.
    assert_close(to_signed(whole.image), image, rtol=0, atol=0)
    assert_close(out.terms["commitment"], commitment_loss(out))


def test_small_image_is_an_eighth_in_8_bits(tokenizer):
    """The release reads it from a file; here it is made from the crop."""
    hr = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.avg_pool2d(hr, 8)
    levels = to_signed((255 * small).round() / 255)
    features = torch.zeros(1, 64, 2, 2)
    with torch.no_grad():
        assert_close(
            tokenizer.structure.losses(features, hr), tokenizer.structure.align(features, levels)
        )
