"""Doing rows, each once: what is finished lies in a folder and is taken from there."""

import dataclasses
import io
import json
import platform
import time
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from study import gradients, predictors, tokenizers
from study.images import PIECES, joined
from study.measures import judge
from study.predictors import SuperResolver
from study.priors import Tokenizer
from study.setting import Setting
from study.table import BicubicRow, PredictorRow, Row, TokenizerRow
from tvqrap.cli import UserError, atomic_write
from tvqrap.models.assembly import enlarge

SHOWN = 8  # images of each row that are kept
ORIGINAL = "original"  # the name of the true ones


class Runner:
    """Trains and measures rows.

    A row leaves ``rows/NAME.json`` when all of it is finished, its weights in ``weights/`` and some
    images in ``images/``. One that was interrupted starts again; a row trains for minutes.

    Args:
        folder: Where everything goes.
        setting: What all rows share.
    """

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder = folder
        self.setting = setting
        for part in ("rows", "weights", "images"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self._claim()

    def result(self, row: Row) -> dict:
        """Returns what is known of a row, and finds it out first where nothing is.

        Raises:
            UserError: If a file of another study is in the way, or one cannot be written.
        """
        found = read_result(self.folder, row)
        return self._do(row) if found is None else found

    def _do(self, row: Row) -> dict:
        for other in row.needs:
            self.result(other)
        started = time.monotonic()
        if isinstance(row, TokenizerRow):
            measures = self._tokenizer(row)
        elif isinstance(row, PredictorRow):
            measures = self._predictor(row)
        elif isinstance(row, BicubicRow):
            measures = self._bicubic(row)
        else:
            measures = gradients.measure(row, self.load_predictor(row.predictor), self.setting)
        result = {
            "row": as_json(row),
            "seconds": round(time.monotonic() - started, 1),
            "machine": machine(self.setting),
            **measures,
        }
        write_json(self.folder / "rows" / f"{row.name}.json", result)
        return result

    def _tokenizer(self, row: TokenizerRow) -> dict:
        tokenizer, trained = tokenizers.train(row, self.setting)
        measures, images = tokenizers.measure(tokenizer, row, self.setting)
        self._save(row, tokenizer, images)
        return trained | measures

    def _predictor(self, row: PredictorRow) -> dict:
        model = predictors.build(row, self.load_tokenizer(row.tokenizer)).to(self.setting.device)
        if row.start is not None:
            self._load(row.start, model)
        trained = predictors.train(row, model, self.setting)
        measures, images = predictors.measure(model, self.setting)
        self._save(row, model, images)
        return trained | measures

    def _bicubic(self, row: BicubicRow) -> dict:
        held_out = self.setting.images.held_out
        enlarged = enlarge(held_out.lr)
        save_strip(self._strip(row.name), enlarged)
        return judge(enlarged, held_out.hr)

    def load_tokenizer(self, row: TokenizerRow) -> Tokenizer:
        """Returns the tokenizer of a finished row, frozen."""
        tokenizer = tokenizers.build(row)
        self._load(row, tokenizer)
        return tokenizer.to(self.setting.device).eval().requires_grad_(requires_grad=False)

    def load_predictor(self, row: PredictorRow) -> SuperResolver:
        """Returns the predictor of a finished row with its tokenizer, frozen."""
        model = predictors.build(row, tokenizers.build(row.tokenizer))
        self._load(row, model)
        return model.to(self.setting.device).eval().requires_grad_(requires_grad=False)

    def _save(self, row: Row, module: nn.Module, images: Tensor) -> None:
        tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
        with atomic_write(self.folder / "weights" / f"{row.name}.safetensors") as file:
            file.write(safetensors.torch.save(tensors))
        save_strip(self._strip(row.name), images)

    def _strip(self, name: str) -> Path:
        return self.folder / "images" / f"{name}.png"

    def _load(self, row: Row, module: nn.Module) -> None:
        path = self.folder / "weights" / f"{row.name}.safetensors"
        try:
            module.load_state_dict(safetensors.torch.load_file(path))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{path}: not the weights of this row; delete {row.name}.json in rows/, and it is "
                "trained again"
            ) from error

    def _claim(self) -> None:
        """Marks the folder with what all rows share, or finds that it belongs to others."""
        mine = {
            "device": self.setting.device.type,
            "precision": self.setting.precision,
            "photos": len(self.setting.images.photos),
            "held_out": len(self.setting.images.held_out.hr) // PIECES,
        }
        path = self.folder / "study.json"
        theirs = read_json(path)
        if theirs is None:
            save_strip(self._strip(ORIGINAL), self.setting.images.held_out.hr)
            write_json(path, mine)
        elif theirs != mine:
            raise UserError(
                f"{path}: this folder is of another study, of {theirs}; pass a new --out"
            )


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


def save_strip(path: Path, pieces: Tensor) -> None:
    """Writes the first images, of which these are the pieces in [0, 1], side by side."""
    images = joined(pieces[: PIECES * SHOWN].float().cpu().clamp(0, 1))
    strip = torch.cat(list(images), dim=2).mul(255).round().byte()
    data = io.BytesIO()
    Image.fromarray(strip.permute(1, 2, 0).numpy()).save(data, "PNG")
    with atomic_write(path) as file:
        file.write(data.getvalue())


def machine(setting: Setting) -> dict:
    """What computed a row."""
    cuda = setting.device.type == "cuda"
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(setting.device) if cuda else None,
        "jobs": setting.jobs,
        "torch": torch.__version__,
    }


def processor() -> str:
    """The name of the processor, as well as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
