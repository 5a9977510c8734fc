"""The authors' models with the weights of the fixtures, loaded by the reader that users have."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.examples.parity import filling
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.models.official_checkpoint import (
    super_resolver_from_official,
    super_resolver_to_official,
    tokenizer_from_official,
    tokenizer_to_official,
)
from tvqrap.models.paper import PaperConfig
from vqprior.nn import PatchDiscriminator

FIXTURES = Path(__file__).parents[2] / "fixtures" / "parity"


class Fixture:
    """The arrays of one file as tensors, by name."""

    def __init__(self, name):
        with np.load(FIXTURES / f"{name}.npz") as arrays:
            self.arrays = dict(arrays)

    def __getitem__(self, name):
        return torch.from_numpy(self.arrays[name])

    def log(self):
        return json.loads(bytes(self.arrays["log"]).decode())


@pytest.fixture(scope="session")
def stored():
    """Reads a fixture file."""
    return Fixture


@pytest.fixture(scope="session")
def parameter_names():
    """Official names of all parameters, in the order of the stored gradient norms."""
    return json.loads((FIXTURES / "param_names.json").read_text())


def filled(state_dict):
    """The same names with the values of the fixtures; constants stay as they are."""
    values = {name: filling.weight(name, value.shape) for name, value in state_dict.items()}
    return {
        name: state_dict[name] if value is None else torch.from_numpy(value)
        for name, value in values.items()
    }


@pytest.fixture(scope="session")
def tokenizer_state():
    return filled(tokenizer_to_official(TextureTokenizer(PaperConfig())))


@pytest.fixture(scope="session")
def model_state():
    config = PaperConfig()
    model = SuperResolver(TextureTokenizer(config), config.make_predictor())
    return filled(super_resolver_to_official(model))


@pytest.fixture
def tokenizer(tokenizer_state):
    return tokenizer_from_official(tokenizer_state)


@pytest.fixture
def model(model_state):
    return super_resolver_from_official(model_state)


@pytest.fixture
def discriminator():
    """The patch discriminator; layers have the numbers that they have in the release."""
    judge = PatchDiscriminator(num_layers=2)
    names = {name.replace("layers.", "main."): value for name, value in judge.state_dict().items()}
    judge.load_state_dict(
        {name.replace("main.", "layers."): value for name, value in filled(names).items()}
    )
    return judge
