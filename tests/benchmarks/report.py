"""Formats results as lines on the screen and as tables of the page."""

import re
from pathlib import Path
from typing import Any

from tests.benchmarks import peer
from tests.benchmarks.results import Results, Row, write

RATIOS = ("search", "training", "eval", "residual", "composition", "select")
OTHERS = {
    "memory": "Memory",
    "exactness": "Exactness",
    "import": "Import",
    "ceilings": "Ceilings of the machine",
}
QUICK = (
    "**This is a quick run: small sizes, to try the command. Its numbers are no measurement of "
    "anything.**"
)


def number(value: float | None) -> str:
    """Formats three significant digits, with thousands separators."""
    if not value:
        return "" if value is None else "0"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def seconds(value: float) -> str:
    """Formats a time in seconds or milliseconds."""
    return f"{number(value)} s" if value >= 1 else f"{number(1000 * value)} ms"


def sizes(row: Row) -> str:
    return ", ".join(f"{name} = {size:,}" for name, size in row["sizes"].items())


def outcome(row: Row) -> str:
    """Formats the value with its quartiles."""
    if row["value"] is None:
        return "not measured"
    unit = f" {row['unit']}".replace(" %", "%")
    spread = "" if row["low"] is None else f" ({number(row['low'])} to {number(row['high'])})"
    return f"{number(row['value'])}{spread}{unit}"


def target(row: Row) -> str:
    """Formats the target."""
    if row["target"] is None:
        return "none"
    unit = f" {row['unit']}" if row["unit"] in ("MiB", "ms") else ""
    return f"{row['target']['bound']} {row['target']['of']:g}{unit}"


def met(row: Row) -> bool | None:
    """Returns whether the target was met; None without a target or a value."""
    if row["target"] is None or row["value"] is None:
        return None
    bound, of = row["target"]["bound"], row["target"]["of"]
    return row["value"] <= of if bound == "at most" else row["value"] >= of


def line(row: Row) -> str:
    """Formats one row for the screen."""
    text = f"  {row['what']:<41} {sizes(row):<39} {outcome(row):<37} target {target(row)}"
    return f"{text}; {row['note']}" if row["note"] else text


def heading(part: str, against: str) -> str:
    """Formats the heading of a part for the screen."""
    return f"{part}, against {against}" if against else part


def render(results: Results | None) -> str:
    """Returns the text between the markers of the page."""
    if results is None:
        return "Not measured yet."
    suffix = "" if results["machine"]["gpu"] is None else "-cuda"
    blocks = [head(results)] + ([QUICK] if results["quick"] else [])
    rows = results["rows"]
    ratios = [row for row in rows if row["part"] in RATIOS]
    if ratios:
        blocks += ["### Ratios", f"![Ratios, with their targets](speed{suffix}.png)"]
        blocks.append(_ratios(ratios, judge=not results["quick"]))
    for part, title in OTHERS.items():
        chosen = [row for row in rows if row["part"] == part]
        if chosen:
            blocks += [f"### {title}", _plain(chosen, judge=not results["quick"])]
    curves = [row for row in rows if row["part"] == "scaling"]
    if curves:
        image = f"![Time of a token as each size grows](scaling{suffix}.png)"
        blocks += ["### Scaling", image, _curves(curves)]
    return "\n\n".join(blocks)


def rewrite(page: Path, name: str, text: str) -> bool:
    """Replaces the text between the markers of the page; returns False if it has no markers."""
    if not page.exists():
        return False
    old = page.read_text()
    begin, end = markers(name)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    new, count = pattern.subn(lambda _: f"{begin}\n{text}\n{end}", old)
    if count and new != old:
        write(page, lambda temporary: temporary.write_text(new))
    return count > 0


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def head(results: Results) -> str:
    """Returns a table of date, commit, machine and versions."""
    machine: dict[str, Any] = results["machine"]
    dates = sorted(row["measured"] for row in results["rows"]) or ["at no time"]
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    facts = [
        ("when", when),
        ("code", f"commit {results['commit']}" if results["commit"] else "of no commit"),
        ("GPU", machine["gpu"]),
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("threads", machine["threads"]),
        ("memory", f"{machine['memory_gib']} GiB" if machine["memory_gib"] else None),
        ("system", machine["system"]),
        ("Python, torch", f"{machine['python']}, {machine['torch']}"),
        (peer.PEER, machine[peer.PEER] or "not installed: its rows are left out"),
    ]
    return table(["measured", ""], [[name, fact] for name, fact in facts if fact is not None])


def _ratios(rows: list[Row], *, judge: bool) -> str:
    head = ["what", "sizes", "against", "ratio (quartiles)", "target", "ours", "other", "rounds"]
    cells = []
    for row in rows:
        both = ["", ""] if row["seconds"] is None else [seconds(s) for s in row["seconds"]]
        result = outcome(row) if row["value"] is not None else row["note"]
        name = [row["what"], sizes(row), row["against"]]
        cells.append([*name, result, judged(row, judge), *both, row["rounds"] or ""])
    return table(head, cells)


def _plain(rows: list[Row], *, judge: bool) -> str:
    head = ["what", "sizes", "result", "target", "note"]
    return table(
        head, [[r["what"], sizes(r), outcome(r), judged(r, judge), r["note"]] for r in rows]
    )


def _curves(rows: list[Row]) -> str:
    head = [
        "what",
        "others",
        "size",
        "ours, microseconds",
        f"{peer.PEER}, microseconds",
        "ours grew",
        "target",
    ]
    cells = []
    for row in rows:
        points = row["points"] or []
        if not points:
            cells.append([row["what"], sizes(row), "", row["note"], "", "", target(row)])
            continue
        theirs = [p for p in points if p["theirs"] is not None]
        there = f"{_ends(theirs, 'theirs')}, up to {theirs[-1]['size']:,}" if theirs else ""
        grown = row["what"].split()[-2]
        others = {name: size for name, size in row["sizes"].items() if name != grown}
        ends = f"{grown} = {points[0]['size']:,} to {points[-1]['size']:,}"
        ours = _ends(points, "ours")
        growth = f"{number(row['value'])} times"
        cells.append(
            [row["what"], sizes({"sizes": others}), ends, ours, there, growth, target(row)]
        )
    return table(head, cells)


def _ends(points: list[dict[str, Any]], side: str) -> str:
    return f"{number(points[0][side])} to {number(points[-1][side])}"


def judged(row: Row, judge: bool) -> str:
    """Formats the target and whether it was met."""
    words = {None: "", True: ": met", False: ": **missed**"}
    return target(row) + (words[met(row)] if judge else "")


def table(titles: list[str], cells: list[list[Any]]) -> str:
    """Returns a Markdown table."""
    rows = [titles, ["---"] * len(titles), *cells]
    texts = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in texts)
