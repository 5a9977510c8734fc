"""One wrong layer among hundreds must not go unnoticed: each mistake here makes a test fail."""

import pytest
import torch

from tests.examples.parity.test_blocks import LAYERS, check_layer, fill
from tests.examples.parity.test_super_resolver import check_prediction_and_image


def forget_the_mask(model):
    """Windows that were rolled over the border attend to what is not there."""
    layer = model.predictor.gather[1][0].body[1]
    assert layer.shift
    layer._attend = layer._attend_masked
    layer._same_region = lambda height, width, device: torch.ones(
        (height // 8) * (width // 8), 64, 64, dtype=torch.bool, device=device
    )


def forget_the_shift(model):
    model.tokenizer.decoder.network[3][0].body[1].shift = 0


def shift_the_other_way(model):
    # By 4 of 8 both ways are one, so this is another amount.
    model.predictor.trunk.network[7][1].body[3].shift = 3


def transpose_the_positions(model):
    layer = model.tokenizer.structure.expander[8][0].body[0]
    table = layer.relative_bias.unflatten(1, (15, 15))
    layer.relative_bias.data = table.flip(1, 2).flatten(1)


def forget_the_second_skip(model):
    group = model.predictor.gather[1][1]
    group.forward = lambda x: group.body(x)


def bend_the_activation(model):
    model.predictor.gather[0][1][0].body[0].mlp[1].approximate = "tanh"


MISTAKES = [
    forget_the_mask,
    forget_the_shift,
    shift_the_other_way,
    transpose_the_positions,
    forget_the_second_skip,
    bend_the_activation,
]


@pytest.mark.parametrize("plant", MISTAKES)
def test_a_mistake_in_one_layer_fails_the_model(plant, model, stored):
    plant(model)
    with pytest.raises(AssertionError, match="Tensor-likes are not"):
        check_prediction_and_image(model, 32, stored("sr_32"))


@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [("res_32_32", "norm1", 1e-5), ("swin_ar", "0.body.0.norm1", 1e-6)],
)
def test_a_wrong_epsilon_fails_the_layer(name, norm, eps, stored):
    layer = fill(LAYERS[name][0](), f"blocks_{name}.")
    expected = stored("blocks")[f"{name}_tiny"]
    check_layer(layer, name, 1e-3, expected)
    layer.get_submodule(norm).eps = eps
    with pytest.raises(AssertionError, match="Tensor-likes are not"):
        check_layer(layer, name, 1e-3, expected)
