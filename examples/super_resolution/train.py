"""Trains TVQ&RAP in three stages, each with one command.

    python train.py --stage tokenizer --photos DIR --out DIR --minutes 60
    python train.py --stage predictor --photos DIR --out DIR --minutes 30
    python train.py --stage rap       --photos DIR --out DIR --minutes 10

Each stage starts from the weights that the previous stage wrote to --out, and writes its own there:
tokenizer.safetensors, predictor.safetensors, rap.safetensors. upscale.py reads all of them.

To use several GPUs or CPU processes, start the same command with torchrun. The processes share
--batch; their number changes nothing else, and may differ when a training is resumed:

    torchrun --nproc-per-node 4 train.py --preset paper --stage tokenizer ...

Ctrl-C finishes the step and saves; --resume continues, also with photos added or removed. A photo
that cannot be read is named and another takes its place. recipes.py has the hyperparameters of each
preset. The preset paper follows the authors, with the filter-bank loss in place of LPIPS, whose
weights cannot be shipped.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from tvqrap.cli import UserError, ensure_writable_folder, run
from tvqrap.degradations.pipeline import DEGRADATIONS
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.models.presets import PRESETS
from tvqrap.models.weights import load_model
from tvqrap.training.data import Crops, Data, Split
from tvqrap.training.options import identify_run, parse_options, recipe_of
from tvqrap.training.photos import PhotoFiles
from tvqrap.training.ranks import Ranks, join_ranks
from tvqrap.training.recipes import Recipe
from tvqrap.training.settings import Settings
from tvqrap.training.stages import MakeObjective, PredictorStage, RapStage, Stage, TokenizerStage
from tvqrap.training.trainer import Trainer
from tvqrap.training.update import Critic
from vqprior.losses import FilterBankLoss, ReconstructionAwareLoss

VALIDATION_CROP = 128  # side of the crops of --val


def main(arguments: list[str] | None = None) -> None:
    """Trains one stage."""
    options = parse_options(__doc__, arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with join_ranks(options.device) as ranks:
        train(options, ranks)


def train(options: argparse.Namespace, ranks: Ranks) -> None:
    """Trains one stage as one of several processes.

    Raises:
        UserError: If an option names something that is missing or unusable.
    """
    folder = options.out / options.stage
    if ranks.is_first:
        ensure_writable_folder(folder)
    if not options.resume and (folder / "checkpoint.pt").exists():
        raise UserError(
            f"{folder}: holds a training already; continue it with --resume or pass another --out"
        )
    recipe = recipe_of(options)
    split = Split(recipe.batch, ranks.rank, ranks.count, options.accumulate)
    torch.manual_seed(options.seed)  # all processes start from the same weights
    critic = None
    if recipe.adversarial > 0 and options.stage != "predictor":
        critic = Critic(ranks, recipe)
    stage = make_stage(options, recipe, objective_maker(recipe, critic))
    data = make_data(options, recipe, ranks)
    settings = Settings(
        out=folder,
        run=identify_run(options, recipe),
        split=split,
        steps=options.steps,
        minutes=options.minutes,
        seed=options.seed,
        workers=default_workers(options, ranks),
        precision=options.precision,
    )
    trainer = Trainer(stage, data, recipe, settings, ranks=ranks, critic=critic)
    if options.resume:
        trainer.resume()
    trainer.run()


def default_workers(options: argparse.Namespace, ranks: Ranks) -> int:
    """Returns the number of processes that read photos: --workers, or 4 on a GPU and 0 on a CPU."""
    if options.workers is not None:
        return options.workers
    return 4 if ranks.device.type == "cuda" else 0


def objective_maker(recipe: Recipe, critic: Critic | None) -> MakeObjective:
    """Returns a function that makes the loss on images of a stage."""

    def make(reference: torch.nn.Parameter) -> ReconstructionAwareLoss:
        return ReconstructionAwareLoss(
            pixel=recipe.pixel,
            perceptual=FilterBankLoss() if recipe.perceptual > 0 else None,
            adversarial=critic and critic.generator_loss,
            weights={"perceptual": recipe.perceptual, "adversarial": recipe.adversarial},
            reference=reference,
        )

    return make


def make_stage(options: argparse.Namespace, recipe: Recipe, objective: MakeObjective) -> Stage:
    """Builds a stage from the weights of the previous one, if any.

    Raises:
        UserError: If these weights are missing or of another kind.
    """
    path, model = start_of(options)
    if options.stage == "tokenizer":
        if model is None:
            tokenizer = new_tokenizer(options, recipe)
        else:
            tokenizer = model.tokenizer if isinstance(model, SuperResolver) else model
            tokenizer.requires_grad_(requires_grad=True)
        stage = TokenizerStage(
            tokenizer, objective, codebook=recipe.codebook, code_dropout=recipe.code_dropout
        )
        stage.starts_from_data &= model is None
        return stage
    if options.stage == "predictor":
        if isinstance(model, SuperResolver) and options.init is not None:
            return PredictorStage(model.tokenizer, model.predictor)
        return PredictorStage(model.tokenizer if isinstance(model, SuperResolver) else model)
    if not isinstance(model, SuperResolver):
        raise UserError(f"{path}: holds a tokenizer alone; --stage rap needs a predictor as well")
    return RapStage(
        model.tokenizer, model.predictor, objective, estimator=options.estimator,
        temperature=options.temperature, code_weight=recipe.code_weight,
    )  # fmt: skip


def start_of(options: argparse.Namespace) -> tuple[Path, SuperResolver | TextureTokenizer | None]:
    """Returns the path of the weights to start from, and the model; None for the first stage.

    Raises:
        UserError: If the weights are missing or not of the preset.
    """
    previous = {"tokenizer": None, "predictor": "tokenizer", "rap": "predictor"}[options.stage]
    path = options.init or options.out / f"{previous}.safetensors"
    if options.init is None and previous is None:
        return path, None
    if options.init is None and not path.exists():
        raise UserError(f"{path}: not found; first run --stage {previous} with the same --out")
    model = load_model(path)
    if type(model.config) is not type(PRESETS[options.preset]):
        raise UserError(
            f"{path}: holds weights of another architecture than --preset {options.preset}"
        )
    return path, model


def new_tokenizer(options: argparse.Namespace, recipe: Recipe) -> TextureTokenizer:
    """Returns an untrained tokenizer."""
    config = PRESETS[options.preset]
    if options.structure is not None:
        config = dataclasses.replace(config, structure=options.structure)
    tokenizer = TextureTokenizer(config)
    if recipe.codebook == "gradient":
        bound = 1 / config.codebook_size
        torch.nn.init.uniform_(tokenizer.codes, -bound, bound)
    return tokenizer


def make_data(options: argparse.Namespace, recipe: Recipe, ranks: Ranks) -> Data:
    """Finds the photos to train on and to validate on.

    Raises:
        UserError: If there are no photos, or none is large enough.
    """
    quiet = not ranks.is_first
    # The paper's augmentations extend photos that are too small.
    smallest = recipe.crop if recipe.augmentation == "crop_flip_rotate" else 1
    photos = PhotoFiles(options.photos, smallest=smallest, quiet=quiet)
    training = Crops(photos, crop=recipe.crop, augmentation=recipe.augmentation, seed=options.seed)
    validation = training
    if options.val is not None:
        photos = PhotoFiles(options.val, smallest=VALIDATION_CROP, quiet=quiet)
        validation = Crops(photos, crop=VALIDATION_CROP, augmentation="crop_flip_rotate", seed=1)
    # Crops come with clean low-resolution images.
    clean = recipe.degradation == "bicubic"
    return Data(training, validation, None if clean else DEGRADATIONS[recipe.degradation]())


if __name__ == "__main__":
    sys.exit(run(main))
