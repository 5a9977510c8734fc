"""Trains TVQ&RAP in three stages, each with one command.

    python train.py --stage tokenizer --photos DIR --out DIR --minutes 60
    python train.py --stage predictor --photos DIR --out DIR --minutes 30
    python train.py --stage rap       --photos DIR --out DIR --minutes 10

Each stage starts from the weights that the one before left in --out, and leaves its own there:
tokenizer.safetensors, predictor.safetensors, rap.safetensors, all of which upscale.py reads.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from cli import UserError, ensure_writable_folder, run
from convolutional import STRUCTURES
from data import PhotoPairs
from presets import PRESETS
from stages import MakeObjective, PredictorStage, RapStage, TokenizerStage
from trainer import Settings, Trainer
from weights import load_super_resolver, load_tokenizer

from vqprior.losses import AdversarialLoss, FilterBankLoss, ReconstructionAwareLoss
from vqprior.nn import PatchDiscriminator

LEARNING_RATES = {"tokenizer": 4e-4, "predictor": 4e-4, "rap": 1e-4}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", required=True, choices=("tokenizer", "predictor", "rap"))
    add("--photos", required=True, type=Path, metavar="DIR", help="photos to train on")
    add("--out", required=True, type=Path, metavar="DIR", help="where everything goes")
    add("--val", type=Path, metavar="DIR",
        help="photos to report on; without it, crops of the training photos")  # fmt: skip
    add("--preset", default="tiny", choices=sorted(PRESETS), help="size of the model")
    add("--structure", choices=sorted(STRUCTURES), help="where structure comes from")
    add("--steps", type=positive_int, metavar="N", help="stop after N steps in total")
    add("--minutes", type=positive_float, metavar="N", help="stop after N minutes in total")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--batch", type=positive_int, default=16, metavar="N", help="crops in a batch (16)")
    add("--crop", type=positive_int, default=64, metavar="N",
        help="side of a crop, a multiple of 32 (64)")  # fmt: skip
    add("--learning-rate", type=positive_float, metavar="X",
        help="of Adam (tokenizer and predictor 4e-4, rap 1e-4)")  # fmt: skip
    add("--perceptual", type=float, default=0.2, metavar="X",
        help="weight of the filter-bank loss (0.2)")  # fmt: skip
    add("--adversarial", type=float, default=0.0, metavar="X",
        help="weight of the adversarial loss (0; the paper has 0.75)")  # fmt: skip
    add("--estimator", default="straight_through",
        choices=("straight_through", "soft", "gumbel", "reinmax"),
        help="how the gradient passes the choice of codes, for rap")  # fmt: skip
    add("--temperature", type=positive_float, default=1.0, metavar="X", help="for rap (1)")
    add("--code-weight", type=float, default=0.0, metavar="X",
        help="weight of the code-level loss kept in rap (0, as in the paper)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--threads", type=positive_int, metavar="N", help="CPU threads")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.steps is None and options.minutes is None:
        parser.error("give --steps or --minutes")
    if options.crop % 32:
        parser.error(f"--crop must be a multiple of 32, got {options.crop}")
    return options


def positive_int(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    """An argument that measures something."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {value}")
    return value


def make_stage(
    options: argparse.Namespace, make_objective: MakeObjective
) -> TokenizerStage | PredictorStage:
    """Builds the stage, from the weights of the one before where there is one."""
    if options.stage == "tokenizer":
        config = PRESETS[options.preset]
        if options.structure is not None:
            config = dataclasses.replace(config, structure=options.structure)
        return TokenizerStage(config, make_objective)
    previous = {"predictor": "tokenizer", "rap": "predictor"}[options.stage]
    path = options.out / f"{previous}.safetensors"
    if not path.exists():
        raise UserError(f"{path}: not there; first run --stage {previous} with the same --out")
    if options.stage == "predictor":
        return PredictorStage(load_tokenizer(path))
    model = load_super_resolver(path)
    return RapStage(
        model.tokenizer, model.predictor, make_objective, estimator=options.estimator,
        temperature=options.temperature, code_weight=options.code_weight,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Trains one stage."""
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    folder = options.out / options.stage
    ensure_writable_folder(folder)
    if not options.resume and (folder / "checkpoint.pt").exists():
        raise UserError(
            f"{folder}: holds a training already; continue it with --resume or choose another --out"
        )
    adversary = None
    if options.adversarial > 0 and options.stage != "predictor":
        adversary = AdversarialLoss(PatchDiscriminator(num_layers=2))

    def make_objective(reference: torch.nn.Parameter) -> ReconstructionAwareLoss:
        return ReconstructionAwareLoss(
            pixel=torch.nn.functional.l1_loss,
            perceptual=FilterBankLoss() if options.perceptual > 0 else None,
            adversarial=adversary,
            weights={"perceptual": options.perceptual, "adversarial": options.adversarial},
            reference=reference,
        )

    stage = make_stage(options, make_objective)
    photos = PhotoPairs(options.photos, crop=options.crop, seed=options.seed)
    validation = PhotoPairs(options.val, crop=128, seed=1) if options.val else photos
    settings = Settings(
        out=folder,
        steps=options.steps,
        minutes=options.minutes,
        batch=options.batch,
        learning_rate=options.learning_rate or LEARNING_RATES[options.stage],
    )
    trainer = Trainer(stage, photos, validation, settings, adversary=adversary, device=device)
    if options.resume:
        trainer.resume()
    trainer.run()


if __name__ == "__main__":
    sys.exit(run(main))
