"""The reports of a training: ``log.csv``, ``samples/``, ``plot.png``."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tvqrap.cli import atomic_write
from tvqrap.models.assembly import upscale_bicubic
from tvqrap.training.photos import name_damage
from tvqrap.training.ranks import Ranks
from tvqrap.training.update import Outcome
from vqprior.metrics import CodebookUsage, psnr, rgb_to_luma

SHOWN = 8  # images in a sample
Row = dict[str, float]


class RunningLog:
    """Accumulates the terms of steps on the device until the next row of the log.

    It also counts samples whose photo was damaged, and names each damaged file once.
    """

    def __init__(self, codebook_size: int, ranks: Ranks) -> None:
        self.ranks = ranks
        self.usage = CodebookUsage(codebook_size).to(ranks.device)
        self.named: set[str] = set()
        self._clear()

    def add(self, outcome: Outcome) -> None:
        """Adds a step that was applied."""
        for name, term in outcome.terms.items():
            self.sums[name] = self.sums.get(name, 0) + term
        self.norms += outcome.gradient_norm  # the same on all processes already
        for indices in outcome.indices:
            self.usage.update(indices)
        self.steps += 1

    def skip(self) -> None:
        """Counts a step that was skipped."""
        self.skipped += 1

    def name(self, damage: Iterable[str]) -> None:
        """Writes a note about each damaged file that has had none; only the first process does."""
        if self.ranks.is_first:
            name_damage(damage, self.named)

    def replace(self, damage: Iterable[str]) -> None:
        """Counts photos that were replaced by others, a line for each, which names the file."""
        self.replaced += damage

    def close(self) -> Row:
        """Returns the means over steps and processes, and resets; all processes must call this."""
        row: Row = {}
        if self.steps:
            sums = self.ranks.sum(torch.stack(list(self.sums.values())))
            means = (sums / self.steps / self.ranks.count).tolist()
            row = dict(zip(self.sums, means, strict=True))
            row["gradient_norm"] = self.norms / self.steps
        replaced = self.ranks.gather(self.replaced)
        self.name(replaced)
        row |= {"skipped": self.skipped, "replaced": len(replaced)}
        codes = self.usage.compute()
        row |= {"usage": float(codes.usage), "perplexity": float(codes.perplexity)}
        self._clear()
        return row

    def state(self) -> dict:
        """Returns the sums over all processes, which must all call this."""
        sums = self.ranks.sum(torch.stack(list(self.sums.values()))) if self.steps else []
        return {
            "sums": dict(zip(self.sums, sums, strict=True)),
            "norms": self.norms,
            "steps": self.steps,
            "skipped": self.skipped,
            "replaced": self.ranks.gather(self.replaced),
            "usage": {name: self.ranks.sum(v) for name, v in self.usage.state_dict().items()},
        }

    def continue_from(self, state: dict) -> None:
        """Restores a state; the first process takes the sums, the others start from zero."""
        share = int(self.ranks.is_first)
        device = self.ranks.device
        self.sums = {name: share * value.to(device) for name, value in state["sums"].items()}
        self.norms, self.steps, self.skipped = (
            state[name] for name in ("norms", "steps", "skipped")
        )
        self.replaced = share * state.get("replaced", [])
        self.usage.load_state_dict({name: share * v for name, v in state["usage"].items()})

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.norms = 0.0
        self.steps = self.skipped = 0
        self.replaced: list[str] = []
        self.usage.reset()


def mean_psnr(image: Tensor, hr: Tensor) -> float:
    """Returns the mean PSNR of luma in dB."""
    return float(psnr(rgb_to_luma(image.clamp(0, 1)), rgb_to_luma(hr)).mean())


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes rows, whose columns may differ, as CSV."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def save_samples(path: Path, lr: Tensor, image: Tensor, hr: Tensor) -> None:
    """Saves bicubic upscaling, result and original side by side, one sample per row."""
    path.parent.mkdir(exist_ok=True)
    rows = torch.cat([upscale_bicubic(lr), image, hr], dim=3)[:SHOWN]
    pixels = (torch.cat(list(rows), dim=1).clamp(0, 1) * 255).round().byte()
    with atomic_write(path) as file:
        Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")


def plot(path: Path, rows: list[Row], bicubic_psnr: float) -> None:
    """Plots loss, validation PSNR and codebook perplexity over the steps."""
    from matplotlib.figure import Figure  # only here: slow to import

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, name, label in zip(
        panels,
        ("loss", "val_psnr", "perplexity"),
        ("training loss", "validation PSNR-Y (dB)", "codebook perplexity"),
        strict=True,
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        panel.plot(*zip(*points, strict=True))
        panel.set(xlabel="step", title=label)
        panel.grid(alpha=0.3)
    panels[1].axhline(bicubic_psnr, color="gray", linestyle="--", label="bicubic")
    panels[1].legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
