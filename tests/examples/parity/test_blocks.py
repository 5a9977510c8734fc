"""Single layers, where a wrong epsilon or index shows at once."""

import pytest
import torch
from torch.testing import assert_close

from tests.examples.parity import filling
from tests.examples.parity.comparing import GRADIENT, assert_near, assert_near_its_size
from tvqrap.models.official_checkpoint import layer_entries, shift_mask
from tvqrap.models.paper import attention, convolved_attention, down
from vqprior.nn import ResidualBlock, Upsample, group_norm

ROUNDING = 1e-5  # of the largest value; noise is 3e-7
# A layer, its channels, and what the stored result leaves out.
LAYERS = {
    "res_32_32": (lambda: ResidualBlock(32), 32, lambda layer, x: layer.skip(x)),
    "res_32_64": (lambda: ResidualBlock(32, 64), 32, lambda layer, x: layer.skip(x)),
    "res_64_32": (lambda: ResidualBlock(64, 32), 64, lambda layer, x: layer.skip(x)),
    "down_nobias": (lambda: down(32), 32, lambda layer, x: 0),
    "down_bias": (lambda: down(32, bias=True), 32, lambda layer, x: 0),
    "up": (lambda: Upsample(32), 32, lambda layer, x: 0),
    "norm": (lambda: group_norm(64), 64, lambda layer, x: 0),
    "swin_ar": (lambda: attention(64, depth=2), 64, lambda layer, x: 2 * x),
    "swin_rstb": (lambda: convolved_attention(64, depth=2), 64, lambda layer, x: x),
}


@torch.no_grad()
def fill(layer, prefix, drop=""):
    """Gives a layer the weights that its official names mean."""
    for _, entry in layer_entries(layer, "", grid=16):
        name = prefix + entry.name.removeprefix(".").replace(drop, "")
        if not entry.is_constant:
            entry.tensor.copy_(torch.from_numpy(filling.weight(name, entry.tensor.shape)))
    return layer


# Inputs of an amplitude at which the epsilon of a normalization is not small.
@pytest.mark.parametrize(("suffix", "amplitude"), [("", 1.0), ("_tiny", 1e-3)])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, suffix, amplitude, stored):
    layer = fill(LAYERS[name][0](), f"blocks_{name}.")
    check_layer(layer, name, amplitude, stored("blocks")[name + suffix])


def check_layer(layer, name, amplitude, expected):
    _, channels, shortcut = LAYERS[name]
    x = amplitude * torch.from_numpy(filling.noise(f"blocks/{channels}", 1, channels, 8, 16))
    with torch.no_grad():
        result = layer(x) - shortcut(layer, x)
    assert_near_its_size(result, expected, ROUNDING)


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (8, 8)])
@pytest.mark.parametrize(("name", "make"), [("rstb", convolved_attention), ("rstb_ar", attention)])
def test_group_of_swin_layers(name, make, size, stored):
    group = fill(make(64, depth=2), f"swin_{name}.", drop="swin_blks.0.")
    height, width = size
    key = f"{name}_{height}x{width}"
    noise = filling.noise(f"swin/{height}x{width}", 1, height * width, 64)
    tokens = torch.from_numpy(noise).requires_grad_()
    result = group(tokens.mT.reshape(1, 64, height, width)).flatten(2).mT
    assert_near_its_size(result.detach(), stored("swin")[key], ROUNDING)
    if size == (8, 24):
        result.square().mean().backward()
        assert_near_its_size(tokens.grad, stored("swin")[f"{key}_grad_x"], GRADIENT)


def test_masks_and_index_table(stored):
    for name in ("rstb_attn_mask_16x16", "rstb_ar_attn_mask_16x16"):
        assert_near(shift_mask(16), stored("swin")[name].float(), 0)
    (layer,) = attention(64, depth=1)[0].body
    table = stored("swin")["relative_position_index"].long()
    assert_close(layer.relative_index.reshape(table.shape), table, rtol=0, atol=0)


def test_discriminator_in_evaluation(discriminator, stored):
    expected = stored("disc")
    discriminator.eval()
    with torch.no_grad():
        for name, shape in (("a", (2, 3, 64, 64)), ("big", (1, 3, 128, 96))):
            image = torch.from_numpy(filling.image(f"disc/{name}", *shape))
            assert_near(discriminator(image), expected[f"eval_{name}"], ROUNDING)


def test_discriminator_in_training(discriminator, stored):
    expected = stored("disc")
    discriminator.train()
    for name in ("a", "b"):
        image = torch.from_numpy(filling.image(f"disc/{name}", 2, 3, 64, 64))
        logits = discriminator(image)
        assert_near(logits.detach(), expected[f"train_{name}"], ROUNDING)
    for number in (3, 6):
        norm = discriminator.layers[number]
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            assert_near(
                getattr(norm, statistic), expected[f"after__main.{number}.{statistic}"], ROUNDING
            )
