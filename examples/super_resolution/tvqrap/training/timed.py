"""Trains a stage for a given time, without host synchronization in a step."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor, nn

from tvqrap.training.guarded import GuardedAdam, WeightAverage
from tvqrap.training.memory import CropPair
from tvqrap.training.recipes import TimedRecipe
from tvqrap.training.stages import Stage, Step, StepRandomness, TokenizerStage
from tvqrap.training.stopping import stop_between_steps
from tvqrap.training.update import Critic
from vqprior.metrics import CodebookUsage

WARM_UP = 0.02  # share of the time in which the learning rate rises
ALONE = 0.06  # share in which the discriminator learns before its loss is used
JOINING = 0.08  # share in which the weight of its loss rises
# A discriminator that knows nothing has hinge loss 1. Below 0.9 its loss counts fully.
KNOWS_NOTHING, KNOWS_ENOUGH = 1.0, 0.9
SHOW_SECONDS = 10.0
SAVE_SECONDS = 60.0
ROW_STEPS = 100

Row = dict[str, float | str]


@dataclasses.dataclass
class Reporting:
    """Callbacks for results.

    Attributes:
        row: Takes a row of the log.
        save: Called about every minute, at the end of the stage, and before it fails.
        show: Takes a line for the user.
    """

    row: Callable[[Row], None]
    save: Callable[["TimedTraining"], None]
    show: Callable[[str], None] = print


class TimedTraining:
    """Trains one stage within a given time.

    Args:
        stage: The stage, on its device.
        recipe: Its hyperparameters.
        batches: Batches without end.
        critic: The discriminator; None for a stage without one.
        seconds: Time to train.
        precision: Precision of the networks, ``"bfloat16"`` or ``"float32"``; weights stay
            float32.

    Attributes:
        average: The averaged weights, which are saved.
        done: Steps so far.
        spent: Seconds of training so far.
    """

    def __init__(
        self, stage: Stage, recipe: TimedRecipe, batches: Iterator[CropPair], *,
        critic: Critic | None, seconds: float, precision: str = "float32",
    ) -> None:  # fmt: skip
        self.stage = stage
        self.recipe = recipe
        self.batches = batches
        self.critic = critic if recipe.adversarial > 0 else None
        self.seconds = seconds
        self.precision = precision
        stage.trained.to(memory_format=torch.channels_last)
        learning = [p for p in stage.trained.parameters() if p.requires_grad]
        self.device = learning[0].device
        self.optimizer = GuardedAdam(learning, recipe.betas)
        self.average = WeightAverage(stage.trained, recipe.averaging)
        if self.critic is not None:
            judges = list(self.critic.discriminator.parameters())
            self.critic_optimizer = GuardedAdam(judges, recipe.critic_betas)
            self.critic_loss = torch.full((), KNOWS_NOTHING, device=self.device)
        self.done, self.spent = 0, 0.0
        self.codes_learn = True
        self.usage = CodebookUsage(stage.config.codebook_size).to(self.device)
        # Samples without codes are the first of the batch; the discriminator does not see them.
        places = (torch.arange(recipe.batch, device=self.device) + 0.5) / recipe.batch
        self.randomness = StepRandomness(places, range(recipe.batch))
        self._start_row()

    def run(self, reporting: Reporting) -> None:
        """Trains until the time is up.

        Raises:
            KeyboardInterrupt: After Ctrl-C or SIGTERM, once the step is finished and saved.
        """
        with stop_between_steps() as asked:
            try:
                self._take_steps(reporting, asked)
            except Exception:
                if self.done > 0:
                    with suppress(Exception):  # what fails may be the disk or the device
                        reporting.save(self)
                raise
            reporting.row(self._close_row())
            reporting.save(self)
        if asked:
            raise KeyboardInterrupt

    def _take_steps(self, reporting: Reporting, asked: list[bool]) -> None:
        started = time.monotonic() - self.spent
        self.usage.reset()
        shown = saved = time.monotonic()
        while self.spent < self.seconds and not asked:
            self._step(next(self.batches))
            self.done += 1
            now = time.monotonic()
            self.spent = now - started
            if now - shown >= SHOW_SECONDS or self._row_steps >= ROW_STEPS:
                row = self._close_row()
                reporting.row(row)
                if now - shown >= SHOW_SECONDS:
                    reporting.show(self._describe(row))
                    shown = time.monotonic()
            if now - saved >= SAVE_SECONDS:
                reporting.save(self)
                saved = time.monotonic()

    @property
    def is_finished(self) -> bool:
        """Whether the time is up."""
        return self.spent >= self.seconds

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Returns what the next step depends on, by name."""
        parts = {
            "trained": self.stage.trained,
            "average": self.average.module,
            "rules": self.stage.rules,
            "optimizer": self.optimizer.optimizer,
        }
        if self.critic is not None:
            parts["discriminator"] = self.critic.discriminator
            parts["critic_optimizer"] = self.critic_optimizer.optimizer
        return parts

    def loudness(self, share: float) -> float:
        """Returns the weight of the adversarial loss after a share of the time."""
        late = (share - self.recipe.adversarial_from - ALONE) / JOINING
        return self.recipe.adversarial * min(max(late, 0.0), 1.0)

    def _step(self, batch: CropPair) -> None:
        share = min(self.spent / self.seconds, 1.0)
        judged = self.critic is not None and share >= self.recipe.adversarial_from
        if judged:
            self.stage.objective.adversarial = self.loudness(share)
            if self.loudness(share) > 0:
                self._freeze_codes()
        with self._autocast():
            step = self.stage(batch.hr, batch.lr, self.randomness)
        step.loss.backward()
        norm, bad = self.optimizer.step(annealed(self.recipe.learning_rate, share))
        if self.codes_learn and step.quantizer_output is not None:
            self.stage.rules.step(step.quantizer_output)
        self.average.update()
        loss = self._teach(step, batch, share) if judged else torch.zeros_like(norm)
        self._add_to_row(step, batch, norm, bad, loss)

    def _teach(self, step: Step, batch: CropPair, share: float) -> Tensor:
        first = self.stage.objective.judged_from
        with self._autocast():
            loss = self.critic.discriminator_loss(step.image[first:].detach(), batch.hr[first:])
        loss.backward()
        # Annealed as well: otherwise it would overtake images that hardly change any more.
        self.critic_optimizer.step(annealed(self.recipe.critic_learning_rate, share))
        self.critic_loss = self.critic_loss.lerp(loss.detach(), 0.02)
        known = (KNOWS_NOTHING - self.critic_loss) / (KNOWS_NOTHING - KNOWS_ENOUGH)
        self.stage.objective.trust = known.clamp(0.0, 1.0)
        return loss.detach()

    def _freeze_codes(self) -> None:
        """Freezes texture encoder and quantizer before the adversarial loss starts.

        Adversarial gradients would move the encoder faster than the codes can follow: in the first
        steps nine codes out of ten went out of use.
        """
        if isinstance(self.stage, TokenizerStage) and self.codes_learn:
            self.codes_learn = False
            for part in (self.stage.trained.texture, self.stage.trained.quantizer):
                part.requires_grad_(requires_grad=False)

    def _add_to_row(
        self, step: Step, batch: CropPair, norm: Tensor, bad: Tensor, critic_loss: Tensor
    ) -> None:
        terms = {"loss": step.loss, **step.terms}
        if step.image is not None:
            terms["mse"] = (step.image.detach().float() - batch.hr).square().mean()
        terms |= {"critic": critic_loss, "gradient_norm": norm, "skipped": bad}
        values = torch.stack([term.detach().float() for term in terms.values()])
        self._names = list(terms)
        self._sums = values if self._sums is None else self._sums + values
        self._row_steps += 1
        self.usage.update(step.indices)

    def _start_row(self) -> None:
        self._sums: Tensor | None = None
        self._names: list[str] = []
        self._row_steps, self._row_started = 0, time.monotonic()

    def _close_row(self) -> Row:
        """Returns the means since the last row; only this reads from the device."""
        row: Row = {"stage": self.stage.name, "step": self.done, "seconds": round(self.spent, 1)}
        if self._sums is not None:
            means = (self._sums / self._row_steps).tolist()
            row |= dict(zip(self._names, means, strict=True))
            row["skipped"] *= self._row_steps
            codes = self.usage.compute()
            row |= {"usage": float(codes.usage), "perplexity": float(codes.perplexity)}
            if row.get("mse", 0) > 0:
                row["psnr"] = -10 * math.log10(row["mse"])
            elapsed = max(time.monotonic() - self._row_started, 1e-9)
            row["steps_per_second"] = round(self._row_steps / elapsed, 2)
        share = min(self.spent / self.seconds, 1.0)
        row["learning_rate"] = annealed(self.recipe.learning_rate, share)
        self.usage.reset()
        self._start_row()
        return row

    def _describe(self, row: Row) -> str:
        shown = ("loss", "psnr", "pixel", "perceptual", "adversarial", "critic", "code", "usage")
        numbers = "  ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)
        rate = row.get("steps_per_second", 0)
        seconds = f"{self.spent:.0f} of {self.seconds:.0f} s"
        return f"{self.stage.name}: {seconds}  step {self.done} ({rate} a second)  {numbers}"

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.precision))


def annealed(peak: float, share: float) -> float:
    """Returns the learning rate after a share of the time: a short warm-up, then half a cosine."""
    rising = max(min(share / WARM_UP, 1.0), 0.01)
    return peak * rising * max(0.5 * (1 + math.cos(math.pi * share)), 0.01)
