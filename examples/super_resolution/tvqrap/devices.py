"""The devices of this machine, by the names that torch gives them."""

import argparse
from contextlib import suppress

import torch


def device(text: str) -> torch.device:
    """An argparse type: ``auto``, ``cpu``, ``mps``, ``cuda`` or one of several, as ``cuda:1``."""
    # Not tested by using it, which would take memory of the first GPU in each process.
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.device_count()}
    if text == "auto":
        text = "cuda" if there["cuda"] else "cpu"
    with suppress(RuntimeError):  # no such kind of device
        found = torch.device(text)
        if (found.index or 0) < there.get(found.type, 0):
            return found
    raise argparse.ArgumentTypeError(f"this machine has no such device: {text}")
