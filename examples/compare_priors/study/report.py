"""What a study leaves to look at: numbers, tables, plots and images."""

import io
import json
from functools import partial
from pathlib import Path

from PIL import Image

from study.images import VIEW
from study.plan import Extent
from study.plots import plots
from study.runner import ORIGINAL, read_json, read_result
from study.summary import Finished, agreement, as_csv, finished, label, tables
from study.table import PredictorRow, Row, TokenizerRow
from tvqrap.cli import UserError, atomic_write
from tvqrap.images.panels import contact_sheet

SHOWN = 5  # images in a grid
SHOWN_METHODS = (
    "code-longer", "rap", "rap-keep-code-0.01", "rap-distance", "soft", "reinmax", "continuous",
)  # fmt: skip


def write_report(folder: Path, extent: Extent, other: dict | None = None) -> str:
    """Writes ``rows.csv``, ``rows.json``, ``tables.md``, and ``NAME.png`` for plots and grids.

    Args:
        folder: Where the study is.
        extent: How much of it there is.
        other: The content of another study, see ``summary.agreement``.

    Returns:
        The tables.
    """
    found = finished(partial(read_result, folder), extent)
    content = content_of(folder, found)
    made = tables(found)
    if other is not None:
        made["agreement"] = agreement(content["rows"], other["rows"], extent)
    text = "\n\n".join(f"### {name}\n\n{lines}" for name, lines in made.items())
    _write(folder / "rows.csv", as_csv(found).encode())
    _write(folder / "rows.json", as_text(content).encode())
    _write(folder / "tables.md", f"{text}\n".encode())
    for name, figure in plots(found).items():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110)
        _write(folder / f"{name}.png", data.getvalue())
    for name, grid in grids(folder, found).items():
        data = io.BytesIO()
        grid.save(data, "PNG")
        _write(folder / f"{name}-images.png", data.getvalue())
    return text or "nothing is finished"


def content_of(folder: Path, found: dict[str, list[Finished]]) -> dict:
    """Returns what all rows share, and the numbers of each by name."""
    rows = {one.row.name: one.result for ones in found.values() for one in ones}
    return {"study": read_json(folder / "study.json"), "rows": rows}


def as_text(content: dict) -> str:
    """Writes numbers as JSON, one row a line."""
    rows = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(result)}" for name, result in content["rows"].items()
    )
    return f'{{"study": {json.dumps(content["study"])}, "rows": {{\n{rows}\n}}}}\n'


def read_content(path: Path) -> dict:
    """Reads numbers that a study has left.

    Raises:
        UserError: If they cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
        raise UserError(f"{path}: not the numbers of a study, such as rows.json in its --out")
    return content


def grids(folder: Path, found: dict[str, list[Finished]]) -> dict[str, Image.Image]:
    """Returns images side by side, one image a row, of the first seed."""
    tokenizers = [one.row for one in found["sizes"] + found["equal-bits"] if one.row.seed == 0]
    predictors = [one.row for one in found["prediction"] if one.row.seed == 0]
    chosen = {
        "sizes": [(f"{row.prior} {row.codebook_size}", row) for row in tokenizers if _ends(row)],
        "equal-bits": [
            (f"{row.quantizer} {row.prior}", row)
            for row in tokenizers
            if row.quantizer != "vq" and row.prior == "texture"
        ],
        "prediction": [
            (label(row), row)
            for row in predictors
            if not isinstance(row, PredictorRow) or row.method in SHOWN_METHODS
        ],
    }
    return {name: _grid(folder, rows) for name, rows in chosen.items() if rows}


def _ends(row: TokenizerRow) -> bool:
    return row.quantizer == "vq" and row.codebook_size in (64, 1024)


def _grid(folder: Path, rows: list[tuple[str, Row]]) -> Image.Image:
    strips = [("original", _strip(folder, ORIGINAL))]
    strips += [(caption, _strip(folder, row.name)) for caption, row in rows]
    strips = [(caption, strip) for caption, strip in strips if strip is not None]
    count = min(SHOWN, *(strip.width // VIEW for _, strip in strips))
    return contact_sheet(
        [[(caption, _part(strip, number)) for caption, strip in strips] for number in range(count)],
        gap=4,
        font_size=11,
    )


def _strip(folder: Path, name: str) -> Image.Image | None:
    path = folder / "images" / f"{name}.png"
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.convert("RGB")


def _part(strip: Image.Image, number: int) -> Image.Image:
    return strip.crop((number * VIEW, 0, (number + 1) * VIEW, VIEW))


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
