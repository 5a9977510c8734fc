"""The command line of train.py."""

import argparse
import dataclasses
from pathlib import Path

from tvqrap.cli import at_least
from tvqrap.degradations.pipeline import DEGRADATIONS
from tvqrap.devices import device
from tvqrap.models.convolutional import STRUCTURES
from tvqrap.models.presets import PRESETS
from tvqrap.training.recipes import RECIPES, STAGES, Recipe

# Options that replace the value of the recipe of the same name.
RECIPE_OPTIONS = (
    "batch", "crop", "learning_rate", "perceptual", "adversarial", "degradation", "code_weight",
)  # fmt: skip
# Options that identify a training. Learning rate, device, precision and the numbers of workers,
# processes and parts may change when it is resumed.
RUN_OPTIONS = ("stage", "preset", "structure", "seed", "estimator", "temperature")


def parse_options(description: str, arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", required=True, choices=STAGES, help="stage to train")
    add("--photos", required=True, type=Path, metavar="PATH",
        help="photos to train on: a folder, searched recursively, or a text file with one path per "
        "line, relative to the file")  # fmt: skip
    add("--out", required=True, type=Path, metavar="DIR", help="output folder")
    add("--val", type=Path, metavar="PATH",
        help="photos to validate on (default: crops of the training photos)")  # fmt: skip
    add("--preset", default="tiny", choices=sorted(PRESETS),
        help="model and recipe (default: tiny)")  # fmt: skip
    add("--structure", choices=sorted(STRUCTURES),
        help="source of the structure; tiny and small only (default: lowres)")  # fmt: skip
    add("--init", type=Path, metavar="FILE",
        help="start from these weights, for example a checkpoint of the authors (default: those of "
        "the previous stage in --out)")  # fmt: skip
    add("--steps", type=at_least(1), metavar="N", help="stop after N steps in total")
    add("--minutes", type=positive, metavar="X", help="stop after X minutes in total")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    _add_recipe(parser.add_argument_group("recipe"))
    _add_rap(parser.add_argument_group("options of --stage rap"))
    _add_machine(parser.add_argument_group("hardware and reproducibility"))
    options = parser.parse_args(arguments)
    if options.steps is None and options.minutes is None:
        parser.error("give --steps or --minutes")
    if options.crop is not None and options.crop % 32:
        parser.error(f"--crop must be a multiple of 32, got {options.crop}")
    if options.structure is not None and options.preset == "paper":
        parser.error("--structure: the preset paper has a fixed structure; leave this option out")
    return options


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Returns the recipe of the preset and the stage, with the values of the command line."""
    given = {name: getattr(options, name) for name in RECIPE_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(RECIPES[options.preset][options.stage], **given)


def identify_run(options: argparse.Namespace, recipe: Recipe) -> dict:
    """Returns the options that must not change when a training is resumed, with their values."""
    run = {name: getattr(options, name) for name in RUN_OPTIONS}
    kept = (name for name in RECIPE_OPTIONS if name != "learning_rate")
    run |= {name: getattr(recipe, name) for name in kept}
    return {f"--{name.replace('_', '-')}": value for name, value in run.items()}


def positive(text: str) -> float:
    """An argparse type for finite numbers above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {value}")
    return value


def weight(text: str) -> float:
    """An argparse type for finite numbers of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--batch", type=at_least(1), metavar="N",
        help="crops per step, of all processes together (default: 16; paper: 8, 32, 4 by "
        "stage)")  # fmt: skip
    add("--crop", type=at_least(32), metavar="N",
        help="side of a crop in pixels, a multiple of 32 (default: 64; paper: 512, 256, 512 by "
        "stage)")  # fmt: skip
    add("--learning-rate", type=positive, metavar="X",
        help="learning rate of Adam (default: 4e-4, 4e-4, 1e-4 by stage; paper: 4e-5, 1e-4, "
        "4e-5)")  # fmt: skip
    add("--perceptual", type=weight, metavar="X",
        help="weight of the filter-bank loss (default: 0.2; paper: 1, in place of LPIPS)",
    )  # fmt: skip
    add("--adversarial", type=weight, metavar="X",
        help="weight of the adversarial loss (default: 0; paper: 0.75, predictor 0)")  # fmt: skip
    add("--degradation", choices=sorted(DEGRADATIONS),
        help="degradation of low-resolution images (default: bicubic; predictor and rap of paper: "
        "second-order)")  # fmt: skip


def _add_rap(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--estimator", default="straight_through",
        choices=("straight_through", "soft", "gumbel", "reinmax"),
        help="gradient estimator of the choice of codes (default: straight_through)")  # fmt: skip
    add("--temperature", type=positive, default=1.0, metavar="X",
        help="temperature of the choice of codes (default: 1)")  # fmt: skip
    add("--code-weight", type=weight, metavar="X",
        help="weight of the code-level loss (default: 0.01; paper: 0)")  # fmt: skip


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", type=device, default="auto",
        help="cpu, cuda, or one GPU such as cuda:1; under torchrun each process takes its own GPU "
        "(default: auto, which is cuda if available)")  # fmt: skip
    add("--precision", default="float32", choices=("float32", "bfloat16"),
        help="precision of the networks; weights stay float32 (default: float32)")  # fmt: skip
    add("--accumulate", type=at_least(1), default=1, metavar="N",
        help="compute a batch in N parts, to save memory (default: 1)")  # fmt: skip
    add("--workers", type=at_least(0), metavar="N",
        help="processes that read photos, per training process; affects only speed (default: 4 "
        "with a GPU, else 0)")  # fmt: skip
    add("--threads", type=at_least(1), metavar="N", help="number of CPU threads of each process")
    add("--seed", type=at_least(0), default=0, metavar="N", help="random seed (default: 0)")
