"""Reads the checkpoints that the authors of TVQ&RAP published, and writes such checkpoints.

    python official.py tvqrap_sr_stage3_model.pth paper.safetensors
    python official.py runs/mine/rap.safetensors back.pth

The first makes weights for upscale.py, evaluate.py and train.py; the second turns weights of the
preset ``paper`` back into a checkpoint that the authors' code loads. The direction is that of the
suffix. Every parameter must be there, have the right shape, and be known.
"""

import argparse
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from cli import UserError, atomic_write, describe, ensure_writable_folder, run
from model import SuperResolver, TextureTokenizer
from paper import WINDOW, Around, PaperConfig
from torch import Tensor, nn
from weights import load_model, save_model

from vqprior.nn import ResidualBlock, SwinLayer, Upsample

# Our list of layers, theirs, and the number that their first one has.
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
DEFAULT_CONFIG = PaperConfig()  # of what is published
CODEBOOK = "quantize.embedding.weight"
# Of a super-resolver's checkpoint, what it takes to encode originals, and not to enlarge.
NOT_FOR_INFERENCE = ("encoder.", "generator.blocks_2.", "lq_encoder.", "lq_generator.")
# Swin layers of the release store masks for one size of the map: 32 x 32, but 16 x 16 here.
SMALLER_MAPS = ("encoder.blocks.15", "generator.blocks_1.8", "generator.blocks_1.10")


class Entry(NamedTuple):
    """A tensor of the release, and ours for it."""

    name: str
    tensor: Tensor  # a view of ours in the shape of theirs
    is_constant: bool  # follows from the architecture: checked, not loaded


def tokenizer_from_official(
    state_dict: Mapping[str, Tensor], config: PaperConfig | None = None
) -> TextureTokenizer:
    """Builds the tokenizer of an official stage-1 checkpoint.

    Args:
        state_dict: The tensors by their official names; 699 for the published checkpoint.
        config: The sizes; by default those of the paper.

    Returns:
        The tokenizer in evaluation mode, on the CPU; its tensors are copies.

    Raises:
        ValueError: If a tensor is missing, unknown, or has another shape, or a constant another
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
        state_dict: The tensors by their official names; 1296 for the published checkpoints.
        config: The sizes; by default those of the paper.

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


def read_official(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint, averaged ones if it has them; executes nothing.

    Raises:
        UserError: If the file is missing, damaged, or holds anything but tensors by name.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        # The first line says what was found; the rest advises to trust the file.
        reason = str(error).partition("Please file")[0].splitlines()[-1].strip()
        raise UserError(
            f"{path}: expected tensors alone, found something else, which was not executed "
            f"({reason})"
        ) from None
    except Exception as error:  # torch raises many kinds for a file that is damaged
        raise UserError(f"{path}: not a readable checkpoint ({describe(error)})") from None
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
    """The tensors of one layer of the release, which has that name there.

    Args:
        layer: One that paper.py builds with.
        name: What official names start with.
        grid: Side of the maps for which the release stores masks.
    """
    if isinstance(layer, ResidualBlock):
        for ours in ("norm1", "conv1", "norm2", "conv2", "skip"):
            theirs = "conv_out" if ours == "skip" else ours
            yield from _plain_entries(layer.get_submodule(ours), f"{name}.{theirs}")
    elif isinstance(layer, Upsample):
        yield from _plain_entries(layer.conv, f"{name}.conv")
    elif isinstance(layer, nn.Sequential) and isinstance(layer[0], Around):
        for number, group in enumerate(layer):
            yield from _group_entries(group, f"{name}.swin_blks.{number}", grid)
    elif isinstance(layer, nn.Sequential):  # `down`
        yield from _plain_entries(layer[0], f"{name}.conv")
    else:
        yield from _plain_entries(layer, name)


def _group_entries(group: Around, name: str, grid: int) -> Iterator[tuple[str, Entry]]:
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
    """The mask that the release stores for maps of ``grid`` x ``grid``: 0, or -100 to hide.

    After a roll by ``shift``, positions that were not neighbors share windows; this keeps them
    apart. ``SwinLayer`` needs no mask; others may want to load what we write.

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
    """Checks everything first, so that nothing is half-loaded."""
    _check_names(entries.keys(), state_dict.keys())
    for name, entry in entries.items():
        found = state_dict[name]
        if found.shape != entry.tensor.shape:
            raise ValueError(
                f"`{name}` must have shape {tuple(entry.tensor.shape)}, got {tuple(found.shape)}. "
                "It belongs to another architecture or size."
            )
        if entry.is_constant and not torch.equal(found.to(entry.tensor.dtype), entry.tensor):
            raise ValueError(
                f"`{name}` must have the values that follow from the architecture, got others. "
                "It belongs to another architecture."
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


def convert(source: Path, target: Path) -> str:
    """Converts in the direction of the suffixes; returns what to tell the user.

    Raises:
        UserError: If a file cannot be read or written, or is not what its suffix says.
    """
    suffixes = source.suffix, target.suffix
    if suffixes == (".pth", ".safetensors"):
        return _from_release(source, target)
    if suffixes == (".safetensors", ".pth"):
        return _to_release(source, target)
    raise UserError(
        f"{source} to {target}: expected a .pth and a .safetensors file, in either order"
    )


def _from_release(source: Path, target: Path) -> str:
    state_dict = read_official(source)
    is_super_resolver = any(name.startswith("lqencoder.") for name in state_dict)
    build = super_resolver_from_official if is_super_resolver else tokenizer_from_official
    try:
        model = build(state_dict)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    save_model(target, model, {"source": source.name})
    if not is_super_resolver:
        return f"{target}: the tokenizer, {len(state_dict)} tensors; train.py goes on from it"
    unused = [name for name in state_dict if name.startswith(NOT_FOR_INFERENCE)]
    recomputed = [name for name in state_dict if name.endswith(("attn_mask", "position_index"))]
    names = "\n".join(f"  {name}" for name in unused)
    return (
        f"not used to enlarge, but kept:\n{names}\n{target}: the super-resolver, all of "
        f"{len(state_dict)} tensors; {len(unused)} of them, listed above, are not used to enlarge, "
        f"and {len(recomputed)} masks and tables are recomputed"
    )


def _to_release(source: Path, target: Path) -> str:
    model = load_model(source)
    if not isinstance(model.config, PaperConfig):  # of any size
        raise UserError(f"{source}: not of the preset `paper`, which is all that the release knows")
    to_official = (
        super_resolver_to_official if isinstance(model, SuperResolver) else tokenizer_to_official
    )
    state_dict = to_official(model)
    with atomic_write(target) as file:
        torch.save({"params": state_dict, "params_ema": state_dict}, file)
    return f"{target}: {len(state_dict)} tensors under `params` and `params_ema`"


def main(arguments: list[str] | None = None) -> None:
    """Converts one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a .pth or .safetensors file")
    parser.add_argument("target", type=Path, help="the other kind; replaced if it exists")
    options = parser.parse_args(arguments)
    ensure_writable_folder(options.target.parent)
    print(convert(options.source, options.target))


if __name__ == "__main__":
    sys.exit(run(main))
