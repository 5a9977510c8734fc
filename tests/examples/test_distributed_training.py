"""Training on two processes, as torchrun starts them, against training on one."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import train
from tests.examples.little_train import BLIND, ENVIRONMENT, PIDS, SCRIPT

pytestmark = [
    pytest.mark.full,
    pytest.mark.usefixtures("little_presets"),
]
LIMIT = 120  # seconds for processes that hang
# The gradient of a weight is a sum over the batch, in another order for two processes: it differs
# by some 2**-24 of the largest summand. Adam divides by its length, so steps of 4e-4 differ by up
# to a thousandth of that where summands cancel, and mostly far less: measured are 2e-7 after 20.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def start_two(*lines, pids="", blind=""):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    # A free port each time: tests may run beside each other.
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.Popen(
        [*torchrun, SCRIPT, *map(shlex.join, lines)],
        env={**ENVIRONMENT, PIDS: str(pids), BLIND: blind},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def checkpoint(out, stage="tokenizer"):
    return torch.load(out / stage / "checkpoint.pt", weights_only=True)


def last_row(folder):
    with (folder / "log.csv").open() as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}


def assert_same_training(actual, expected, stage="tokenizer", *, continued=False):
    """Everything that learns, and what the log says about it."""
    actual_state, expected_state = checkpoint(actual, stage), checkpoint(expected, stage)
    assert actual_state.keys() == expected_state.keys()
    for name in ("trained", "average", "rules"):
        assert_close(actual_state[name], expected_state[name], **CLOSE)
    weights = (load_file(out / f"{stage}.safetensors") for out in (actual, expected))
    assert_close(*weights, **CLOSE)
    row, expected_row = last_row(actual / stage), last_row(expected / stage)
    means = set() if continued else expected_row.keys() - {"seconds"}
    for name in {"step", "val_psnr", "val_accuracy"} | means:
        assert_close(row[name], expected_row[name], rtol=1e-3, atol=1e-4)


def test_two_processes_train_as_one_and_continue_each_other(photos, tmp_path):
    def line(out, steps, *more, stage="tokenizer"):
        return ["--stage", stage, "--photos", str(photos), "--out", str(tmp_path / out),
                "--crop", "32", "--batch", "8", "--steps", str(steps), *more]  # fmt: skip

    train.main(line("one", 20))
    revived = checkpoint(tmp_path / "one")["rules"]
    assert revived["1.steps_0"] == 20
    train.main(line("one then two", 10))
    prior = ("--init", str(tmp_path / "one" / "tokenizer.safetensors"))
    train.main(line("one", 20, *prior, stage="predictor"))
    paper = ("--preset", "paper", "--crop", "64", "--batch", "4")  # with an adversarial loss
    process = start_two(
        line("two", 20),
        line("parts", 20, "--accumulate", "2", "--workers", "1"),
        line("two then one", 10),
        line("one then two", 20, "--resume"),
        line("two then two", 10),
        line("two then two", 20, "--resume"),
        line("late", 100000, "--minutes", "0.01"),
        line("two", 20, *prior, stage="predictor"),
        *(line("paper", 2, *paper, stage=stage) for stage in ("tokenizer", "predictor", "rap")),
    )
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    assert "Warning" not in output
    train.main(line("two then one", 20, "--resume"))
    for out in ("two", "parts"):
        assert_same_training(tmp_path / out, tmp_path / "one")
    for out in ("two then one", "one then two"):
        assert_same_training(tmp_path / out, tmp_path / "one", continued=True)
    assert_same_training(tmp_path / "two", tmp_path / "one", "predictor")
    assert checkpoint(tmp_path / "paper", "rap")["progress"]["done"] == 2
    again, whole = (checkpoint(tmp_path / out) for out in ("two then two", "two"))
    assert_close(again["trained"], whole["trained"], rtol=0, atol=0)
    assert checkpoint(tmp_path / "late")["progress"]["seconds"] >= 0.6
    assert output.count("weights: ") == 11  # the first process alone says it


def test_damaged_photos_are_replaced_jointly_and_nothing_is_lost(photos, tmp_path):
    def line(out, *more):
        return ["--stage", "tokenizer", "--photos", str(photos), "--out", str(tmp_path / out),
                "--crop", "32", "--batch", "8", "--steps", "6", *more]  # fmt: skip

    path = photos / "0.png"
    path.write_bytes(path.read_bytes()[:2000])  # its size can still be read
    train.main(line("one"))
    process = start_two(line("two"), blind="1")
    output, _ = process.communicate(timeout=LIMIT)
    assert "process 1: no photo can be read" in output
    assert "another process cannot read photos; see its message" in output
    assert checkpoint(tmp_path / "two")["progress"]["done"] == 3
    output, _ = start_two(line("two", "--resume")).communicate(timeout=LIMIT)
    assert output.count("0.png: is damaged: ") == 1
    assert_same_training(tmp_path / "two", tmp_path / "one")
    assert last_row(tmp_path / "two" / "tokenizer")["replaced"] > 0


def test_one_of_two_processes_killed(photos, tmp_path):
    """The other says so; the checkpoint is whole, and one process continues alone."""
    line = ["--stage", "tokenizer", "--photos", str(photos), "--out", str(tmp_path),
            "--crop", "32", "--batch", "4"]  # fmt: skip
    process = start_two([*line, "--steps", "100000"], pids=tmp_path)
    saved = tmp_path / "tokenizer" / "checkpoint.pt"
    try:
        deadline = time.monotonic() + LIMIT
        while not saved.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "another process has gone" in output
    assert "continue with --resume" in output
    done = checkpoint(tmp_path)["progress"]["done"]
    assert done >= 200
    train.main([*line, "--steps", str(done + 3), "--resume"])
    assert checkpoint(tmp_path)["progress"]["done"] == done + 3


def test_a_signal_to_torchrun_finishes_the_step_and_saves(photos, tmp_path):
    line = ["--stage", "tokenizer", "--photos", str(photos), "--out", str(tmp_path),
            "--crop", "32", "--batch", "4", "--workers", "1"]  # fmt: skip
    process = start_two([*line, "--steps", "100000"])
    log = tmp_path / "tokenizer" / "log.csv"
    try:
        deadline = time.monotonic() + LIMIT
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode != 0
    assert output.count("\ninterrupted") == 1
    assert checkpoint(tmp_path)["progress"]["done"] >= 50


def test_a_batch_that_processes_do_not_divide(photos, tmp_path):
    line = ["--stage", "tokenizer", "--photos", str(photos), "--out", str(tmp_path),
            "--crop", "32", "--batch", "3", "--steps", "1"]  # fmt: skip
    output, _ = start_two(line).communicate(timeout=LIMIT)
    assert "--batch: 3 samples cannot be divided evenly among 2 processes" in output
