"""The trainer, as a user runs it: three stages, killed and resumed, and with wrong inputs."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from cli import UserError
from data import PhotoPairs
from PIL import Image
from presets import PRESETS
from safetensors.torch import load_file
from torch.testing import assert_close
from weights import load_super_resolver

from tests.examples.test_model import CONFIGS

SCRIPT = Path(train.__file__)


@pytest.fixture
def photos(tmp_path):
    """A folder of four smooth random pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        small = Image.fromarray(rng.integers(64, 192, (12, 16, 3), dtype=np.uint8))
        small.resize((128, 96), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Models that train in milliseconds, behind the names of the presets."""
    monkeypatch.setitem(PRESETS, "tiny", CONFIGS["lowres"])
    monkeypatch.setitem(PRESETS, "small", CONFIGS["regressed"])


def command(stage, photos, out, *more):
    return ["--stage", stage, "--photos", str(photos), "--out", str(out), "--batch", "2",
            "--crop", "32", *more]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_three_stages_leave_weights_log_samples_and_plot(preset, photos, tmp_path):
    out = tmp_path / "out"
    for stage in ("tokenizer", "predictor", "rap"):
        train.main(command(stage, photos, out, "--preset", preset, "--steps", "3"))
        with (out / stage / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows[-1]["step"] == "3"
        assert float(rows[-1]["loss"]) > 0
        with Image.open(out / stage / "plot.png") as plot:
            assert plot.size[0] > 100
        assert list((out / stage / "samples").iterdir())
        if (stage, preset) != ("tokenizer", "small"):  # a regressed structure needs a predictor
            model = load_super_resolver(out / f"{stage}.safetensors")
            assert model(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)


def test_rap_moves_the_predictor_and_leaves_the_prior_alone(photos, tmp_path):
    for stage in ("tokenizer", "predictor", "rap"):
        train.main(command(stage, photos, tmp_path / "out", "--steps", "2"))
    before, after = (
        load_file(tmp_path / "out" / f"{stage}.safetensors") for stage in ("predictor", "rap")
    )
    for name, value in before.items():
        same = torch.equal(value, after[name])
        if name.startswith("tokenizer."):
            assert same, f"{name} moved"
    assert not torch.equal(
        before["predictor.head.head.weight"], after["predictor.head.head.weight"]
    )


@pytest.mark.parametrize("adversarial", ["0", "0.75"])
@pytest.mark.parametrize("stage", ["tokenizer", "rap"])
def test_resumed_training_equals_uninterrupted_training(stage, adversarial, photos, tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    more = ("--adversarial", adversarial)
    for out in (whole, split):
        if stage == "rap":
            for earlier in ("tokenizer", "predictor"):
                train.main(command(earlier, photos, out, "--steps", "1"))
    train.main(command(stage, photos, whole, "--steps", "7", *more))
    train.main(command(stage, photos, split, "--steps", "3", *more))
    torch.manual_seed(123)
    train.main(command(stage, photos, split, "--steps", "7", "--resume", *more))
    expected = load_file(whole / f"{stage}.safetensors")
    assert_close(load_file(split / f"{stage}.safetensors"), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed(photos, tmp_path):
    """SIGKILL gives the process no chance to tidy up; the last checkpoint must be enough."""
    run = [sys.executable, str(SCRIPT), "--threads", "1", "--steps", "400"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = (
        "import sys, runpy; sys.argv = sys.argv[1:]; from presets import PRESETS;"
        "from tests.examples.test_model import CONFIGS; PRESETS['tiny'] = CONFIGS['lowres'];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run = [sys.executable, "-c", start, *run[1:]]
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(SCRIPT.parent), str(Path(__file__).parents[2])]
    )
    quiet = {"env": environment, "stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    subprocess.run([*run, *command("tokenizer", photos, whole)], check=True, **quiet)
    process = subprocess.Popen([*run, *command("tokenizer", photos, killed)], **quiet)
    checkpoint = killed / "tokenizer" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(float(np.random.default_rng().uniform(0, 1)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*run, *command("tokenizer", photos, killed), "--resume"], check=True, **quiet)
    expected = load_file(whole / "tokenizer.safetensors")
    assert_close(load_file(killed / "tokenizer.safetensors"), expected, rtol=0, atol=0)


def test_minutes_end_the_training_and_count_over_resumes(photos, tmp_path):
    train.main(command("tokenizer", photos, tmp_path, "--minutes", "0.01"))
    first = torch.load(tmp_path / "tokenizer" / "checkpoint.pt", weights_only=True)
    assert first["done"] >= 1
    assert first["seconds"] >= 0.6
    train.main(command("tokenizer", photos, tmp_path, "--minutes", "0.01", "--resume"))
    again = torch.load(tmp_path / "tokenizer" / "checkpoint.pt", weights_only=True)
    assert again["done"] == first["done"]


def test_ctrl_c_finishes_the_step_and_saves(photos, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    out = tmp_path / "out"
    step = train.Trainer._train_step

    def interrupted(self):
        if self.done == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(train.Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(command("tokenizer", photos, out, "--steps", "9"))
    state = torch.load(out / "tokenizer" / "checkpoint.pt", weights_only=True)
    assert state["done"] == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_non_finite_loss_stops_with_the_last_checkpoint(photos, tmp_path):
    with pytest.raises(UserError, match=r"no longer finite at step \d+; .* lower --learning-rate"):
        train.main(
            command("tokenizer", photos, tmp_path, "--steps", "50", "--learning-rate", "1e18")
        )


def test_batches_depend_on_seed_and_number_alone(photos):
    first, again = (PhotoPairs(photos, crop=32, seed=3) for _ in range(2))
    again.batch(0, 5)
    assert_close(first.batch(7, 4), again.batch(7, 4), rtol=0, atol=0)
    assert not torch.equal(first.batch(7, 4)[0], first.batch(8, 4)[0])


def test_crops_of_both_resolutions_show_the_same_place(photos):
    hr, lr = PhotoPairs(photos, crop=64).batch(0, 8)
    reduced = torch.nn.functional.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True)
    inside = (..., slice(2, -2), slice(2, -2))  # crops see no border, reduced crops do
    # Rounding to 8 bits is the only other difference.
    assert_close(reduced[inside], lr[inside], rtol=0, atol=1.5 / 255)


class TestWrongInput:
    """One clear line for each mistake, before any work."""

    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"none: no such folder"):
            train.main(command("tokenizer", tmp_path / "none", tmp_path, "--steps", "1"))

    def test_no_photos(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="no pictures directly in this folder"):
            train.main(command("tokenizer", tmp_path / "empty", tmp_path, "--steps", "1"))

    def test_photos_smaller_than_the_crop(self, photos, tmp_path):
        with pytest.raises(UserError, match=r"smaller than the crop of 256 .* is 96\); pass"):
            train.main([*command("tokenizer", photos, tmp_path, "--steps", "1"), "--crop", "256"])

    def test_broken_photo(self, photos, tmp_path):
        (photos / "broken.png").write_bytes(b"not a picture")
        with pytest.raises(UserError, match=r"broken\.png: "):
            train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))

    def test_stage_before_is_missing(self, photos, tmp_path):
        with pytest.raises(UserError, match="first run --stage tokenizer with the same --out"):
            train.main(command("predictor", photos, tmp_path, "--steps", "1"))

    def test_nothing_to_resume(self, photos, tmp_path):
        with pytest.raises(UserError, match="nothing to resume; start without --resume"):
            train.main(command("tokenizer", photos, tmp_path, "--steps", "1", "--resume"))

    def test_does_not_overwrite_a_training(self, photos, tmp_path):
        train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))
        with pytest.raises(UserError, match="holds a training already; continue it with --resume"):
            train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))

    def test_checkpoint_of_another_model(self, photos, tmp_path):
        train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))
        with pytest.raises(UserError, match="belongs to another model or stage"):
            train.main(
                command(
                    "tokenizer", photos, tmp_path, "--steps", "2", "--resume", "--preset", "small"
                )
            )

    def test_checkpoint_that_is_no_checkpoint(self, photos, tmp_path):
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / "checkpoint.pt").write_bytes(b"junk")
        with pytest.raises(UserError, match="not a readable checkpoint"):
            train.main(command("tokenizer", photos, tmp_path, "--steps", "1", "--resume"))

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ((), "give --steps or --minutes"),
            (("--steps", "0"), "must be at least 1, got 0"),
            (("--minutes", "-1"), "must be greater than 0, got -1.0"),
            (("--steps", "1", "--crop", "40"), "--crop must be a multiple of 32, got 40"),
        ],
    )
    def test_command_line(self, more, message, photos, tmp_path, capsys):
        with pytest.raises(SystemExit) as stopped:
            train.main([*command("tokenizer", photos, tmp_path), *more])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_full_disk(self, photos, tmp_path, monkeypatch):
        nearly_full = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: nearly_full)
        with pytest.raises(UserError, match=r"only 0\.0 MB are free on this disk"):
            train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))
