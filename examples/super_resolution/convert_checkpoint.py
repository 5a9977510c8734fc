"""Converts checkpoints of the authors of TVQ&RAP to weights of this example, and back.

    python convert_checkpoint.py tvqrap_sr_stage3_model.pth paper.safetensors
    python convert_checkpoint.py runs/mine/rap.safetensors back.pth

The first command writes weights for upscale.py, evaluate.py and train.py, which also read the .pth
file; the second writes a checkpoint that the authors' code loads, from weights of the preset paper.
The suffixes give the direction. A missing, unknown or wrongly shaped parameter is an error.
"""

import argparse
import sys
from pathlib import Path

import torch

from tvqrap.cli import UserError, atomic_write, ensure_writable_folder, run
from tvqrap.models.assembly import SuperResolver
from tvqrap.models.official_checkpoint import (
    model_from_official,
    read_official,
    super_resolver_from_official,
    super_resolver_to_official,
    tokenizer_from_official,
    tokenizer_to_official,
)
from tvqrap.models.paper import PaperConfig
from tvqrap.models.weights import load_model, save_model

__all__ = [
    "super_resolver_from_official",
    "super_resolver_to_official",
    "tokenizer_from_official",
    "tokenizer_to_official",
]
# Parameters of a super-resolver's checkpoint that encode originals and are not used to upscale.
NOT_FOR_INFERENCE = ("encoder.", "generator.blocks_2.", "lq_encoder.", "lq_generator.")


def convert(source: Path, target: Path) -> str:
    """Converts in the direction of the suffixes; returns a summary for the user.

    Raises:
        UserError: If a file cannot be read or written, or does not match its suffix.
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
    model = model_from_official(source, state_dict)
    save_model(target, model, {"source": source.name})
    if not isinstance(model, SuperResolver):
        return f"{target}: the tokenizer, {len(state_dict)} tensors; train.py continues from it"
    unused = [name for name in state_dict if name.startswith(NOT_FOR_INFERENCE)]
    recomputed = [name for name in state_dict if name.endswith(("attn_mask", "position_index"))]
    names = "\n".join(f"  {name}" for name in unused)
    return (
        f"not used to upscale, but kept:\n{names}\n{target}: the super-resolver, all of "
        f"{len(state_dict)} tensors; {len(unused)} of them, listed above, are not used to upscale, "
        f"and {len(recomputed)} masks and tables are recomputed"
    )


def _to_release(source: Path, target: Path) -> str:
    model = load_model(source)
    if not isinstance(model.config, PaperConfig):  # of any size
        raise UserError(f"{source}: not of the preset `paper`, the only one of the release")
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
    parser.add_argument("source", type=Path, help=".pth or .safetensors file to read")
    parser.add_argument(
        "target", type=Path, help="file of the other kind to write; replaced if it exists"
    )
    options = parser.parse_args(arguments)
    ensure_writable_folder(options.target.parent)
    print(convert(options.source, options.target))


if __name__ == "__main__":
    sys.exit(run(main))
