"""The results of evaluate.py, as text and as CSV."""

import csv
import io
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tvqrap.cli import atomic_write

DIGITS = (2, 4, 4, 3)  # of each score in the table


class Scores(NamedTuple):
    """The scores of one image; evaluate.py defines them."""

    psnr: float
    ssim: float
    gmsd: float
    detail: float


@dataclass(frozen=True)
class Row:
    """The scores of one scene."""

    name: str
    bicubic: Scores
    model: Scores
    seconds: float


@dataclass
class Evaluation:
    """The scores of all scenes.

    Attributes:
        rows: One per scene.
        perplexity: Effective number of codes in use over all scenes; 0 without predicted codes.
        usage: Share of the codes that were chosen at least once.
        codebook_size: Number of codes.
    """

    rows: list[Row] = field(default_factory=list)
    perplexity: float = 0.0
    usage: float = 0.0
    codebook_size: int = 0

    @property
    def mean(self) -> Row:
        """The mean over scenes, as a row."""
        count = len(self.rows)
        bicubic, model = (
            Scores(*(sum(column) / count for column in zip(*scores, strict=True)))
            for scores in ([row.bicubic for row in self.rows], [row.model for row in self.rows])
        )
        return Row("mean", bicubic, model, sum(row.seconds for row in self.rows) / count)


def format_table(evaluation: Evaluation) -> str:
    """Returns the table as aligned text."""
    rows = [*evaluation.rows, evaluation.mean]
    width = max(len(row.name) for row in rows)
    head = "PSNR-Y (dB)       SSIM-Y           GMSD (low)       detail"
    lines = [
        f"{'':{width}}  {head}".rstrip(),
        f"{'':{width}}" + "  bicubic   model" * len(Scores._fields) + "  seconds",
    ]
    for row in rows:
        cells = "".join(
            f"  {ours:7.{digits}f} {theirs:7.{digits}f}"
            for ours, theirs, digits in zip(row.bicubic, row.model, DIGITS, strict=True)
        )
        lines.append(f"{row.name:{width}}{cells}  {row.seconds:7.1f}")
    return "\n".join([*lines, _codes_line(evaluation)])


def write_csv(path: Path, evaluation: Evaluation) -> None:
    """Writes the table as CSV, with the mean as its last row.

    Raises:
        UserError: If the file cannot be written.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text)
    heads = [f"{kind}_{name}" for name in Scores._fields for kind in ("bicubic", "model")]
    table.writerow(["name", *heads, "seconds"])
    for row in (*evaluation.rows, evaluation.mean):
        numbers = chain.from_iterable(zip(row.bicubic, row.model, strict=True))
        table.writerow([row.name, *(f"{number:.6g}" for number in numbers), f"{row.seconds:.3f}"])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _codes_line(evaluation: Evaluation) -> str:
    size = evaluation.codebook_size
    if not evaluation.usage:
        return f"codebook: none of {size} codes chosen (these weights have no predictor)"
    return (
        f"codebook: {evaluation.usage:.1%} of {size} codes chosen, "
        f"perplexity {evaluation.perplexity:.1f}"
    )
