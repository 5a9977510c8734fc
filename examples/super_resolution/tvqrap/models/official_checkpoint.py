"""Converts the checkpoints that the authors of TVQ&RAP published to models, and back.

A missing, unknown or wrongly shaped parameter is an error.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvqrap.cli import UserError, describe
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.models.paper import WINDOW, PaperConfig, Skip
from vqprior.nn import ResidualBlock, SwinLayer, Upsample

# Our list of layers, the official one, and the number of its first layer there.
TOKENIZER_LAYERS = (
    ("texture.network", "encoder.blocks", 0),
    ("structure.encoder", "encoder.blocks", 13),
    ("structure.expander", "generator.blocks_1", 0),
    ("quantizer.fuse.network", "generator.blocks_2", 0),
    ("decoder.network", "generator.blocks_3", 0),
    ("structure.small_encoder", "lq_encoder.blocks", 0),
    ("structure.small_decoder", "lq_generator.blocks", 0),
)
PREDICTOR_LAYERS = (
    ("trunk.network", "lqencoder.blocks", 0),
    ("regressor.0", "lqencoder.blocks", 10),
    ("regressor.1", "exactor.blocks", 0),
    ("gather.0", "blocks_fuse", 0),
)
DEFAULT_CONFIG = PaperConfig()  # of the published checkpoints
CODEBOOK = "quantize.embedding.weight"
# Swin layers of the release store masks for maps of 32 x 32, except these: 16 x 16.
SMALLER_MAPS = ("encoder.blocks.15", "generator.blocks_1.8", "generator.blocks_1.10")


class Entry(NamedTuple):
    """A tensor of the release, and ours in its place."""

    name: str
    tensor: Tensor  # a view of ours in the official shape
    is_constant: bool  # follows from the architecture: checked, not loaded


def tokenizer_from_official(
    state_dict: Mapping[str, Tensor], config: PaperConfig | None = None
) -> TextureTokenizer:
    """Builds the tokenizer of an official stage-1 checkpoint.

    Args:
        state_dict: Tensors by official name; 699 for the published checkpoint.
        config: Sizes; by default those of the paper.

    Returns:
        The tokenizer in evaluation mode, on the CPU; its tensors are copies.

    Raises:
        ValueError: If a tensor is missing, unknown or wrongly shaped, or a constant has another
            value; the message names it.
    """
    tokenizer = TextureTokenizer(config or DEFAULT_CONFIG)
    _fill(dict(_tokenizer_entries(tokenizer)), state_dict)
    return tokenizer.eval()


def super_resolver_from_official(
    state_dict: Mapping[str, Tensor], config: PaperConfig | None = None
) -> SuperResolver:
    """Builds the super-resolver of an official stage-2 or stage-3 checkpoint.

    Args:
        state_dict: Tensors by official name; 1296 for the published checkpoints.
        config: Sizes; by default those of the paper.

    Returns:
        The super-resolver in evaluation mode, on the CPU; its tensors are copies.

    Raises:
        ValueError: As ``tokenizer_from_official``.
    """
    config = config or DEFAULT_CONFIG
    model = SuperResolver(TextureTokenizer(config), config.make_predictor())
    _fill(dict(_model_entries(model)), state_dict)
    return model.eval()


def tokenizer_to_official(tokenizer: TextureTokenizer) -> dict[str, Tensor]:
    """The inverse of ``tokenizer_from_official``, with the release's constant buffers."""
    return _export(_tokenizer_entries(tokenizer))


def super_resolver_to_official(model: SuperResolver) -> dict[str, Tensor]:
    """The inverse of ``super_resolver_from_official``, with the release's constant buffers."""
    return _export(_model_entries(model))


def load_official(path: Path) -> SuperResolver | TextureTokenizer:
    """Reads a checkpoint of any stage; executes nothing.

    Raises:
        UserError: As ``read_official``, and if the tensors are those of another architecture; the
            message names the file and a tensor.
    """
    return model_from_official(path, read_official(path))


def model_from_official(
    path: Path, state_dict: Mapping[str, Tensor]
) -> SuperResolver | TextureTokenizer:
    """Builds the model of the tensors of a file: a super-resolver or a tokenizer.

    Raises:
        UserError: If the tensors are those of another architecture.
    """
    is_super_resolver = any(name.startswith("lqencoder.") for name in state_dict)
    build = super_resolver_from_official if is_super_resolver else tokenizer_from_official
    try:
        return build(state_dict)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_official(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint, the averaged ones if present; executes nothing.

    Raises:
        UserError: If the file is missing, damaged, or holds anything but tensors by name.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        # The first line names what was found; the rest advises to trust the file.
        reason = str(error).partition("Please file")[0].splitlines()[-1].strip()
        raise UserError(
            f"{path}: expected tensors alone, found something else, which was not executed "
            f"({reason})"
        ) from None
    except Exception as error:  # torch raises many kinds for a file that is damaged
        reason = describe(error).partition(". ")[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    if isinstance(content, dict):
        content = content.get("params_ema", content.get("params", content))
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected tensors by name, found {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: `{name}` must be a tensor, found {type(value).__name__}")
    return content


def _model_entries(model: SuperResolver) -> Iterator[tuple[str, Entry]]:
    yield from _tokenizer_entries(model.tokenizer)
    yield from _listed_entries(model.predictor, PREDICTOR_LAYERS)
    yield from layer_entries(model.predictor.gather[1], "ft_layers_low", grid=32)
    for number, ours in enumerate((model.predictor.head.norm, model.predictor.head.head)):
        yield from _plain_entries(ours, f"idx_pred_layer_low.{number}")


def _tokenizer_entries(tokenizer: TextureTokenizer) -> Iterator[tuple[str, Entry]]:
    yield from _listed_entries(tokenizer, TOKENIZER_LAYERS)
    yield CODEBOOK, Entry(CODEBOOK, tokenizer.codes, is_constant=False)


def _listed_entries(
    module: nn.Module, table: tuple[tuple[str, str, int], ...]
) -> Iterator[tuple[str, Entry]]:
    for ours, theirs, first in table:
        for number, layer in enumerate(module.get_submodule(ours), start=first):
            name = f"{theirs}.{number}"
            yield from layer_entries(layer, name, grid=16 if name in SMALLER_MAPS else 32)


def layer_entries(layer: nn.Module, name: str, *, grid: int) -> Iterator[tuple[str, Entry]]:
    """Yields the tensors of one layer by official name.

    Args:
        layer: A layer of paper.py.
        name: Prefix of the official names.
        grid: Side of the maps for which the release stores masks.
    """
    if isinstance(layer, ResidualBlock):
        for ours in ("norm1", "conv1", "norm2", "conv2", "skip"):
            theirs = "conv_out" if ours == "skip" else ours
            yield from _plain_entries(layer.get_submodule(ours), f"{name}.{theirs}")
    elif isinstance(layer, Upsample):
        yield from _plain_entries(layer.conv, f"{name}.conv")
    elif isinstance(layer, nn.Sequential) and isinstance(layer[0], Skip):
        for number, group in enumerate(layer):
            yield from _group_entries(group, f"{name}.swin_blks.{number}", grid)
    elif isinstance(layer, nn.Sequential):  # `down`
        yield from _plain_entries(layer[0], f"{name}.conv")
    else:
        yield from _plain_entries(layer, name)


def _group_entries(group: Skip, name: str, grid: int) -> Iterator[tuple[str, Entry]]:
    for number, layer in enumerate(group.body):
        if isinstance(layer, SwinLayer):
            yield from _swin_entries(layer, f"{name}.residual_group.blocks.{number}", grid)
        else:
            yield from _plain_entries(layer, f"{name}.conv")


def _swin_entries(layer: SwinLayer, name: str, grid: int) -> Iterator[tuple[str, Entry]]:
    if layer.shift:
        yield _constant(f"{name}.attn_mask", shift_mask(grid, layer.window_size, layer.shift))
    yield from _plain_entries(layer.norm1, f"{name}.norm1")
    table = f"{name}.attn.relative_position_bias_table"
    yield table, Entry(table, layer.relative_bias.t(), is_constant=False)
    yield _constant(f"{name}.attn.relative_position_index", layer.relative_index)
    for ours, theirs in (
        (layer.qkv, "attn.qkv"),
        (layer.proj, "attn.proj"),
        (layer.norm2, "norm2"),
        (layer.mlp[0], "mlp.fc1"),
        (layer.mlp[2], "mlp.fc2"),
    ):
        yield from _plain_entries(ours, f"{name}.{theirs}")


def _plain_entries(layer: nn.Module, name: str) -> Iterator[tuple[str, Entry]]:
    for own, parameter in layer.named_parameters(recurse=False):
        yield f"{name}.{own}", Entry(f"{name}.{own}", parameter, is_constant=False)


def _constant(name: str, value: Tensor) -> tuple[str, Entry]:
    return name, Entry(name, value, is_constant=True)


def shift_mask(grid: int, window: int = WINDOW, shift: int = WINDOW // 2) -> Tensor:
    """Returns the mask that the release stores for maps of ``grid`` x ``grid``: 0, or -100 to hide.

    After a roll by ``shift``, positions that were not neighbors share windows; the mask separates
    them. ``SwinLayer`` needs no mask, but the authors' code loads it.

    Returns:
        ``(windows, window**2, window**2)``, float32.
    """
    edges = torch.tensor([grid - window, grid - shift])
    label = torch.bucketize(torch.arange(grid), edges, right=True)
    labels = (3 * label[:, None] + label).unfold(0, window, window).unfold(1, window, window)
    labels = labels.reshape(-1, window * window)
    return torch.where(labels[:, None] == labels[:, :, None], 0.0, -100.0)


@torch.no_grad()
def _fill(entries: dict[str, Entry], state_dict: Mapping[str, Tensor]) -> None:
    """Checks all tensors before it loads the first."""
    _check_names(entries.keys(), state_dict.keys())
    for name, entry in entries.items():
        found = state_dict[name]
        if found.shape != entry.tensor.shape:
            raise ValueError(
                f"`{name}` must have shape {tuple(entry.tensor.shape)}, got {tuple(found.shape)}. "
                "The checkpoint is of another architecture or size."
            )
        if entry.is_constant and not torch.equal(found.to(entry.tensor.dtype), entry.tensor):
            raise ValueError(
                f"`{name}` must have the values that follow from the architecture, got others. "
                "The checkpoint is of another architecture."
            )
        if not entry.is_constant and not found.is_floating_point():
            raise ValueError(f"`{name}` must be floating point, got {found.dtype}.")
    for name, entry in entries.items():
        if not entry.is_constant:
            entry.tensor.copy_(state_dict[name])


def _check_names(expected: Mapping.keys, found: Mapping.keys) -> None:
    problems = [
        f"{len(names)} {kind} ({_listed(names)})"
        for kind, names in (
            ("missing", [name for name in expected if name not in found]),
            ("unknown", [name for name in found if name not in expected]),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"`state_dict` must have the {len(expected)} tensors of this architecture, got "
            f"{len(found)}: {' and '.join(problems)}."
        )


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _export(entries: Iterator[tuple[str, Entry]]) -> dict[str, Tensor]:
    return {name: entry.tensor.detach().clone().contiguous() for name, entry in entries}
