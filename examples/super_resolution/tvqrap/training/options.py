"""The command line of train.py."""

import argparse
import dataclasses
from contextlib import suppress
from pathlib import Path

import torch

from tvqrap.cli import at_least
from tvqrap.degradations.pipeline import DEGRADATIONS
from tvqrap.models.convolutional import STRUCTURES
from tvqrap.models.presets import PRESETS
from tvqrap.training.recipes import RECIPES, STAGES, Recipe

# Options that replace a value of the recipe, and go by its name.
RECIPE_OPTIONS = (
    "batch", "crop", "learning_rate", "perceptual", "adversarial", "degradation", "code_weight",
)  # fmt: skip
# Options that say which training it is. Another learning rate, device, precision, number of
# workers, processes or parts continues the same training.
RUN_OPTIONS = ("stage", "preset", "structure", "seed", "estimator", "temperature")


def parse_options(description: str, arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", required=True, choices=STAGES)
    add("--photos", required=True, type=Path, metavar="PATH",
        help="photos to train on: a folder, searched with all folders in it, or a text file with "
        "one path a line, relative to the file")  # fmt: skip
    add("--out", required=True, type=Path, metavar="DIR", help="where everything goes")
    add("--val", type=Path, metavar="PATH",
        help="photos to report on; without it, crops of the training photos")  # fmt: skip
    add("--preset", default="tiny", choices=sorted(PRESETS), help="size of the model (tiny)")
    add("--structure", choices=sorted(STRUCTURES),
        help="where structure comes from (tiny and small only)")  # fmt: skip
    add("--init", type=Path, metavar="FILE",
        help="start from these weights, such as a converted checkpoint of the authors, instead of "
        "from what the stage before left in --out")  # fmt: skip
    add("--steps", type=at_least(1), metavar="N", help="stop after N steps in total")
    add("--minutes", type=positive, metavar="X", help="stop after X minutes in total")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    _add_recipe(parser.add_argument_group("replacing a value of the recipe"))
    _add_rap(parser.add_argument_group("for --stage rap"))
    _add_machine(parser.add_argument_group("for the machine"))
    options = parser.parse_args(arguments)
    if options.steps is None and options.minutes is None:
        parser.error("give --steps or --minutes")
    if options.crop is not None and options.crop % 32:
        parser.error(f"--crop must be a multiple of 32, got {options.crop}")
    if options.structure is not None and options.preset == "paper":
        parser.error("--structure: the preset paper has the paper's")
    return options


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Returns the recipe of the preset and the stage, with what the command line replaces."""
    given = {name: getattr(options, name) for name in RECIPE_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(RECIPES[options.preset][options.stage], **given)


def identify_run(options: argparse.Namespace, recipe: Recipe) -> dict:
    """Returns, by option, what a resumed training must have in common with itself."""
    run = {name: getattr(options, name) for name in RUN_OPTIONS}
    kept = (name for name in RECIPE_OPTIONS if name != "learning_rate")
    run |= {name: getattr(recipe, name) for name in kept}
    return {f"--{name.replace('_', '-')}": value for name, value in run.items()}


def positive(text: str) -> float:
    """An argument that measures something."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {value}")
    return value


def device(text: str) -> torch.device:
    """An argument that names a device that is there."""
    # Not found out by trying: that takes memory of the first GPU, for each process.
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.device_count()}
    with suppress(RuntimeError):  # no such kind of device
        found = torch.device(text)
        if (found.index or 0) < there.get(found.type, 0):
            return found
    raise argparse.ArgumentTypeError(f"this device is not here: {text}")


def weight(text: str) -> float:
    """An argument that weighs something."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--batch", type=at_least(1), metavar="N",
        help="crops in a step, of all processes together (16; paper 8, 32, 4)")  # fmt: skip
    add("--crop", type=at_least(32), metavar="N",
        help="side of a crop, a multiple of 32 (64; paper 512, 256, 512)")  # fmt: skip
    add("--learning-rate", type=positive, metavar="X",
        help="of Adam (4e-4, 4e-4, 1e-4; paper 4e-5, 1e-4, 4e-5)")  # fmt: skip
    add("--perceptual", type=weight, metavar="X",
        help="weight of the filter-bank loss (0.2; paper 1, where the authors have LPIPS)",
    )  # fmt: skip
    add("--adversarial", type=weight, metavar="X",
        help="weight of the adversarial loss (0; paper 0.75)")  # fmt: skip
    add("--degradation", choices=sorted(DEGRADATIONS),
        help="how low-resolution images are made (bicubic; predictor and rap of paper "
        "second-order)")  # fmt: skip


def _add_rap(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--estimator", default="straight_through",
        choices=("straight_through", "soft", "gumbel", "reinmax"),
        help="how the gradient passes the choice of codes (straight_through)")  # fmt: skip
    add("--temperature", type=positive, default=1.0, metavar="X", help="of the choice (1)")
    add("--code-weight", type=weight, metavar="X",
        help="weight of the code-level loss that is kept (0.01; paper 0)")  # fmt: skip


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu; under torchrun each process takes a GPU of its own")  # fmt: skip
    add("--precision", default="float32", choices=("float32", "bfloat16"),
        help="of the networks in training; weights stay float32 (float32)")  # fmt: skip
    add("--accumulate", type=at_least(1), default=1, metavar="N",
        help="compute a batch in N parts one after the other, to save memory (1)")  # fmt: skip
    add("--workers", type=at_least(0), metavar="N",
        help="processes that read photos, for each that trains (4 with a GPU, else 0: it reads "
        "them itself); changes nothing but speed")  # fmt: skip
    add("--threads", type=at_least(1), metavar="N", help="CPU threads of each process")
    add("--seed", type=at_least(0), default=0, metavar="N", help="starts everything random (0)")
