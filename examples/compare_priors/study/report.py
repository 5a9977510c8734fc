"""Writes the numbers and tables of a study to files and to a page of documentation."""

import json
from pathlib import Path

from study.plan import Extent, planned
from study.runner import read_json, read_result, write_text
from study.summary import agreement, markdown, tables
from tvqrap.cli import UserError


def write_report(
    folder: Path, extent: Extent, *, page: Path | None = None, other: dict | None = None
) -> str:
    """Writes ``rows.json`` and ``tables.md`` for the finished rows, and returns the tables.

    A page is rewritten between ``<!-- TABLE: begin -->`` and ``<!-- TABLE: end -->`` for each
    table; the numbers go into ``NAME.json`` beside it. ``other`` is the content of another study to
    compare with.

    Raises:
        UserError: If the page cannot be read, or lacks the markers of a table.
    """
    results = ((row.name, read_result(folder, row)) for row in planned(extent))
    rows = {name: result for name, result in results if result is not None}
    content = {"study": read_json(folder / "study.json"), "rows": rows}
    made = tables_of(content, extent, other)
    text = "\n\n".join(f"### {name}\n\n{lines}" for name, lines in made.items())
    write_text(folder / "rows.json", _as_text(content))
    write_text(folder / "tables.md", f"{text}\n")
    if page is not None:
        try:
            before = page.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{page}: cannot be read ({error})") from None
        write_text(page, filled(before, made))
        write_text(page.with_suffix(".json"), _as_text(content))
    return text


def tables_of(content: dict, extent: Extent, other: dict | None = None) -> dict[str, str]:
    """Returns the tables of a study; ``head`` describes rows, machines and photos."""
    made = {"head": _head(content, extent)} | tables(content["rows"], extent)
    if other is not None:
        made["agreement"] = agreement(content["rows"], other["rows"], extent)
    return made


def filled(text: str, made: dict[str, str]) -> str:
    """Returns the text of a page with its tables replaced."""
    for name, lines in made.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise UserError(f"the page must have {begin}, followed by {end}")
        text = f"{before}{begin}\n{lines}\n{end}{after}"
    return text


def _head(content: dict, extent: Extent) -> str:
    study, rows = content["study"], content["rows"]
    facts = [("rows", f"{len(rows)} of {len(planned(extent))}")]
    if rows:
        seconds = sum(result["seconds"] for result in rows.values())
        facts.append(("time", f"{seconds / 3600:.1f} hours, one row after the other"))
        machines = {_described(result["machine"]) for result in rows.values()}
        facts += (("machine", machine) for machine in sorted(machines))
        photos = f"{study['photos']} to train on, {study['held_out']} held out"
        facts += (("networks", f"in {study['precision']}"), ("photos", photos))
    return markdown(("measured", ""), facts)


def _described(machine: dict) -> str:
    parts = [machine.get("gpu"), machine["processor"], f"{machine['threads']} thread for each row"]
    return ", ".join([*filter(None, parts), f"torch {machine['torch']}"])


def read_content(path: Path) -> dict:
    """Reads the numbers of a study.

    Raises:
        UserError: If the file is not ``rows.json`` of a study.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
        raise UserError(f"{path}: not the numbers of a study, such as rows.json in its --out")
    return content


def _as_text(content: dict) -> str:
    """Returns the numbers as JSON, one row per line."""
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in content["rows"].items())
    return f'{{"study": {json.dumps(content["study"])}, "rows": {{\n{rows}\n}}}}\n'
