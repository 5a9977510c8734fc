"""Draws two images: ratios with their targets, and time per token as sizes grow."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tests.benchmarks import peer, report
from tests.benchmarks.pairs import AS_LONG, FASTER
from tests.benchmarks.results import Results, Row, write

BLUE, ORANGE, GRAY, DARK = "#2a6f97", "#d1671f", "#8d99a6", "#1b1f24"
STYLE = {
    "font.size": 11, "axes.titlesize": 12.5, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.titlepad": 22.0, "axes.edgecolor": GRAY,
    "axes.spines.top": False, "axes.spines.right": False,
    "text.color": DARK, "axes.labelcolor": DARK, "xtick.color": DARK, "ytick.color": DARK,
    "savefig.dpi": 130, "savefig.bbox": "tight", "savefig.facecolor": "white",
}  # fmt: skip
TITLES = {
    FASTER: "Times faster than the other side (more is better)",
    AS_LONG: "Times as long as the other side (less is better)",
}
TICKS = [
    0.1,
    0.2,
    0.3,
    0.5,
    0.7,
    0.8,
    0.9,
    1,
    1.1,
    1.25,
    1.5,
    2,
    3,
    5,
    7,
    10,
    15,
    20,
    30,
    50,
    100,
    200,
]
WIDEST = 8  # largest number of ticks that fit
COLUMNS = (1.03, 1.21)  # positions of the labels at the right, in widths of the panel
MISSED = "missed"


def draw_ratios(results: Results, path: Path) -> None:
    """Draws bars from 1 to each ratio, whiskers to its quartiles, and a mark at the target."""
    rows = [row for row in results["rows"] if row["unit"] in TITLES]
    groups = {unit: [row for row in rows if row["unit"] == unit] for unit in TITLES}
    groups = {unit: chosen for unit, chosen in groups.items() if chosen}
    if not groups:
        path.unlink(missing_ok=True)  # an image of an earlier run would be misleading
        return
    heights = [len(chosen) + 1.0 for chosen in groups.values()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 0.6 * sum(heights) + 1.0), layout="constrained")
        ratios = {"height_ratios": heights}
        axes = figure.subplots(len(groups), squeeze=False, gridspec_kw=ratios)
        for axis, (unit, chosen) in zip(axes[:, 0], groups.items(), strict=True):
            _bars(axis, chosen, judge=not results["quick"])
            axis.set_title(TITLES[unit])
        figure.suptitle(_caption(results), x=0.01, ha="left", fontsize=10)
        write(path, figure.savefig)


def draw_scaling(results: Results, path: Path) -> None:
    """Draws a panel for each size that grows."""
    rows = [row for row in results["rows"] if row["part"] == "scaling" and row["points"]]
    if not rows:
        path.unlink(missing_ok=True)
        return
    lines = (len(rows) + 1) // 2
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.0 * lines + 0.3), layout="constrained")
        axes = figure.subplots(lines, 2, squeeze=False).flatten()
        for axis, row in zip(axes, rows, strict=False):
            _curves(axis, row)
        for axis in axes[len(rows) :]:
            axis.remove()
        figure.suptitle(_caption(results), x=0.01, ha="left", fontsize=10)
        write(path, figure.savefig)


def _bars(axis: Axes, rows: list[Row], *, judge: bool) -> None:
    ends = [1.0]
    for place, row in enumerate(rows):
        missed = judge and report.met(row) is False
        axis.barh(place, row["value"] - 1, left=1, height=0.5, color=ORANGE if missed else BLUE)
        axis.errorbar(
            row["value"], place, xerr=[[row["value"] - row["low"]], [row["high"] - row["value"]]],
            color=DARK, linewidth=1.4, capsize=4,
        )  # fmt: skip
        ends += [row["low"], row["high"]]
        if row["target"] is not None:
            of = row["target"]["of"]
            axis.vlines(of, place - 0.4, place + 0.4, color=DARK, linewidth=3.5)
            ends.append(of)
        _beside(axis, place, f"{report.number(row['value'])}", weight="bold")
        words = f"{report.target(row)}{f', {MISSED}' if missed else ''}"
        _beside(axis, place, words, column=1, color=ORANGE if missed else DARK)
    _beside(axis, -0.75, "ratio", color=GRAY)
    _beside(axis, -0.75, "target (thick mark)", column=1, color=GRAY)
    axis.axvline(1, color=GRAY, linewidth=1)
    axis.set_ylim(len(rows) - 0.45, -0.55)
    names = [f"{row['what']} / {row['against']}\n{report.sizes(row)}" for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.tick_params(axis="y", length=0, labelsize=10)
    _log_axis(axis, min(ends), max(ends))


def _beside(axis: Axes, place: float, words: str, *, column: int = 0, **style: Any) -> None:
    """Writes a label at the right of the panel, in line with a bar."""
    where = axis.get_yaxis_transform()
    axis.text(COLUMNS[column], place, words, transform=where, va="center", **style)


def _log_axis(axis: Axes, low: float, high: float) -> None:
    room = (high / low) ** 0.04
    low, high = low / room, high * room
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    if len(ticks) > WIDEST:
        ticks = [tick for tick in ticks if tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(axis="x", color=GRAY, alpha=0.25)
    axis.set_axisbelow(True)


def _curves(axis: Axes, row: Row) -> None:
    points = row["points"]
    curves = {
        side: [(point["size"], point[side]) for point in points if point[side] is not None]
        for side in ("ours", "theirs")
    }
    styles = (("ours", "vqprior", BLUE), ("theirs", peer.PEER, ORANGE))
    for side, name, color in styles:
        if curves[side]:
            numbers = zip(*curves[side], strict=True)
            axis.loglog(*numbers, "o-", color=color, markersize=5, label=name)
    _guide(axis, row)
    axis.set_title(row["what"], pad=8)
    axis.set_ylabel("microseconds for a token")
    axis.set_xticks([p["size"] for p in points], [f"{p['size']:,}" for p in points])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.margins(y=0.12)
    axis.legend(frameon=False, labelcolor="linecolor")


def _guide(axis: Axes, row: Row) -> None:
    """Draws the expected curve: constant in the number of tokens, proportional in other sizes."""
    first, last = row["points"][0], row["points"][-1]
    growth = 1 if row["what"].endswith("n grows") else last["size"] / first["size"]
    # Through the last point, where fixed costs matter least.
    ends = [last["ours"] / growth, last["ours"]]
    words = "the same for each token" if growth == 1 else "proportional"
    axis.loglog([first["size"], last["size"]], ends, ":", color=GRAY, label=words)


def _caption(results: Results) -> str:
    machine = results["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    words = f"{machine['gpu'] or machine['processor']}, {threads}, torch {machine['torch']}"
    return f"QUICK RUN, small sizes: no measurement. {words}" if results["quick"] else words
