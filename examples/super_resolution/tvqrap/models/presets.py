"""The presets, and their configurations as JSON."""

import dataclasses
import json

from tvqrap.models.assembly import Architecture
from tvqrap.models.convolutional import ConvolutionalConfig
from tvqrap.models.paper import PaperConfig

PRESETS: dict[str, Architecture] = {
    # Trains in about an hour on one CPU thread.
    "tiny": ConvolutionalConfig(),
    # The included weights: small.safetensors took two hours on one CPU thread in bfloat16.
    "small": ConvolutionalConfig(
        width=72,
        codebook_size=1024,
        structure_blocks=5,
        texture_blocks=4,
        decoder_blocks=10,
        predictor_width=88,
        predictor_blocks=12,
        head_blocks=3,
    ),
    # The authors' model, for their weights (convert_checkpoint.py) or days on several GPUs.
    "paper": PaperConfig(),
}
ARCHITECTURES = {"convolutional": ConvolutionalConfig, "paper": PaperConfig}


def config_to_json(config: Architecture) -> str:
    """Returns a configuration as JSON, with the name of its architecture."""
    (name,) = (name for name, kind in ARCHITECTURES.items() if type(config) is kind)
    return json.dumps({"architecture": name, **dataclasses.asdict(config)})


def config_from_json(text: str) -> Architecture:
    """Reads a configuration; one without a name, from earlier versions, is convolutional.

    Raises:
        KeyError: If the architecture is not known.
        TypeError: If a setting is not known.
        ValueError: If ``text`` is not JSON.
    """
    settings = json.loads(text)
    return ARCHITECTURES[settings.pop("architecture", "convolutional")](**settings)
