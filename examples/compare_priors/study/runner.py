"""Trains and measures each row once; finished rows are read from the output folder."""

import dataclasses
import json
import platform
import time
from pathlib import Path

import torch

from study.gradients import measure_gradients
from study.measures import judge, measure_predictor, measure_tokenizer
from study.setting import PIECES, Setting
from study.table import BicubicRow, GradientRow, Row, TokenizerRow
from study.training import build_model, train_predictor, train_tokenizer
from tvqrap.cli import UserError, atomic_write
from tvqrap.models.assembly import upscale_bicubic
from tvqrap.models.weights import load_super_resolver, load_tokenizer, save_model


class Runner:
    """Trains and measures rows.

    A finished row writes ``rows/NAME.json``, and its weights to ``weights/``. An interrupted row
    starts again.

    Raises:
        UserError: If the folder is of another study.
    """

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        mine = {
            "device": setting.device.type,
            "precision": setting.precision,
            "photos": len(setting.photos),
            "held_out": len(setting.hr) // PIECES,
        }
        theirs = read_json(folder / "study.json")
        if theirs not in (None, mine):
            raise UserError(f"{folder}: is of another study, of {theirs}; pass a new --out")
        for part in ("rows", "weights"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        write_text(folder / "study.json", json.dumps(mine))

    def result(self, row: Row) -> dict:
        """Returns the result of a row; trains and measures it first if it is not finished."""
        found = read_result(self.folder, row)
        if found is not None:
            return found
        for other in row.needs:
            self.result(other)
        started = time.monotonic()
        measures = self._measure(row)
        seconds = round(time.monotonic() - started, 1)
        cuda = self.setting.device.type == "cuda"
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(self.setting.device) if cuda else None,
            "torch": torch.__version__,
        }
        result = {"row": as_json(row), "seconds": seconds, "machine": machine, **measures}
        write_text(self.folder / "rows" / f"{row.name}.json", json.dumps(result, indent=1))
        return result

    def _measure(self, row: Row) -> dict:
        setting = self.setting
        if isinstance(row, BicubicRow):
            return judge(upscale_bicubic(setting.lr), setting.hr)
        if isinstance(row, TokenizerRow):
            tokenizer = train_tokenizer(row, setting)
            save_model(self._weights(row), tokenizer, {})
            return measure_tokenizer(tokenizer, row, setting)
        if isinstance(row, GradientRow):
            model = load_super_resolver(self._weights(row.predictor)).to(setting.device)
            return measure_gradients(row, model.requires_grad_(requires_grad=False), setting)
        if row.start is None:
            model = build_model(row, load_tokenizer(self._weights(row.tokenizer)))
        else:
            model = load_super_resolver(self._weights(row.start))
        train_predictor(row, model, setting)
        save_model(self._weights(row), model, {})
        return measure_predictor(model, setting)

    def _weights(self, row: Row) -> Path:
        return self.folder / "weights" / f"{row.name}.safetensors"


def read_result(folder: Path, row: Row) -> dict | None:
    """Returns the result of a row, or None if it is not finished.

    Raises:
        UserError: If the result is of a row with other settings.
    """
    path = folder / "rows" / f"{row.name}.json"
    found = read_json(path)
    if found is not None and found.get("row") != as_json(row):
        raise UserError(f"{path}: was trained with another table or --scale; pass a new --out")
    return found


def as_json(row: Row) -> dict:
    """Returns a row as JSON would read it back."""
    return json.loads(json.dumps(dataclasses.asdict(row)))


def read_json(path: Path) -> dict | None:
    """Reads a JSON file; None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to do it again") from None


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())
