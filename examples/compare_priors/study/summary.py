"""Tables of finished rows: means and standard deviations over seeds."""

import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from study.gradients import ESTIMATORS
from study.plan import Extent, planned
from study.priors import PRIORS
from study.table import PredictorRow, Row, TokenizerRow, family_of

Results = dict[str, dict]  # by the name of the row


class Group(NamedTuple):
    """The results of a row over seeds."""

    row: Row
    results: list[dict]


class Column(NamedTuple):
    """A column of a table."""

    title: str
    name: str  # of the measure
    digits: int  # after the decimal point
    spread: bool = False  # whether the standard deviation over seeds is shown

    def cell(self, group: Group) -> str:
        """Returns the cell of a group."""
        values = [result[self.name] for result in group.results if self.name in result]
        if not values:
            return ""
        text = f"{statistics.fmean(values):.{self.digits}f}"
        if self.spread and len(values) > 1:
            text += f" ± {statistics.stdev(values):.{self.digits}f}"
        return text


IMAGES = (
    Column("PSNR-Y", "psnr", 2, spread=True),
    Column("SSIM-Y", "ssim", 4),
    Column("GMSD", "gmsd", 4),
    Column("filters", "filters", 4, spread=True),
    Column("Frechet", "frechet", 3, spread=True),
    Column("detail", "detail", 3),
)
BITS = Column("bits/pixel", "bits_per_pixel", 3)
SIZES = (
    *IMAGES, BITS, Column("numbers/pixel", "structure_per_pixel", 4),
    Column("parameters", "parameters", 0),
)  # fmt: skip
CODES = (Column("perplexity", "perplexity", 0), Column("in use", "usage", 2))
FEATURES = (
    Column("effective dimension", "effective_dimension", 2, spread=True),
    Column("explained by low-res.", "explained", 3, spread=True),
    Column("lost by quantization", "quantization_error", 3, spread=True),
)
SURENESS = (Column("right codes", "accuracy", 3), Column("confidence", "confidence", 3))
COMPARED = (IMAGES[0], IMAGES[2], IMAGES[4], SURENESS[0])


def tables(results: Results, extent: Extent) -> dict[str, str]:
    """Returns every table with at least one row, by name, in Markdown."""

    def of(name: str) -> list[Group]:
        found: dict[str, Group] = {}
        for row in planned(extent, [name]):
            if row.name in results:
                found.setdefault(row.group, Group(row, [])).results.append(results[row.name])
        return list(found.values())

    sizes = sorted(of("sizes"), key=lambda g: (PRIORS.index(g.row.prior), g.row.codebook_size))
    with_codes = [group for group in sizes if not group.row.prior.startswith("structure")]
    made = {
        "sizes": table(_prior, SIZES, sizes),
        "features": table(_prior, (*FEATURES, *CODES), with_codes),
        "equal-bits": table(_quantizer, (*IMAGES, BITS, *CODES), of("equal-bits")),
        "prediction": table(_training, (*IMAGES, *SURENESS), of("prediction")),
        "gradients": _gradients(of("gradients")),
        "stride": table(_stride, (*IMAGES, *SURENESS), of("stride")),
    }
    return {name: text for name, text in made.items() if text}


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def table(
    names: Callable[[Row], dict[str, str]], columns: Iterable[Column], groups: list[Group]
) -> str:
    """Returns a table with a row per group: names, measures, and number of seeds."""
    rows = [
        names(group.row)
        | {column.title: column.cell(group) for column in columns}
        | {"seeds": str(len(group.results))}
        for group in groups
    ]
    return markdown(rows[0], (row.values() for row in rows)) if rows else ""


def _prior(row: TokenizerRow) -> dict[str, str]:
    codes = "none" if row.prior.startswith("structure") else str(row.codebook_size)
    return {"prior": row.prior, "codes": codes}


def _quantizer(row: TokenizerRow) -> dict[str, str]:
    return {"quantizer": row.quantizer, "prior": row.prior}


def _training(row: Row) -> dict[str, str]:
    """Returns the name of a row of the table ``prediction``."""
    if isinstance(row, PredictorRow):
        return {"training": row.method}
    limits = {"structure-lr": "no codes", "texture-lr": "true codes"}
    return {"training": limits[row.prior] if isinstance(row, TokenizerRow) else row.name}


def _stride(row: PredictorRow) -> dict[str, str]:
    prior, side = row.tokenizer.prior, f"H/{row.tokenizer.stride}"
    return {
        "prior": prior, "structure": side if prior == "texture" else "", "training": row.method
    }  # fmt: skip


def _gradients(groups: list[Group]) -> str:
    rows = []
    for row, results in groups:
        places = [place for result in results for place in result["places"]]
        for estimator in ESTIMATORS:
            ones = [place[estimator] for place in places]
            moves = [one["improves"] for one in ones if one["improves"] is not None]
            exact = statistics.median(place["exact"] for place in places)
            rows.append({
                "training": row.predictor.method,
                "logits": f"x {row.sharpened:g}",
                "confidence": f"{statistics.fmean(one['confidence'] for one in places):.3f}",
                "exact length": f"{exact:.1e}",
                "estimator": estimator,
                "cosine": f"{statistics.fmean(one['cosine'] for one in ones):.2f}",
                "of one draw": f"{statistics.fmean(one['single'] for one in ones):.2f}",
                "norm": f"{statistics.median(one['norm'] for one in ones):.2f}",
                "improves": f"{sum(moves)} of {len(moves)}",
            })  # fmt: skip
    return markdown(rows[0], (row.values() for row in rows)) if rows else ""


def agreement(ours: Results, theirs: Results, extent: Extent) -> str:
    """Returns a table of the mean and largest difference of each measure between two studies.

    Rows that only one of them has are left out.
    """
    families: dict[str, list[tuple[dict, dict]]] = {}
    for row in planned(extent):
        if isinstance(row, TokenizerRow | PredictorRow) and row.name in ours.keys() & theirs.keys():
            pair = (ours[row.name], theirs[row.name])
            families.setdefault(family_of(row), []).append(pair)
    rows = (
        [family, str(len(pairs)), *(_apart(pairs, column) for column in COMPARED)]
        for family, pairs in families.items()
    )
    return markdown(("training", "rows in both", *(column.title for column in COMPARED)), rows)


def _apart(pairs: list[tuple[dict, dict]], column: Column) -> str:
    name, digits = column.name, column.digits
    found = [abs(a[name] - b[name]) for a, b in pairs if name in a and name in b]
    return f"{statistics.fmean(found):.{digits}f}, {max(found):.{digits}f}" if found else ""
