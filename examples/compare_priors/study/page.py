"""A study on a page of documentation: its tables between markers, its plots and numbers beside."""

import io
import json
import re
from functools import partial
from pathlib import Path

from study.plan import EXPERIMENTS, Extent, planned
from study.plots import plots
from study.runner import read_json, read_result
from study.summary import finished, tables
from study.table import Row
from tvqrap.cli import UserError, atomic_write


def write_page(page: Path, folder: Path, extent: Extent) -> None:
    """Rewrites what stands between the markers of a page, and what lies beside it.

    ``NAME.json`` beside ``NAME.md`` holds the numbers that the tables are made from,
    ``NAME-PLOT.png`` the plots.

    Args:
        page: Has ``<!-- TABLE: begin -->`` and ``<!-- TABLE: end -->`` where tables belong.
        folder: Where the study is.
        extent: How much of it there is.

    Raises:
        UserError: If the page cannot be read, or has no place for a table.
    """
    found = finished(partial(read_result, folder), extent)
    rows = {one.row.name: one.result for ones in found.values() for one in ones}
    content = {"study": read_json(folder / "study.json"), "rows": rows}
    text = filled(_read(page), content, extent)
    _write(page.with_suffix(".json"), as_text(content))
    _write(page, text)
    for name, figure in plots(found).items():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110)
        with atomic_write(page.with_name(f"{page.stem}-{name}.png")) as file:
            file.write(data.getvalue())


def filled(text: str, content: dict, extent: Extent) -> str:
    """Returns a page's text with the tables of a study's numbers.

    Raises:
        UserError: If it has no place for one of them.
    """

    def read(row: Row) -> dict | None:
        return content["rows"].get(row.name)

    for name, lines in ({"head": head(content, extent)} | tables(finished(read, extent))).items():
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
    machines = {
        (one["processor"], f"{one['threads']} thread for each row", f"torch {one['torch']}")
        for one in (result["machine"] for result in rows.values())
    }
    facts = [
        ("rows", f"{len(rows)} of {len(planned(extent, EXPERIMENTS))}"),
        ("time", f"{seconds / 3600:.1f} hours, one row after the other"),
        *(("machine", ", ".join(parts)) for parts in sorted(machines)),
        ("networks", f"in {study['precision']}"),
        ("photos", f"{study['photos']} to train on, {study['held_out']} held out"),
    ]
    return "\n".join(["| measured |  |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in facts)])


def as_text(content: dict) -> str:
    """Writes numbers as JSON, one row a line."""
    rows = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(result)}" for name, result in content["rows"].items()
    )
    return f'{{"study": {json.dumps(content["study"])}, "rows": {{\n{rows}\n}}}}\n'


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{page}: cannot be read ({error})") from None


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
