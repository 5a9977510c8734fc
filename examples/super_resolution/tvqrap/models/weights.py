"""Model files: safetensors with the configuration in the header; reading executes nothing."""

import re
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tvqrap.cli import UserError, atomic_write
from tvqrap.models.assembly import Architecture, SuperResolver, TextureTokenizer
from tvqrap.models.official_checkpoint import load_official
from tvqrap.models.presets import config_from_json, config_to_json

DEFAULT_WEIGHTS = Path(__file__).parents[2] / "weights" / "small.safetensors"
FORMAT = "vqprior-super-resolution-1"


def save_model(
    path: Path,
    model: SuperResolver | TextureTokenizer,
    notes: dict[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a tokenizer, or a super-resolver with its tokenizer, atomically.

    Args:
        path: The file.
        model: What to save.
        notes: Short texts for the header, such as the stage and the number of steps.
        dtype: Dtype of the weights in the file; models are read back in float32.
    """
    parts: dict[str, nn.Module] = {"tokenizer": model}
    if isinstance(model, SuperResolver):
        parts = {"tokenizer": model.tokenizer}
        if model.predictor is not None:
            parts["predictor"] = model.predictor
    tensors = {
        f"{part}.{name}": _stored(value.detach().cpu(), dtype)
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    header = {**notes, "format": FORMAT, "config": config_to_json(model.config)}
    if isinstance(model, SuperResolver):
        header["texture"] = str(model.texture_strength)
    with atomic_write(path) as file:
        file.write(save(tensors, metadata=header))


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value.to(dtype) if value.is_floating_point() else value).contiguous()


def read_notes(path: Path) -> dict[str, str]:
    """Returns the header of a model file, checked to be one of ours.

    Raises:
        UserError: If the file is missing, unreadable, or not a model of this example.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such weights; expected a .safetensors file written by train.py"
        ) from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path}: expected weights of format {FORMAT}, found "
            f"{header.get('format', 'a safetensors file of another program')}"
        )
    return header


def load_model(path: Path) -> SuperResolver | TextureTokenizer:
    """Reads the model in a file: a super-resolver, or a tokenizer alone.

    A ``.pth`` file is read as a checkpoint of the paper's authors.

    Raises:
        UserError: As ``read_notes``, and if the tensors do not fit the configuration.
    """
    if path.suffix == ".pth":
        return load_official(path)
    config, tensors, texture_strength = _read(path)
    tokenizer = TextureTokenizer(config)
    _fill(path, tokenizer, tensors, "tokenizer.")
    if not any(name.startswith("predictor.") for name in tensors):
        return tokenizer.eval()
    predictor = config.make_predictor()
    _fill(path, predictor, tensors, "predictor.")
    model = SuperResolver(tokenizer, predictor).eval()
    model.texture_strength = texture_strength
    return model


def load_tokenizer(path: Path) -> TextureTokenizer:
    """Reads the tokenizer of a model file.

    Raises:
        UserError: As ``load_model``.
    """
    model = load_model(path)
    return model.tokenizer if isinstance(model, SuperResolver) else model


def load_super_resolver(path: Path) -> SuperResolver:
    """Reads a super-resolver; a tokenizer alone becomes one without texture.

    Raises:
        UserError: As ``load_model``, and if the tokenizer alone cannot upscale.
    """
    model = load_model(path)
    if isinstance(model, SuperResolver):
        return model
    try:
        return SuperResolver(model, None).eval()
    except ValueError:
        raise UserError(
            f"{path}: holds a tokenizer alone, whose structure a predictor must regress; train "
            "--stage predictor"
        ) from None


def _read(path: Path) -> tuple[Architecture, dict[str, Tensor], float]:
    header = read_notes(path)
    try:
        config = config_from_json(header["config"])
        texture_strength = float(header.get("texture", "1"))  # absent in the first files
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the header holds an invalid configuration ({error})") from None
    tensors = {_named(name): value.float() for name, value in load_file(str(path)).items()}
    return config, tensors, texture_strength


def _named(name: str) -> str:
    """Renames the codebook's parameter of vqprior 0.1, ``codes``, to ``weight``."""
    return re.sub(r"\bcodebook\.codes$", "codebook.weight", name)


def _fill(path: Path, module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: tensors do not fit their configuration: {detail}") from None
