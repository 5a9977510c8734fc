"""Finished rows as tables: means and spreads over seeds."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Callable, Iterable

from study.plan import EXPERIMENTS, Extent, planned, rows_of
from study.priors import PRIORS
from study.table import PredictorRow, Row, TokenizerRow, family_of

LIMITS = {"structure-lr": "no codes", "texture-lr": "true codes"}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A row and what is known of it."""

    row: Row
    result: dict


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that differ in their seed alone."""

    row: Row
    results: list[dict]

    def values(self, name: str) -> list[float]:
        """Returns a measure of each seed; empty if it has none."""
        return [result[name] for result in self.results if result.get(name) is not None]

    def mean(self, name: str) -> float | None:
        """Returns the mean over seeds, None if there is no such measure."""
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def spread(self, name: str) -> float:
        """Returns the standard deviation over seeds, 0 for one."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else 0.0


def finished(read: Callable[[Row], dict | None], extent: Extent) -> dict[str, list[Finished]]:
    """Returns the finished rows by question.

    Args:
        read: Returns what is known of a row, None where it is not finished.
        extent: How much of the study there is.
    """
    found = {}
    for name in EXPERIMENTS:
        results = [(row, read(row)) for row in rows_of(name, extent)]
        found[name] = [Finished(row, result) for row, result in results if result is not None]
    return found


def grouped(rows: Iterable[Finished]) -> list[Group]:
    """Joins rows that differ in their seed alone, in the order of the table."""
    groups: dict[str, Group] = {}
    for one in rows:
        groups.setdefault(one.row.group, Group(one.row, [])).results.append(one.result)
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its head.
        name: The measure.
        digits: Behind the point.
        spread: Whether the spread over seeds is shown.
    """

    title: str
    name: str
    digits: int
    spread: bool = False

    def cell(self, group: Group) -> str:
        """Returns what stands in the row of a group."""
        mean = group.mean(self.name)
        if mean is None:
            return ""
        text = f"{mean:.{self.digits}f}"
        if self.spread and len(group.results) > 1:
            text += f" ± {group.spread(self.name):.{self.digits}f}"
        return text


IMAGES = (
    Column("PSNR-Y", "psnr", 2, spread=True),
    Column("SSIM-Y", "ssim", 4),
    Column("GMSD", "gmsd", 4),
    Column("filters", "filters", 4, spread=True),
    Column("Frechet", "frechet", 3, spread=True),
    Column("detail", "detail", 3),
)
CODES = (Column("perplexity", "perplexity", 0), Column("in use", "usage", 2))
FEATURES = (
    Column("effective dimension", "effective_dimension", 2, spread=True),
    Column("explained by low-res.", "explained", 3, spread=True),
    Column("lost by quantization", "quantization_error", 3, spread=True),
)
SURENESS = (Column("right codes", "accuracy", 3), Column("confidence", "confidence", 3))


def table(
    heads: tuple[str, ...],
    cells_of: Callable[[Row], tuple[str, ...]],
    columns: Iterable[Column],
    groups: list[Group],
) -> str:
    """Writes a table in Markdown."""
    columns = list(columns)
    lines = [
        _line([*heads, *(column.title for column in columns), "seeds"]),
        _line(["---"] * (len(heads) + len(columns) + 1)),
    ]
    for group in groups:
        cells = [column.cell(group) for column in columns]
        lines.append(_line([*cells_of(group.row), *cells, str(len(group.results))]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def tables(found: dict[str, list[Finished]]) -> dict[str, str]:
    """Returns every table of the study that has a row, by name."""
    made = {
        "sizes": _sizes(grouped(found["sizes"])),
        "features": _features(grouped(found["sizes"])),
        "equal-bits": _equal_bits(grouped(found["equal-bits"])),
        "prediction": _prediction(grouped(found["prediction"])),
        "gradients": _gradients(grouped(found["gradients"])),
        "stride": _stride(grouped(found["stride"])),
    }
    return {name: text for name, text in made.items() if text.count("\n") > 1}


def _by_prior(groups: list[Group]) -> list[Group]:
    order = list(PRIORS)
    return sorted(groups, key=lambda group: (order.index(group.row.prior), group.row.codebook_size))


def _codes_of(row: TokenizerRow) -> str:
    return "none" if row.prior.startswith("structure") else str(row.codebook_size)


def _sizes(groups: list[Group]) -> str:
    columns = (
        *IMAGES,
        Column("bits/pixel", "bits_per_pixel", 3),
        Column("numbers/pixel", "structure_per_pixel", 4),
        Column("PSNR-Y, 8 bits", "psnr_8_bits", 2),
        Column("parameters", "parameters", 0),
    )
    return table(
        ("prior", "codes"), lambda row: (row.prior, _codes_of(row)), columns, _by_prior(groups)
    )


def _features(groups: list[Group]) -> str:
    with_codes = [group for group in groups if not group.row.prior.startswith("structure")]
    return table(
        ("prior", "codes"),
        lambda row: (row.prior, _codes_of(row)),
        (*FEATURES, *CODES),
        _by_prior(with_codes),
    )


def _equal_bits(groups: list[Group]) -> str:
    columns = (*IMAGES, Column("bits/pixel", "bits_per_pixel", 3), *CODES)
    return table(("quantizer", "prior"), lambda row: (row.quantizer, row.prior), columns, groups)


def label(row: Row) -> str:
    """Names a row of the question ``prediction``."""
    if isinstance(row, PredictorRow):
        return row.method
    return LIMITS[row.prior] if isinstance(row, TokenizerRow) else row.name


def _prediction(groups: list[Group]) -> str:
    """Predictors, between what needs no codes and what the true ones give."""
    return table(("training",), lambda row: (label(row),), (*IMAGES, *SURENESS), groups)


def _stride(groups: list[Group]) -> str:
    def cells_of(row: PredictorRow) -> tuple[str, ...]:
        tokenizer = row.tokenizer
        where = f"H/{tokenizer.stride}" if tokenizer.prior == "texture" else ""
        return tokenizer.prior, where, row.method

    return table(("prior", "structure", "training"), cells_of, (*IMAGES, *SURENESS), groups)


def _gradients(groups: list[Group]) -> str:
    heads = (
        "training",
        "logits",
        "confidence",
        "exact length",
        "estimator",
        "cosine",
        "of one draw",
        "norm",
        "improves",
    )
    lines = [_line(heads), _line(["---"] * len(heads))]
    for group in groups:
        places = [place for result in group.results for place in result["places"]]
        sure = statistics.fmean(place["confidence"] for place in places)
        exact = statistics.median(place["exact"] for place in places)
        first = (group.row.predictor.method, f"x {group.row.sharpened:g}")
        for estimator in ("straight_through", "soft", "gumbel", "reinmax"):
            ones = [place[estimator] for place in places]
            moves = [one["improves"] for one in ones if one["improves"] is not None]
            cells = (
                f"{statistics.fmean(one['cosine'] for one in ones):.2f}",
                f"{statistics.fmean(one['single'] for one in ones):.2f}",
                f"{statistics.median(one['norm'] for one in ones):.2f}",
                f"{sum(moves)} of {len(moves)}",
            )
            lines.append(_line((*first, f"{sure:.3f}", f"{exact:.1e}", estimator, *cells)))
    return "\n".join(lines)


COMPARED = (("PSNR-Y", "psnr", 2), ("GMSD", "gmsd", 4), ("Frechet", "frechet", 3),
            ("right codes", "accuracy", 3))  # fmt: skip


def agreement(ours: dict[str, dict], theirs: dict[str, dict], extent: Extent) -> str:
    """Writes how far apart two studies are: of each measure the mean and the largest difference.

    Args:
        ours: Results by the name of the row.
        theirs: Those of the other study; rows that only one of them has are left out.
        extent: How much of the study there is.
    """
    families: dict[str, list[tuple[dict, dict]]] = {}
    for row in planned(extent, EXPERIMENTS):
        if isinstance(row, TokenizerRow | PredictorRow) and row.name in ours.keys() & theirs.keys():
            pair = (ours[row.name], theirs[row.name])
            families.setdefault(family_of(row), []).append(pair)
    heads = ("training", "rows in both", *(title for title, _, _ in COMPARED))
    lines = [_line(heads), _line(["---"] * len(heads))]
    for family, pairs in families.items():
        cells = [_apart(pairs, name, digits) for _, name, digits in COMPARED]
        lines.append(_line((family, str(len(pairs)), *cells)))
    return "\n".join(lines)


def _apart(pairs: list[tuple[dict, dict]], name: str, digits: int) -> str:
    found = [abs(a[name] - b[name]) for a, b in pairs if None not in (a.get(name), b.get(name))]
    if not found:
        return ""
    return f"{statistics.fmean(found):.{digits}f}, {max(found):.{digits}f}"


def as_csv(found: dict[str, list[Finished]]) -> str:
    """Writes the numbers of all rows, one line each."""
    lines = []
    for experiment, rows in found.items():
        for one in rows:
            numbers = {
                name: value for name, value in one.result.items() if isinstance(value, int | float)
            }
            head = {"question": experiment, "name": one.row.name, "seed": one.row.seed}
            lines.append(head | numbers)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
