"""The training loop that all stages share: when to step, report, save and stop."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tvqrap.cli import UserError, check_free_space
from tvqrap.models.assembly import upscale_bicubic
from tvqrap.models.weights import save_model
from tvqrap.training.checkpoints import load_checkpoint, save_checkpoint
from tvqrap.training.data import Batch, Data, SampleNumbers, reading
from tvqrap.training.photos import note_changes
from tvqrap.training.ranks import Ranks
from tvqrap.training.recipes import Recipe
from tvqrap.training.reports import Row, RunningLog, mean_psnr, plot, save_samples, write_csv
from tvqrap.training.settings import Settings
from tvqrap.training.stages import Stage, StepRandomness, TokenizerStage
from tvqrap.training.stopping import stop_between_steps
from tvqrap.training.update import Critic, Update

VALIDATION_CROPS = 16
START_BATCHES = 8  # batches from which k-means initializes the codebook
MOST_SKIPPED = 10  # steps in a row whose gradient is not finite


class Trainer:
    """Trains one stage and writes ``log.csv``, ``samples/``, ``plot.png`` and the weights.

    A checkpoint holds everything that the next step depends on: weights, their average, optimizer
    moments, codebook statistics, and the step number, which determines all randomness. A resumed
    training continues bit for bit in one process, and up to rounding in several or in another
    number of them.

    Args:
        stage: The stage; it is moved to the device of ``ranks``.
        data: The data.
        recipe: The hyperparameters.
        settings: The other settings.
        ranks: This process.
        critic: The discriminator, for a recipe with an adversarial loss.
    """

    def __init__(
        self, stage: Stage, data: Data, recipe: Recipe, settings: Settings, *, ranks: Ranks,
        critic: Critic | None = None,
    ) -> None:  # fmt: skip
        self.stage = stage.to(ranks.device)
        self.data = data
        self.recipe = recipe
        self.settings = settings
        self.ranks = ranks
        self.split = settings.split
        stage.trained.to(memory_format=torch.channels_last)
        self.running_log = RunningLog(stage.config.codebook_size, ranks)
        validation = data.validation.batch(range(VALIDATION_CROPS))
        self.running_log.name(validation.damage)
        self.validation = data.degraded(validation.to(ranks.device))
        self.update = Update(
            stage, recipe, ranks,
            split=self.split, critic=critic, precision=settings.precision,
        )  # fmt: skip
        self.done = 0
        self.seconds = 0.0
        self.skipped_in_a_row = 0
        self.rows: list[Row] = []
        # Whether the state is that between two steps, on all processes at once.
        self.is_between_steps = False

    @property
    def checkpoint(self) -> Path:
        """The checkpoint file."""
        return self.settings.out / "checkpoint.pt"

    def run(self) -> None:
        """Trains until the limit.

        Raises:
            KeyboardInterrupt: After Ctrl-C or SIGTERM, once the step is finished and saved.
            UserError: If the disk is too full for checkpoints, no photo can be read, or the loss
                is no longer finite. The last finished step is saved before, except in the last
                case: an earlier checkpoint is more likely to recover.
        """
        if self.ranks.is_first:
            check_free_space(self.settings.out, self._bytes_needed())
        if self.done == 0:
            self._start()
        photos = reading(
            self.data.training,
            SampleNumbers(self.split, self.done),
            workers=self.settings.workers,
            device=self.ranks.device,
        )
        with photos as batches, stop_between_steps() as asked, self._bar() as bar:
            try:
                interrupted = self._take_steps(map(self.data.degraded, batches), asked, bar)
            except Exception:
                self._save_before_failing()
                raise
            self._save_checkpoint()
        if self.ranks.is_first and not interrupted:
            self._save_results()
        # When a process exits, torchrun stops the others, which may still be writing.
        self.ranks.wait()
        if interrupted:
            raise KeyboardInterrupt

    def resume(self) -> None:
        """Continues from the checkpoint.

        Raises:
            UserError: If there is no checkpoint, or it belongs to another training.
        """
        progress = load_checkpoint(self.checkpoint, self.update.state_parts(), self.settings.run)
        # A lower learning rate may be the reason to resume.
        self.update.set_learning_rate(self.recipe.learning_rate)
        self.done, self.seconds = progress["done"], progress["seconds"]
        self.skipped_in_a_row, self.rows = progress["skipped_in_a_row"], progress["rows"]
        self.running_log.continue_from(progress["tally"])
        if "photos" in progress and self.ranks.is_first:
            note_changes(progress["photos"], self.data.training.photos.fingerprint)

    def _take_steps(self, batches: Iterator[Batch], asked: list[bool], bar: tqdm) -> bool:
        """Trains until the limit, or until it is asked to stop; returns whether it was."""
        started = time.monotonic() - self.seconds
        interrupted, late = False, self._is_late()
        while not (interrupted or late or self._is_out_of_steps()):
            self.is_between_steps = True
            parts = self._read(batches)
            alone = self.is_between_steps = self.ranks.count == 1
            outcome = self.update.compute(iter(parts), self._step_randomness())
            self.seconds = time.monotonic() - started
            # The first process keeps the time.
            late = self.ranks.is_first and self._is_late()
            interrupted, late, bad = self.ranks.any(bool(asked), late, not outcome.is_finite)
            self.is_between_steps = False
            self.done += 1
            if bad:
                self._skip()
            else:
                self.skipped_in_a_row = 0
                if not self.update.apply(outcome):
                    self.running_log.skip()
                self.running_log.add(outcome)
            self.running_log.replace(line for part in parts for line in part.damage)
            self.is_between_steps = alone
            bar.update(self._progress() - bar.n)
            self._report_or_save(bar, last=late or self._is_out_of_steps())
        return interrupted

    def _read(self, batches: Iterator[Batch]) -> list[Batch]:
        """Reads the parts of a step; if one process cannot, all of them raise."""
        parts, failure = [], None
        try:
            parts = list(islice(batches, self.split.accumulate))
        except Exception as error:  # of whatever kind: the others must hear of it
            failure = error
        if self.ranks.any(failure is not None)[0]:
            raise failure or UserError("another process cannot read photos; see its message")
        return parts

    def _save_before_failing(self) -> None:
        if not self.is_between_steps or self.done == 0:
            return
        with suppress(UserError, OSError):  # what fails may be the disk
            self._save_checkpoint()
            if self.ranks.is_first:
                tqdm.write(f"note: step {self.done} is saved in {self.checkpoint}", file=sys.stderr)

    def _start(self) -> None:
        if isinstance(self.stage, TokenizerStage) and self.stage.starts_from_data:
            # This process's share of one large batch, the same for any number of processes.
            share = START_BATCHES * self.split.batch // self.ranks.count
            first = share * self.ranks.rank - START_BATCHES * self.split.batch
            batch = self.data.training.batch(range(first, first + share))
            self.running_log.replace(batch.damage)
            batch = batch.to(self.ranks.device)
            self.stage.start_codes(batch.hr, batch.lr)
        self.update.average.update_parameters(self.stage.trained)

    def _step_randomness(self) -> list[StepRandomness]:
        """Returns the randomness of this step, which follows from the seed and the step number."""
        generator = torch.Generator().manual_seed(mixed(self.settings.seed, self.done))
        joint = torch.rand(self.split.batch, generator=generator).to(self.ranks.device)
        return [
            StepRandomness(joint, own, torch.Generator(self.ranks.device).manual_seed(seed))
            for own in self.split.parts()
            for seed in [mixed(self.settings.seed, self.done, own.start, own.stop)]
        ]

    def _skip(self) -> None:
        self.running_log.skip()
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise UserError(
                f"the loss is no longer finite at step {self.done}; resume from "
                f"{self.checkpoint} with a lower --learning-rate"
            )

    def _is_out_of_steps(self) -> bool:
        return self.settings.steps is not None and self.done >= self.settings.steps

    def _is_late(self) -> bool:
        return self.settings.minutes is not None and self.seconds >= 60 * self.settings.minutes

    def _progress(self) -> int:
        """Returns the progress in steps, or in seconds if the time is limited."""
        return self.done if self.settings.steps is not None else int(self.seconds)

    def _bar(self) -> tqdm:
        steps = self.settings.steps
        shown = {"initial": self._progress(), "desc": self.stage.name}
        shown["disable"] = not self.ranks.is_first
        if steps is not None:
            return tqdm(total=steps, unit="step", **shown)
        layout = "{l_bar}{bar}| {elapsed} < {remaining}{postfix}"
        return tqdm(total=int(60 * self.settings.minutes), bar_format=layout, **shown)

    def _report_or_save(self, bar: tqdm, *, last: bool) -> None:
        settings = self.settings
        if self.done % settings.report_every == 0 or last:
            self._report(bar)
        if self.ranks.is_first and self.done % settings.sample_every == 0:
            self._save_samples()
        if self.done % settings.checkpoint_every == 0:
            self._save_checkpoint()

    def _report(self, bar: tqdm) -> None:
        means = self.running_log.close()  # all processes take part
        if not self.ranks.is_first:
            return
        row = {"step": self.done, "seconds": round(self.seconds, 1), **means}
        image, indices, true_indices = self._validate()
        row["val_psnr"] = mean_psnr(image, self.validation.hr)
        row["val_accuracy"] = float((indices == true_indices).float().mean())
        self.rows.append(row)
        write_csv(self.settings.out / "log.csv", self.rows)
        bar.set_postfix(
            step=self.done, loss=f"{row.get('loss', np.nan):.4f}", psnr=f"{row['val_psnr']:.2f}",
            perplexity=f"{row['perplexity']:.0f}",
        )  # fmt: skip

    @torch.no_grad()
    def _validate(self) -> tuple[Tensor, Tensor, Tensor]:
        trained = self.update.average.module.eval()
        return self.stage.validate(trained, self.validation.hr, self.validation.lr)

    def _bytes_needed(self) -> int:
        # A checkpoint holds the weights four times: the weights, their average and two moments.
        # While it is replaced there are two checkpoints; the final weights come in addition.
        trained = self.stage.trained
        tensors = [*trained.parameters(), *trained.buffers()]
        return 10 * sum(p.numel() * p.element_size() for p in tensors)

    def _save_samples(self) -> None:
        image, _, _ = self._validate()
        path = self.settings.out / "samples" / f"{self.done:07d}.png"
        save_samples(path, self.validation.lr, image, self.validation.hr)

    def _save_checkpoint(self) -> None:
        progress = {
            "done": self.done,
            "seconds": self.seconds,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rows": self.rows,
            "photos": self.data.training.photos.fingerprint,
            "tally": self.running_log.state(),  # all processes take part
        }
        if self.ranks.is_first:
            parts = self.update.state_parts()
            save_checkpoint(self.checkpoint, parts, self.settings.run, progress)

    def _save_results(self) -> None:
        self._save_samples()
        bicubic = mean_psnr(upscale_bicubic(self.validation.lr), self.validation.hr)
        plot(self.settings.out / "plot.png", self.rows, bicubic)
        notes = {
            "stage": self.stage.name,
            "steps": str(self.done),
            "seconds": str(round(self.seconds)),
        }
        weights = self.settings.out.parent / f"{self.stage.name}.safetensors"
        save_model(weights, self.stage.model(self.update.average.module), notes)
        print(f"weights: {weights}\nlog, plot and samples: {self.settings.out}")
        if replaced := sum(row.get("replaced", 0) for row in self.rows):
            print(f"{replaced} times another photo took the place of a damaged one")


def mixed(*numbers: int) -> int:
    """Returns a seed that depends on all numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
