"""Stores weights in half precision, which halves the file.

    python to_float16.py runs/mine/rap.safetensors small.safetensors

All scripts load them unchanged; measure the rounding error with evaluate.py. --texture X stores the
share of the predicted texture that upscale.py and evaluate.py add by default.
"""

import argparse
import sys
from pathlib import Path

import torch

from tvqrap.cli import UserError, ensure_writable_folder, run, share
from tvqrap.models.assembly import SuperResolver
from tvqrap.models.weights import load_model, read_notes, save_model


def convert(source: Path, target: Path, texture_strength: float | None = None) -> str:
    """Writes the model in ``source`` to ``target`` in float16; returns a summary for the user.

    Raises:
        UserError: If a file cannot be read or written, or a weight is too large for float16.
    """
    notes = read_notes(source)
    model = load_model(source)
    if texture_strength is not None:
        if not isinstance(model, SuperResolver):
            raise UserError(f"{source}: holds a tokenizer alone, which predicts no texture")
        model.texture_strength = texture_strength
    largest = max(float(value.abs().max()) for value in model.state_dict().values())
    if not largest <= torch.finfo(torch.float16).max:
        raise UserError(f"{source}: has a weight of {largest:g}, which float16 cannot hold")
    save_model(target, model, notes, dtype=torch.float16)
    before, after = (path.stat().st_size / 1e6 for path in (source, target))
    return f"{target}: {after:.1f} MB, from {before:.1f} MB"


def main(arguments: list[str] | None = None) -> None:
    """Converts one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help=".safetensors file written by train.py")
    parser.add_argument("target", type=Path, help="file to write; replaced if it exists")
    parser.add_argument(
        "--texture",
        type=share,
        metavar="X",
        help="default share of the predicted texture, from 0 to 1 (default: that of source)",
    )
    options = parser.parse_args(arguments)
    ensure_writable_folder(options.target.parent)
    print(convert(options.source, options.target, options.texture))


if __name__ == "__main__":
    sys.exit(run(main))
