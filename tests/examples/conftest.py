"""Examples are not installed: their scripts find packages beside them, and so do tests."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "super_resolution"
for folder in (EXAMPLE, EXAMPLES / "compare_priors"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture
def photos(tmp_path):
    """A folder of four smooth random images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        small = Image.fromarray(rng.integers(64, 192, (12, 16, 3), dtype=np.uint8))
        small.resize((128, 96), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Photos to train and to measure on, large enough for a study of priors."""
    made = []
    rng = np.random.default_rng(0)
    for name, count in (("train", 3), ("val", 2)):
        folder = tmp_path_factory.mktemp(name)
        for number in range(count):
            small = Image.fromarray(rng.integers(32, 224, (18, 20, 3), dtype=np.uint8))
            small.resize((160, 144), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        made.append(folder)
    return made


@pytest.fixture
def little_presets(monkeypatch):
    """Models that train in milliseconds, behind the names of the presets."""
    from tests.examples.little_train import LITTLE
    from tvqrap.models.presets import PRESETS

    for name, config in LITTLE.items():
        monkeypatch.setitem(PRESETS, name, config)
