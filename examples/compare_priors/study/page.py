"""A study on a page of documentation: its tables between markers, its plots and numbers beside."""

import io
import re
from functools import partial
from pathlib import Path

from study.plan import EXPERIMENTS, Extent, planned
from study.plots import plots
from study.report import as_text, content_of
from study.runner import read_result
from study.summary import agreement, finished, tables
from study.table import Row
from tvqrap.cli import UserError, atomic_write


def write_page(page: Path, folder: Path, extent: Extent, other: dict | None = None) -> None:
    """Rewrites what stands between the markers of a page, and what lies beside it.

    ``NAME.json`` beside ``NAME.md`` holds the numbers that the tables are made from,
    ``NAME-PLOT.png`` the plots.

    Args:
        page: Has ``<!-- TABLE: begin -->`` and ``<!-- TABLE: end -->`` where tables belong.
        folder: Where the study is.
        extent: How much of it there is.
        other: The content of another study, see ``summary.agreement``.

    Raises:
        UserError: If the page cannot be read, or has no place for a table.
    """
    found = finished(partial(read_result, folder), extent)
    content = content_of(folder, found)
    text = filled(_read(page), content, extent, other)
    _write(page.with_suffix(".json"), as_text(content))
    _write(page, text)
    for name, figure in plots(found).items():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110)
        with atomic_write(page.with_name(f"{page.stem}-{name}.png")) as file:
            file.write(data.getvalue())


def filled(text: str, content: dict, extent: Extent, other: dict | None = None) -> str:
    """Returns a page's text with the tables of a study's numbers.

    Raises:
        UserError: If it has no place for one of them.
    """

    def read(row: Row) -> dict | None:
        return content["rows"].get(row.name)

    made = {"head": head(content, extent)} | tables(finished(read, extent))
    if other is not None:
        made["agreement"] = agreement(content["rows"], other["rows"], extent)
    for name, lines in made.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        between = f"{begin}\n{lines}\n{end}"
        text, count = pattern.subn(lambda _, between=between: between, text)
        if count != 1:
            raise UserError(f"the page needs one {begin} and {end}, and has {count}")
    return text


def head(content: dict, extent: Extent) -> str:
    """Writes what was computed, and on what, as a table in Markdown."""
    study, rows = content["study"], content["rows"]
    seconds = sum(result["seconds"] for result in rows.values())
    machines = sorted({_described(result["machine"]) for result in rows.values()})
    facts = [
        ("rows", f"{len(rows)} of {len(planned(extent, EXPERIMENTS))}"),
        ("time", f"{seconds / 3600:.1f} hours, one row after the other"),
        *(("machine", described) for described in machines),
        ("networks", f"in {study['precision']}"),
        ("photos", f"{study['photos']} to train on, {study['held_out']} held out"),
    ]
    return "\n".join(["| measured |  |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in facts)])


def _described(machine: dict) -> str:
    parts = [machine.get("gpu"), machine["processor"], f"{machine['threads']} thread for each row"]
    return ", ".join([*filter(None, parts), f"torch {machine['torch']}"])


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{page}: cannot be read ({error})") from None


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
