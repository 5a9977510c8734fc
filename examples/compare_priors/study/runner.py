"""Doing rows, each once: what is finished lies in a folder and is taken from there."""

import dataclasses
import json
import platform
import time
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from study.gradients import measure_gradients
from study.measures import judge, measure_predictor, measure_tokenizer
from study.priors import build_tokenizer
from study.setting import PIECES, Setting
from study.table import BicubicRow, PredictorRow, Row, TokenizerRow
from study.training import build_model, train_predictor, train_tokenizer
from tvqrap.cli import UserError, atomic_write
from tvqrap.models.assembly import upscale_bicubic


class Runner:
    """Trains and measures rows.

    A row leaves ``rows/NAME.json`` when all of it is finished, and its weights in ``weights/``. One
    that was interrupted starts again; a row trains for minutes.

    Raises:
        UserError: If the folder is of another study.
    """

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        mine = {
            "device": setting.device.type,
            "precision": setting.precision,
            "photos": len(setting.photos),
            "held_out": len(setting.held_out.hr) // PIECES,
        }
        theirs = read_json(folder / "study.json")
        if theirs not in (None, mine):
            raise UserError(f"{folder}: is of another study, of {theirs}; pass a new --out")
        for part in ("rows", "weights"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        write_json(folder / "study.json", mine)

    def result(self, row: Row) -> dict:
        """Returns what is known of a row, and finds it out first where nothing is.

        Raises:
            UserError: If a file of another study is in the way, or one cannot be written.
        """
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
        write_json(self.folder / "rows" / f"{row.name}.json", result)
        return result

    def _measure(self, row: Row) -> dict:
        setting = self.setting
        if isinstance(row, BicubicRow):
            return judge(upscale_bicubic(setting.held_out.lr), setting.held_out.hr)
        if isinstance(row, TokenizerRow):
            tokenizer = train_tokenizer(row, setting)
            self._save(row, tokenizer)
            return measure_tokenizer(tokenizer, row, setting)
        if isinstance(row, PredictorRow):
            tokenizer = self._load(row.tokenizer, build_tokenizer(row.tokenizer))
            model = build_model(row, tokenizer).to(setting.device)
            if row.start is not None:
                self._load(row.start, model)
            train_predictor(row, model, setting)
            self._save(row, model)
            return measure_predictor(model, setting)
        model = build_model(row.predictor, build_tokenizer(row.predictor.tokenizer))
        return measure_gradients(row, self._load(row.predictor, model), setting)

    def _save(self, row: Row, module: nn.Module) -> None:
        tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
        with atomic_write(self.folder / "weights" / f"{row.name}.safetensors") as file:
            file.write(safetensors.torch.save(tensors))

    def _load(self, row: Row, module: nn.Module) -> nn.Module:
        path = self.folder / "weights" / f"{row.name}.safetensors"
        try:
            module.load_state_dict(safetensors.torch.load_file(path))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{path}: not the weights of this row; delete {row.name}.json in rows/, and it is "
                "trained again"
            ) from error
        return module.to(self.setting.device).eval().requires_grad_(requires_grad=False)


def read_result(folder: Path, row: Row) -> dict | None:
    """Returns what is known of a row.

    Raises:
        UserError: If a row of that name had another configuration.
    """
    path = folder / "rows" / f"{row.name}.json"
    found = read_json(path)
    if found is not None and found.get("row") != as_json(row):
        raise UserError(f"{path}: trained otherwise, by another table or --scale; pass a new --out")
    return found


def as_json(row: Row) -> dict:
    """Returns a row as it comes back from a file."""
    return json.loads(json.dumps(dataclasses.asdict(row)))


def read_json(path: Path) -> dict | None:
    """Reads a file, if it is there.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to do it again") from None


def write_json(path: Path, content: object) -> None:
    """Writes a file whole, or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())
