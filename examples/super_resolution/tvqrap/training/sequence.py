"""The stages of train_all.py, each starting from the result of the previous one."""

import copy
import csv
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from tvqrap.cli import UserError, describe
from tvqrap.degradations.mixture import Mixture
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.models.presets import PRESETS
from tvqrap.models.weights import load_model, read_notes, save_model
from tvqrap.training.checkpoints import load_checkpoint, save_checkpoint
from tvqrap.training.joint import JointStage
from tvqrap.training.memory import PhotoMemory, crop_pairs
from tvqrap.training.objective import LateAdversarialObjective
from tvqrap.training.perceptual import ShiftedLoss
from tvqrap.training.ranks import Ranks
from tvqrap.training.recipes import TimedRecipe
from tvqrap.training.reports import write_csv
from tvqrap.training.stages import PredictorStage, RapStage, Stage, TokenizerStage
from tvqrap.training.timed import Reporting, Row, TimedTraining
from tvqrap.training.update import Critic

AHEAD = 8  # batches that a GPU cuts and degrades at once
START_CROPS = 64  # crops from which k-means initializes a new codebook


@dataclasses.dataclass
class Surroundings:
    """The settings that all stages share.

    Attributes:
        out: Folder of weights and log.
        checkpoints: Folder of checkpoints.
        photos: Photos to train on.
        perceptual: The perceptual loss.
        learned: Whether the perceptual loss is the learned one.
        device: Device to train on.
        precision: Precision of the networks.
        seed: Random seed.
        seconds: Time for all stages.
        resume: Whether to continue an earlier run.
        say: Prints a line for the user.
    """

    out: Path
    checkpoints: Path
    photos: PhotoMemory
    perceptual: nn.Module
    learned: bool
    device: torch.device
    precision: str
    seed: int
    seconds: float
    resume: bool
    say: Callable[[str], None]


class Sequence:
    """Trains the stages and saves after each.

    Args:
        surroundings: Settings of all stages.
        recipes: Recipes by stage, in order.
        tokenizer: Start of the first stage; None for new weights of ``preset``.
        predictor: Start of the second stage; None for new weights.
        preset: A name in ``PRESETS``.
    """

    def __init__(
        self, surroundings: Surroundings, recipes: dict[str, TimedRecipe],
        tokenizer: TextureTokenizer | None, predictor: nn.Module | None, preset: str = "small",
    ) -> None:  # fmt: skip
        self.around = surroundings
        self.recipes = recipes
        self.preset = preset
        self.fresh = tokenizer is None
        tokenizer = TextureTokenizer(PRESETS[preset]) if tokenizer is None else tokenizer
        self.tokenizer = tokenizer.to(surroundings.device)
        predictor = predictor or tokenizer.config.make_predictor()
        self.predictor = predictor.to(surroundings.device)
        first = next(iter(recipes.values()))
        self.critic = Critic(Ranks(device=surroundings.device), first)
        self.critic.discriminator.to(memory_format=torch.channels_last)
        self.rows: list[Row] = []
        log = surroundings.out / "log.csv"
        if surroundings.resume and log.exists():
            self.rows = list(csv.DictReader(log.read_text().splitlines()))

    def run(self) -> Iterator[tuple[str, TextureTokenizer | SuperResolver]]:
        """Trains the stages; yields the name and model of each when it is finished."""
        for number, (name, recipe) in enumerate(self.recipes.items()):
            model = self._finished(name)
            if model is None:
                model = self._train(name, recipe, number)
            self.tokenizer = model.tokenizer if isinstance(model, SuperResolver) else model
            if isinstance(model, SuperResolver):
                self.predictor = model.predictor
            # A copy, because the caller keeps it and the next stage trains the model further.
            yield name, copy.deepcopy(model).eval()

    def _train(
        self, name: str, recipe: TimedRecipe, number: int
    ) -> TextureTokenizer | SuperResolver:
        around = self.around
        generator = torch.Generator(around.device).manual_seed(1000 * around.seed + number)
        batches = crop_pairs(
            around.photos, Mixture(), batch=recipe.batch, crop=recipe.crop, generator=generator,
            ahead=AHEAD if around.device.type == "cuda" else 1,
        )  # fmt: skip
        stage = self._make_stage(name, recipe).to(around.device)
        if self.fresh and isinstance(stage, TokenizerStage):
            start = next(batches)
            stage.trained.to(memory_format=torch.channels_last)
            stage.start_codes(start.hr[:START_CROPS], start.lr[:START_CROPS])
        training = TimedTraining(
            stage, recipe, batches, critic=self.critic, precision=around.precision,
            seconds=recipe.share * around.seconds / sum(r.share for r in self.recipes.values()),
        )  # fmt: skip
        checkpoint = around.checkpoints / f"{name}.checkpoint"
        if around.resume and checkpoint.exists():
            progress = load_checkpoint(checkpoint, training.parts(), {"--preset": self.preset})
            training.done, training.spent = progress["done"], progress["spent"]
            training.average.count = progress["averaged"]
        training.run(Reporting(self._log, self._save, around.say))
        checkpoint.unlink(missing_ok=True)
        return stage.model(training.average.module)

    def _make_stage(self, name: str, recipe: TimedRecipe) -> Stage:
        judged_from = round(recipe.code_dropout * recipe.batch)

        def objective(reference: nn.Parameter) -> LateAdversarialObjective:
            return LateAdversarialObjective(
                ShiftedLoss(self.around.perceptual, self.around.seed),
                recipe.learned if self.around.learned else recipe.perceptual,
                self.critic if recipe.adversarial > 0 else None,
                reference=reference,
                judged_from=judged_from,
            )

        # The result of the previous stage is an average, whose parameters are frozen.
        if name == "tokenizer":
            self.tokenizer.requires_grad_(requires_grad=True)
            return TokenizerStage(self.tokenizer, objective, code_dropout=recipe.code_dropout)
        self.predictor.requires_grad_(requires_grad=True)
        if name == "predictor":
            return PredictorStage(self.tokenizer, self.predictor)
        if name == "rap":
            return RapStage(
                self.tokenizer, self.predictor, objective, code_weight=recipe.code_weight
            )
        return JointStage(
            self.tokenizer, self.predictor, objective, code_weight=recipe.code_weight,
            without_codes=recipe.code_dropout, true_codes=recipe.true_codes,
        )  # fmt: skip

    def _log(self, row: Row) -> None:
        self.rows.append(row)
        write_csv(self.around.out / "log.csv", self.rows)

    def _save(self, training: TimedTraining) -> None:
        name = training.stage.name
        notes = {
            "stage": name,
            "steps": str(training.done),
            "seconds": str(round(training.spent)),
            "finished": "yes" if training.is_finished else "no",
        }
        model = training.stage.model(training.average.module)
        path = self.around.out / f"{name}.safetensors"
        save_model(path, model, notes, dtype=torch.float16)
        progress = {
            "done": training.done,
            "spent": training.spent,
            "averaged": training.average.count,
        }
        path = self.around.checkpoints / f"{name}.checkpoint"
        try:
            save_checkpoint(path, training.parts(), {"--preset": self.preset}, progress)
        except (UserError, OSError, RuntimeError) as error:  # for example a full disk
            self.around.say(f"no checkpoint was saved, training continues: {describe(error)}")

    def _finished(self, name: str) -> TextureTokenizer | SuperResolver | None:
        """Returns the model of a stage that an earlier run has finished, else None."""
        path = self.around.out / f"{name}.safetensors"
        if not path.exists():
            return None
        if not self.around.resume:
            raise UserError(f"{path}: exists already; continue with --resume or pass another --out")
        if read_notes(path).get("finished") != "yes":
            return None
        return load_model(path).to(self.around.device)
