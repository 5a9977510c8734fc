"""The training loop that all stages share: steps, averaging, checkpoints, logs, pictures."""

import csv
import dataclasses
import io
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from cli import UserError, atomic_write, check_free_space
from data import PhotoPairs
from model import enlarge
from PIL import Image
from stages import PredictorStage, Step, TokenizerStage
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from weights import save_model

from vqprior.losses import AdversarialLoss
from vqprior.metrics import CodebookUsage, psnr, rgb_to_luma

VALIDATION_CROPS = 16


@dataclasses.dataclass
class Settings:
    """How long and how to train.

    Attributes:
        out: Folder of this stage.
        steps: Stop after so many steps; None for no limit.
        minutes: Stop after so many minutes of training, resumed ones included; None for no limit.
        batch: Crops in a batch.
        learning_rate: Of Adam.
        averaging: Decay of the moving average of the weights, which is what is saved.
        report_every: Steps between two rows of the log.
        sample_every: Steps between two pictures.
        checkpoint_every: Steps between two checkpoints; a multiple of ``report_every``.
    """

    out: Path
    steps: int | None
    minutes: float | None
    batch: int
    learning_rate: float
    averaging: float = 0.998
    report_every: int = 50
    sample_every: int = 500
    checkpoint_every: int = 200


class Trainer:
    """Trains one stage and leaves ``log.csv``, ``samples/``, ``plot.png`` and the weights.

    A checkpoint holds everything that the next step depends on: weights, their average, optimizer
    moments, codebook statistics, random numbers, and the step, from which the next batch follows.
    Resumed from it, training continues bit for bit.
    """

    def __init__(
        self,
        stage: TokenizerStage | PredictorStage,
        photos: PhotoPairs,
        validation: PhotoPairs,
        settings: Settings,
        *,
        adversary: AdversarialLoss | None = None,
        device: torch.device,
    ) -> None:
        self.stage = stage
        self.photos = photos
        self.settings = settings
        self.adversary = adversary
        self.device = device
        self.validation = [p.to(device) for p in validation.batch(0, VALIDATION_CROPS)]
        stage.trained.to(device, memory_format=torch.channels_last)
        trainable = [p for p in stage.trained.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trainable, lr=settings.learning_rate, betas=(0.9, 0.99))
        self.average = AveragedModel(
            stage.trained, avg_fn=moving_average(settings.averaging), use_buffers=True
        )
        self.critic_optimizer: torch.optim.Optimizer | None = None
        if adversary is not None:
            adversary.to(device)
            self.critic_optimizer = torch.optim.Adam(
                adversary.parameters(), lr=settings.learning_rate, betas=(0.5, 0.9)
            )
        self.done = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []

    @property
    def checkpoint(self) -> Path:
        """The file to resume from."""
        return self.settings.out / "checkpoint.pt"

    def run(self) -> None:
        """Trains until the limit.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the step is finished and saved.
            UserError: If the disk is too full for checkpoints, or the loss is no longer finite;
                the last checkpoint stays.
        """
        parameters = [*self.stage.trained.parameters(), *self.stage.trained.buffers()]
        # A checkpoint holds the weights four times: themselves, their average and two moments.
        # While it is replaced there are two of them; then come the weights that are the result.
        weights = sum(p.numel() * p.element_size() for p in parameters)
        check_free_space(self.settings.out, 10 * weights)
        if self.done == 0:
            self.stage.prepare(self._batch)
            self.average.update_parameters(self.stage.trained)
        started = time.monotonic() - self.seconds
        usage = CodebookUsage(self.stage.config.codebook_size).to(self.device)
        sums: dict[str, Tensor] = {}
        with interrupt_between_steps() as interrupted, self._bar() as bar:
            while not self._is_finished() and not interrupted:
                step = self._train_step()
                usage.update(step.indices)
                for name, term in {"loss": step.loss, **step.terms}.items():
                    sums[name] = sums.get(name, 0) + term.detach()
                self.done += 1
                self.seconds = time.monotonic() - started
                bar.update(self._progress() - bar.n)
                if self.done % self.settings.report_every == 0 or self._is_finished():
                    self._report(bar, sums, usage)
                    sums = {}
                    usage.reset()
                if self.done % self.settings.sample_every == 0:
                    self._save_samples()
                if self.done % self.settings.checkpoint_every == 0:
                    self._save_checkpoint()
            self._save_checkpoint()
            if interrupted:
                raise KeyboardInterrupt
        self._save_results()

    def resume(self) -> None:
        """Continues from the checkpoint.

        Raises:
            UserError: If there is none, or it belongs to another model.
        """
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except FileNotFoundError:
            raise UserError(
                f"{self.checkpoint}: nothing to resume; start without --resume"
            ) from None
        except Exception as error:  # torch raises many kinds for a file that is not its own
            raise UserError(f"{self.checkpoint}: not a readable checkpoint ({error})") from None
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError):
            raise UserError(
                f"{self.checkpoint}: belongs to another model or stage; resume with the options "
                "it was started with"
            ) from None
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate
        torch.set_rng_state(state["rng"].cpu())
        self.done, self.seconds, self.rows = state["done"], state["seconds"], state["rows"]

    def _parts(self) -> dict[str, object]:
        parts = {
            "trained": self.stage.trained,
            "average": self.average,
            "optimizer": self.optimizer,
            **{f"rule_{number}": rule for number, rule in enumerate(self.stage.rules)},
        }
        if self.adversary is not None:
            parts |= {"adversary": self.adversary, "critic_optimizer": self.critic_optimizer}
        return parts

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        # Numbers of the start-up batches are negative, those of a generator must not be.
        hr, lr = self.photos.batch(number % 2**40, self.settings.batch)
        return tuple(part.to(self.device, memory_format=torch.channels_last) for part in (hr, lr))

    def _train_step(self) -> Step:
        self.stage.trained.train()
        hr, lr = self._batch(self.done)
        step = self.stage.step(hr, lr)
        self.optimizer.zero_grad(set_to_none=True)
        step.loss.backward()
        self.optimizer.step()
        self.stage.after_step(step)
        self.average.update_parameters(self.stage.trained)
        if self.adversary is not None:
            critic_loss = self.adversary.discriminator_loss(step.picture.detach(), hr)
            self.critic_optimizer.zero_grad(set_to_none=True)
            critic_loss.backward()
            self.critic_optimizer.step()
            step.terms["discriminator"] = critic_loss
        return step

    def _is_finished(self) -> bool:
        settings = self.settings
        out_of_steps = settings.steps is not None and self.done >= settings.steps
        out_of_time = settings.minutes is not None and self.seconds >= 60 * settings.minutes
        return out_of_steps or out_of_time

    def _progress(self) -> int:
        """In steps, or in seconds where the time is what ends the training."""
        return self.done if self.settings.steps is not None else int(self.seconds)

    def _bar(self) -> tqdm:
        settings = self.settings
        if settings.steps is not None:
            return tqdm(total=settings.steps, initial=self.done, desc=self.stage.name, unit="step")
        return tqdm(
            total=int(60 * settings.minutes),
            initial=self._progress(),
            desc=self.stage.name,
            bar_format="{l_bar}{bar}| {elapsed} < {remaining}{postfix}",
        )

    @torch.no_grad()
    def _validate(self) -> tuple[Tensor, Tensor, Tensor]:
        trained = self.average.module.eval()
        return self.stage.validate(trained, *self.validation)

    def _report(self, bar: tqdm, sums: dict[str, Tensor], usage: CodebookUsage) -> None:
        since = self.rows[-1]["step"] if self.rows else 0
        count = self.done - since
        row = {"step": self.done, "seconds": round(self.seconds, 1)}
        row |= {name: float(value) / max(count, 1) for name, value in sums.items()}
        if not np.isfinite(row.get("loss", 0.0)):
            raise UserError(
                f"the loss is no longer finite at step {self.done}; resume from "
                f"{self.checkpoint} with a lower --learning-rate"
            )
        codes = usage.compute()
        row |= {"usage": float(codes.usage), "perplexity": float(codes.perplexity)}
        picture, indices, true_indices = self._validate()
        row["val_psnr"] = mean_psnr(picture, self.validation[0])
        row["val_accuracy"] = float((indices == true_indices).float().mean())
        self.rows.append(row)
        write_csv(self.settings.out / "log.csv", self.rows)
        bar.set_postfix(
            step=self.done, loss=f"{row['loss']:.4f}", psnr=f"{row['val_psnr']:.2f}",
            perplexity=f"{row['perplexity']:.0f}",
        )  # fmt: skip

    def _save_samples(self) -> None:
        hr, lr = self.validation
        picture, _, _ = self._validate()
        rows = torch.cat([enlarge(lr), picture, hr], dim=3)[:8]  # side by side, one a row
        name = self.settings.out / "samples" / f"{self.done:07d}.png"
        name.parent.mkdir(exist_ok=True)
        save_picture(name, torch.cat(list(rows), dim=1))

    def _save_checkpoint(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"done": self.done, "seconds": self.seconds, "rows": self.rows}
        state["rng"] = torch.get_rng_state()
        with atomic_write(self.checkpoint) as file:
            torch.save(state, file)

    def _save_results(self) -> None:
        self._save_samples()
        plot(self.settings.out / "plot.png", self.rows, mean_psnr(*self._bicubic()))
        notes = {
            "stage": self.stage.name,
            "steps": str(self.done),
            "seconds": str(round(self.seconds)),
        }
        weights = self.settings.out.parent / f"{self.stage.name}.safetensors"
        save_model(weights, self.stage.model(self.average.module), notes)
        print(f"weights: {weights}\nlog, plot and samples: {self.settings.out}")

    def _bicubic(self) -> tuple[Tensor, Tensor]:
        return enlarge(self.validation[1]), self.validation[0]


@contextmanager
def interrupt_between_steps() -> Iterator[list[bool]]:
    """Collects a first Ctrl-C in a list, so that a step is never torn; a second one acts."""
    interrupted: list[bool] = []

    def remember(_signal: int, _frame: FrameType | None) -> None:
        interrupted.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """An exponential moving average that at first forgets faster, so as not to keep the start."""

    def average(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        count = torch.as_tensor(count, device=old.device)
        return old.lerp(new, 1 - ((1 + count) / (10 + count)).clamp_max(decay))

    return average


def mean_psnr(picture: Tensor, hr: Tensor) -> float:
    """Mean PSNR of the luma in dB."""
    return float(psnr(rgb_to_luma(picture.clamp(0, 1)), rgb_to_luma(hr)).mean())


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    """Writes rows whose columns may differ."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def save_picture(path: Path, picture: Tensor) -> None:
    """Writes ``(3, h, w)`` in [0, 1] as PNG."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def plot(path: Path, rows: list[dict[str, float]], bicubic_psnr: float) -> None:
    """Draws loss, validation PSNR and codebook perplexity over the steps."""
    from matplotlib.figure import Figure  # only here: slow to import

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, name, label in zip(
        panels,
        ("loss", "val_psnr", "perplexity"),
        ("training loss", "validation PSNR-Y (dB)", "codebook perplexity"),
        strict=True,
    ):
        panel.plot([row["step"] for row in rows], [row[name] for row in rows])
        panel.set(xlabel="step", title=label)
        panel.grid(alpha=0.3)
    panels[1].axhline(bicubic_psnr, color="gray", linestyle="--", label="bicubic")
    panels[1].legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
