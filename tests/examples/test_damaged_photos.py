"""Photos that cannot be read: others take their place, they are named, and nothing is lost."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import train
import train_all
from study.setting import PIECES, Setting
from tests.examples.training import checkpoint, command
from tvqrap.cli import UserError
from tvqrap.training.data import Crops, SampleNumbers, Split, reading
from tvqrap.training.memory import PhotoMemory
from tvqrap.training.photos import PhotoFiles
from tvqrap.training.quick_report import read_samples
from tvqrap.training.update import Update

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("little_presets")


def damage(path, *, share=0.5):
    """Cuts a file; its size can still be read unless nothing is left."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def replaced(out):
    with (out / "tokenizer" / "log.csv").open() as file:
        return sum(int(row["replaced"]) for row in csv.DictReader(file))


def test_the_next_photo_takes_its_place(photos):
    files = PhotoFiles(photos)
    damage(photos / "1.png")
    damage(photos / "2.png")
    assert (files[1] == files[3]).all()
    assert [line.split(": ")[0] for line in files.find(1).damage] == [
        str(photos / "1.png"), str(photos / "2.png"),
    ]  # fmt: skip
    assert files.find(0).damage == files.find(3).damage == ()
    damage(photos / "3.png")
    assert (PhotoFiles(photos)[2] == files[0]).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_stay_the_same_and_say_what_they_lack(workers, photos):
    whole = Crops(PhotoFiles(photos), crop=32, augmentation="crop_flip_rotate", seed=3)
    expected = whole.batch(range(40))
    damage(photos / "0.png")
    crops = Crops(PhotoFiles(photos), crop=32, augmentation="crop_flip_rotate", seed=3)
    with reading(crops, SampleNumbers(Split(40), 0), workers=workers, device=CPU) as batches:
        batch = next(batches)
    assert {line.split(": ")[0] for line in batch.damage} == {str(photos / "0.png")}
    same = (batch.hr == expected.to(CPU).hr).flatten(1).all(1)
    assert (~same).sum() == len(batch.damage)
    assert batch.seeds == expected.seeds


def test_a_training_goes_on_and_is_resumed_exactly(photos, tmp_path, capsys):
    damage(photos / "0.png")
    damage(photos / "2.png", share=0)  # found before the first step
    for out, steps, more in (("whole", 6, ()), ("split", 3, ()), ("split", 6, ("--resume",))):
        train.main(command("tokenizer", photos, tmp_path / out, "--steps", str(steps), *more))
        out, err = capsys.readouterr()
        assert err.count("0.png: is damaged: ") == 1
        assert "other photos take its place" in err
        assert "2.png: is empty; it is left out" in err
    weights = (load_file(tmp_path / name / "tokenizer.safetensors") for name in ("whole", "split"))
    assert_close(*weights, rtol=0, atol=0)
    assert replaced(tmp_path / "whole") == replaced(tmp_path / "split") > 0
    assert f"{replaced(tmp_path / 'split')} times another photo took the place" in out


def test_photos_may_come_and_go(photos, tmp_path, capsys):
    train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))
    (photos / "0.png").unlink()
    train.main(command("tokenizer", photos, tmp_path, "--steps", "2", "--resume"))
    note = "note: the photos have changed, there were 4 and are 3; the training goes on with these"
    assert note in capsys.readouterr().err
    train.main(command("tokenizer", photos, tmp_path, "--steps", "3", "--resume"))
    assert "have changed" not in capsys.readouterr().err
    assert checkpoint(tmp_path)["progress"]["done"] == 3


@pytest.mark.parametrize("share", [0, 0.5])
def test_photos_that_are_all_damaged_are_one_line(share, photos, tmp_path):
    for path in photos.iterdir():
        damage(path, share=share)
    message = r"none of the 4 photos can be read; the first: .*\.png: is (empty|damaged)"
    with pytest.raises(UserError, match=message):
        train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))
    with pytest.raises(UserError, match=message):
        PhotoMemory([photos], smallest=32, device=CPU)
    with pytest.raises(UserError, match=message):
        read_samples(photos, CPU)


@pytest.mark.parametrize("kind", [UserError, RuntimeError, OSError])
def test_what_ends_a_training_loses_no_step(kind, photos, tmp_path, monkeypatch):
    compute, done = Update.compute, []

    def failing(self, *arguments):
        if len(done) == 3:
            raise kind("gone")
        done.append(compute(self, *arguments))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Update, "compute", failing)
        with pytest.raises(kind, match="gone"):
            train.main(command("tokenizer", photos, tmp_path / "failed", "--steps", "5"))
    assert checkpoint(tmp_path / "failed")["progress"]["done"] == 3
    train.main(command("tokenizer", photos, tmp_path / "failed", "--steps", "5", "--resume"))
    train.main(command("tokenizer", photos, tmp_path / "whole", "--steps", "5"))
    weights = (load_file(tmp_path / name / "tokenizer.safetensors") for name in ("failed", "whole"))
    assert_close(*weights, rtol=0, atol=0)


def test_half_a_step_is_not_saved(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Update, "apply", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(command("tokenizer", photos, tmp_path, "--steps", "5"))
    assert not (tmp_path / "tokenizer" / "checkpoint.pt").exists()


def test_train_all_leaves_them_out_and_reports_them(photos, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (300, 300), "red").save(photos / "large.png")
    damage(photos / "0.png")
    assert PhotoMemory([photos], smallest=32, device=CPU).photos == 4
    assert len(read_samples(photos, CPU).hr) == 1
    assert capsys.readouterr().err.count("0.png: is damaged: ") == 2

    monkeypatch.setattr("tvqrap.training.sequence.Sequence.run", lambda self: iter(()))
    more = ("--val", str(photos), "--preset", "tiny", "--device", "cpu", "--crop", "64")
    train_all.main(["--photos", str(photos), "--out", str(tmp_path), "--minutes", "9", *more])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [line.split(": ")[0] for line in report["left_out"]] == [str(photos / "0.png")] * 2


def test_a_study_measures_none_twice(tmp_path, capsys):
    for number in range(3):
        levels = np.random.default_rng(number).integers(0, 256, (144, 160, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / f"{number}.png")
    damage(tmp_path / "0.png")
    setting = Setting(tmp_path, tmp_path, most=2)
    assert len(setting.hr.unique(dim=0)) == len(setting.hr) == 2 * PIECES
    next(setting.batches(seed=0, batch=16))
    assert capsys.readouterr().err.count("0.png: is damaged: ") == 1
