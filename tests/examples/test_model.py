"""The TVQ&RAP assembly: shapes, what the predictor may see, and what tiles rely on."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tvqrap.images.layouts import reflect
from tvqrap.models.assembly import (
    SuperResolver,
    TextureTokenizer,
    predictor_losses,
    rap_loss,
    tokenizer_loss,
)
from tvqrap.models.convolutional import ConvolutionalConfig
from tvqrap.models.paper import PaperConfig
from tvqrap.models.presets import PRESETS, config_from_json, config_to_json
from vqprior.losses import ReconstructionAwareLoss

LITTLE = {
    "width": 8,
    "codebook_size": 16,
    "structure_blocks": 1,
    "texture_blocks": 1,
    "decoder_blocks": 1,
    "predictor_width": 8,
    "predictor_blocks": 1,
    "head_blocks": 1,
}
CONFIGS = {
    "lowres": ConvolutionalConfig(structure="lowres", **LITTLE),
    "lowres-4": ConvolutionalConfig(structure="lowres", grid=4, **LITTLE),
    "regressed": ConvolutionalConfig(structure="regressed", **LITTLE),
    "paper": PaperConfig(width=8, codebook_size=16, predictor_depth=2),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config):
    return SuperResolver(TextureTokenizer(config), config.make_predictor()).eval()


@configs
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (17, 9)])
def test_upscales_images_of_any_size(config, size):
    model, lr = make(config), torch.rand(2, 3, *size)
    with torch.no_grad():
        image = model(lr)
    assert image.shape == (2, 3, 4 * size[0], 4 * size[1])
    codes = (-(-size[0] // (config.grid // 4)), -(-size[1] // (config.grid // 4)))
    assert model.indices(lr).shape == (2, *codes)


@configs
def test_tokenizer_reconstructs_from_its_indices(config):
    tokenizer = TextureTokenizer(config).eval()
    hr, lr = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        tokenized = tokenizer(hr, lr)
        features, indices = tokenizer.describe(hr, lr)
        structure = tokenizer.structure.expand(features)
        decoded = tokenizer.decoder(tokenizer.quantizer.decode(indices, structure), lr)
    assert_close(indices, tokenized.quantizer_output.indices, rtol=0, atol=0)
    assert_close(decoded, tokenized.image, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lowres", "lowres-4"])
def test_nothing_beyond_the_overlap_changes_a_pixel(name):
    model = make(CONFIGS[name])
    lr = torch.rand(1, 3, 64, 8)
    changed = lr.clone()
    changed[:, :, :16] = 1 - changed[:, :, :16]
    with torch.no_grad():
        difference = (model(changed) - model(lr)).abs().amax(dim=(0, 1, 3))
    beyond = 4 * (16 + model.tiling.overlap)
    assert difference[:64].min() > 0
    assert difference[beyond:].max() == 0


def test_without_a_predictor_the_structure_is_decoded_alone():
    config = CONFIGS["lowres"]
    tokenizer = TextureTokenizer(config).eval()
    lr, hr = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 64, 64)
    none = torch.zeros(1, 8, 8, dtype=torch.bool)
    model = SuperResolver(tokenizer, None)
    with torch.no_grad():
        assert_close(model(lr), tokenizer(hr, lr, none).image, rtol=0, atol=0)
    assert (model.indices(lr) == -1).all()


def test_a_share_of_the_texture_can_be_added():
    model = make(CONFIGS["lowres"])
    lr = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        structure = model.predict(lr).structure
        codes = model.tokenizer.codes[model.indices(lr)].movedim(-1, 1)
        for share in (0.0, 0.25, 1.0):
            model.texture_strength = share
            expected = model.tokenizer.decoder(structure + share * codes, lr)
            assert_close(model(lr), expected)
        model.texture_strength = 0.0
        assert_close(model(lr), SuperResolver(model.tokenizer, None)(lr))


def test_regressed_structure_needs_a_predictor():
    with pytest.raises(ValueError, match=r"`predictor` must be given .* Train `--stage predictor`"):
        SuperResolver(TextureTokenizer(CONFIGS["regressed"]), None)


@configs
def test_image_loss_trains_the_predictor_and_nothing_else(config):
    model = make(config)
    lr = torch.rand(1, 3, 16, 16)
    model.reconstruct(model.predict(lr), lr).square().mean().backward()
    assert all(p.grad is None for p in model.tokenizer.parameters())
    assert model.predictor.head.head.weight.grad.abs().sum() > 0


@configs
def test_code_loss_does_not_move_the_structure(config):
    model = make(config)
    model.predict(torch.rand(1, 3, 16, 16)).logits.square().mean().backward()
    regressor = getattr(model.predictor, "regressor", None)
    if model.tokenizer.structure.regressed:
        assert all(p.grad is None for p in regressor.parameters())
    assert next(model.predictor.trunk.parameters()).grad.abs().sum() > 0


@configs
def test_each_loss_is_the_sum_of_its_terms_and_trains_its_networks(config):
    objective = ReconstructionAwareLoss(pixel=F.l1_loss)
    tokenizer, predictor = TextureTokenizer(config), config.make_predictor()
    batch = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 16, 16)
    step = tokenizer_loss(tokenizer, *batch, objective)
    assert_close(step.loss, sum(step.terms.values()))
    step.loss.backward()
    assert all(p.grad is not None for p in tokenizer.parameters())
    tokenizer.zero_grad()
    model = SuperResolver(tokenizer, predictor)
    terms = predictor_losses(model, model.predict(batch[1]), *batch)
    assert set(terms) == ({"code", "structure"} if tokenizer.structure.regressed else {"code"})
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in predictor.parameters())
    kept = rap_loss(model, *batch, objective, code_weight=0.5)
    assert_close(kept.loss, sum(kept.terms.values()))
    assert_close(kept.loss, rap_loss(model, *batch, objective).loss + 0.5 * sum(terms.values()))
    assert all(p.grad is None for p in tokenizer.parameters())


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_a_regressed_structure_of_any_stride(stride):
    config = ConvolutionalConfig(structure="regressed", stride=stride, **LITTLE)
    model = make(config)
    hr, lr = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 16, 16)
    features = model.tokenizer.describe(hr, lr).features
    assert features.shape[-1] == 64 // stride
    assert model.predict(lr).features.shape == features.shape
    assert set(model.tokenizer(hr, lr).terms) == {"alignment", "small"}


@pytest.mark.parametrize("name", ["regressed", "paper"])
def test_alignment_pulls_the_encoder_and_not_the_target(name):
    tokenizer = TextureTokenizer(CONFIGS[name])
    _, _, terms = tokenizer(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 16, 16))
    terms["alignment"].backward()
    assert all(p.grad is None for p in tokenizer.structure.small_encoder.parameters())
    last = list(tokenizer.structure.encoder.parameters())[-1]
    assert last.grad.abs().sum() > 0


def test_a_side_is_mirrored_as_often_as_it_takes():
    row = torch.arange(3).expand(1, 1, 1, 3)
    assert reflect(row, 8).shape == (1, 1, 8, 8)
    assert reflect(row, 8)[0, 0, 5].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert reflect(row[..., :1], 4)[0, 0, 0].tolist() == [0, 0, 0, 0]
    assert reflect(row, 1) is row


@pytest.mark.parametrize("config", [*PRESETS.values(), *CONFIGS.values()])
def test_configurations_survive_as_text(config):
    assert config_from_json(config_to_json(config)) == config


def test_a_configuration_without_architecture_is_convolutional():
    assert config_from_json('{"width": 32}') == ConvolutionalConfig(width=32)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_stay_within_their_size(name):
    model = make(PRESETS[name])
    limit = {"tiny": 4_000_000, "small": 8_000_000, "paper": 75_009_110}[name]
    assert sum(p.numel() for p in model.parameters()) <= limit
