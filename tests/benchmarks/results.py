"""The file of results: rows, machine and commit."""

import datetime
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks import machine
from tests.benchmarks.cases import PARTS_IN_ORDER
from tests.benchmarks.memory import beyond_fixed
from tests.benchmarks.timing import Settings

Row = dict[str, Any]
Results = dict[str, Any]
# Rows of different runs may be combined only if all of these are the same.
SAME = ("machine", "commit", "quick")


def begin(settings: Settings) -> Results:
    """Returns results without rows."""
    return {
        "quick": settings.quick,
        "commit": machine.commit(),
        "machine": machine.describe(settings),
        "rows": [],
    }


def add(results: Results, row: Row) -> None:
    """Adds a row, with the minute of its measurement."""
    minute = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    results["rows"].append({**row, "measured": minute})
    beyond_fixed([row for row in results["rows"] if row["part"] == "memory"])


def keep(results: Results, path: Path, parts: set[str]) -> None:
    """Adds the rows in ``path`` of other parts, if machine and commit are the same.

    A commit with changes never counts as the same.
    """
    try:
        earlier = json.loads(path.read_text())
        same = all(earlier[name] == results[name] for name in SAME)
        rows = [row for row in earlier["rows"] if row["part"] not in parts]
    except (OSError, ValueError, KeyError, TypeError):
        return
    commit = results["commit"]
    if same and commit is not None and " " not in commit:
        rows += results["rows"]
        results["rows"] = sorted(rows, key=lambda row: PARTS_IN_ORDER.index(row["part"]))


def save(results: Results, path: Path) -> None:
    """Writes the file atomically."""
    text = json.dumps(results, indent=1) + "\n"
    write(path, lambda temporary: temporary.write_text(text))


def write(path: Path, produce: Callable[[Path], object]) -> None:
    """Lets ``produce`` write a temporary file, which then replaces ``path``."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        produce(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
