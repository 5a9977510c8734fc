"""What tests of train.py have in common."""

import csv

import torch


def command(stage, photos, out, *more):
    return ["--stage", stage, "--photos", str(photos), "--out", str(out), "--batch", "2",
            "--crop", "32", *more]  # fmt: skip


def checkpoint(out, stage="tokenizer"):
    return torch.load(out / stage / "checkpoint.pt", weights_only=True)


def last_row(folder):
    with (folder / "log.csv").open() as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}
