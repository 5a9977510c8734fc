"""train.py with wrong inputs: one clear line for each mistake, before any work."""

import shutil

import pytest
import torch

import train
from tests.examples.test_model import CONFIGS
from tests.examples.training import command
from tvqrap.cli import UserError
from tvqrap.models.presets import PRESETS

pytestmark = pytest.mark.usefixtures("little_presets")


class TestWrongInput:
    """One clear line for each mistake, before any work."""

    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"none: no such folder"):
            train.main(command("tokenizer", tmp_path / "none", tmp_path, "--steps", "1"))

    def test_no_photos(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="no images in this folder or in those inside"):
            train.main(command("tokenizer", tmp_path / "empty", tmp_path, "--steps", "1"))

    def test_photos_smaller_than_the_crop(self, photos, tmp_path):
        with pytest.raises(UserError, match=r"smaller than the crop of 256 .* is 96\); pass"):
            train.main([*command("tokenizer", photos, tmp_path, "--steps", "1"), "--crop", "256"])

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
        with pytest.raises(UserError, match="was started with --preset tiny, not small"):
            train.main(
                command(
                    "tokenizer", photos, tmp_path, "--steps", "2", "--resume", "--preset", "small"
                )
            )

    @pytest.mark.parametrize(
        ("option", "value"), [("--seed", "1"), ("--batch", "4"), ("--degradation", "second-order")]
    )
    def test_checkpoint_of_another_run(self, option, value, photos, tmp_path):
        train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))
        with pytest.raises(UserError, match=rf"was started with {option} \w+, not {value}; resume"):
            train.main([
                *command("tokenizer", photos, tmp_path, "--steps", "2", "--resume"), option, value
            ])  # fmt: skip

    def test_checkpoint_of_another_size(self, photos, tmp_path, monkeypatch):
        train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))
        monkeypatch.setitem(PRESETS, "tiny", CONFIGS["lowres-4"])
        with pytest.raises(UserError, match="belongs to another model or stage"):
            train.main(command("tokenizer", photos, tmp_path, "--steps", "2", "--resume"))

    def test_checkpoint_of_another_version(self, photos, tmp_path):
        (tmp_path / "tokenizer").mkdir()
        torch.save({"done": 3}, tmp_path / "tokenizer" / "checkpoint.pt")
        with pytest.raises(UserError, match="not a checkpoint of this version"):
            train.main(command("tokenizer", photos, tmp_path, "--steps", "1", "--resume"))

    def test_a_batch_that_parts_do_not_divide(self, photos, tmp_path):
        with pytest.raises(UserError, match=r"--batch: 2 samples cannot be divided evenly"):
            train.main(command("tokenizer", photos, tmp_path, "--steps", "1", "--accumulate", "3"))

    def test_checkpoint_that_is_no_checkpoint(self, photos, tmp_path):
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / "checkpoint.pt").write_bytes(b"junk")
        with pytest.raises(UserError, match="not a readable checkpoint"):
            train.main(command("tokenizer", photos, tmp_path, "--steps", "1", "--resume"))

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ((), "give --steps or --minutes"),
            (("--steps", "0"), "must be a whole number of at least 1, got 0"),
            (("--minutes", "-1"), "must be greater than 0, got -1.0"),
            (("--steps", "1", "--crop", "40"), "--crop must be a multiple of 32, got 40"),
            (("--steps", "1", "--adversarial", "-1"), "must be at least 0, got -1.0"),
            (("--steps", "1", "--device", "abacus"), "this machine has no such device: abacus"),
            (
                ("--steps", "1", "--preset", "paper", "--structure", "lowres"),
                "has a fixed structure",
            ),
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
