"""Measures seconds and peak memory of steps of ``train.py --preset paper``."""

import csv
import dataclasses
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.paper import EXAMPLE
from tests.benchmarks.timing import Measured, Settings

STAGES = ("tokenizer", "predictor", "rap")
CROP, BATCH, STEPS = 128, 2, 4
KIB_OF_MAXRSS = 1024 if sys.platform != "darwin" else 1
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Step:
    """Measures the mean over the first few steps of one stage, in its own process."""

    stage: str

    def __call__(self, settings: Settings) -> Measured:
        seconds, peak = _train(self.stage, settings)
        note = f"crops of {CROP} x {CROP}, {BATCH} in a batch; {peak / GIB:.1f} GiB at its peak"
        return Measured("s", seconds, note=note)


@cache
def _folder() -> tempfile.TemporaryDirectory:
    """Returns a folder with photos, in which stages leave weights for the next one."""
    folder = tempfile.TemporaryDirectory()
    photos = Path(folder.name, "photos")
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(photos / f"{number}.png")
    return folder


@cache
def _train(stage: str, settings: Settings) -> tuple[float, int]:
    """Trains a stage after the earlier ones; returns seconds per step and peak resident bytes."""
    if stage != STAGES[0]:
        _train(STAGES[STAGES.index(stage) - 1], settings)
    folder = Path(_folder().name)
    command = [
        sys.executable, str(EXAMPLE / "train.py"), "--stage", stage, "--preset", "paper",
        "--photos", str(folder / "photos"), "--out", str(folder / "out"),
        "--steps", str(STEPS), "--crop", str(CROP), "--batch", str(BATCH),
        "--threads", str(settings.threads), "--device", settings.device,
    ]  # fmt: skip
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        raise RuntimeError(f"train.py failed: {(said or ['it was killed'])[-1]}")
    with (folder / "out" / stage / "log.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["seconds"]) / int(last["step"]), usage.ru_maxrss * KIB_OF_MAXRSS
