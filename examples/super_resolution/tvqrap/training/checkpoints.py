"""Checkpoints: everything that the next step of a training depends on, in one file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tvqrap.cli import UserError, atomic_write

FORMAT = "vqprior-super-resolution-training-2"
Parts = Mapping[str, nn.Module | torch.optim.Optimizer]


def save_checkpoint(path: Path, parts: Parts, run: dict, progress: dict) -> None:
    """Writes a checkpoint atomically.

    Args:
        path: The file.
        parts: Modules and optimizers by name.
        run: Options that identify the training.
        progress: Progress of the training: numbers, strings, tensors, and lists and dicts of these.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"format": FORMAT, "run": run, "progress": progress}
    with atomic_write(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path, parts: Parts, run: dict) -> dict:
    """Restores the states of a checkpoint and returns its ``progress``.

    Raises:
        UserError: If there is no checkpoint, or it belongs to another training.
    """
    try:
        # Via the CPU, where an optimizer keeps its step counts.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: nothing to resume; start without --resume") from None
    except Exception as error:  # torch raises many kinds of errors for other files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version of train.py; start anew")
    for option, found in run.items():
        expected = state["run"].get(option)
        if expected != found:
            raise UserError(
                f"{path}: was started with {option} {expected}, not {found}; resume with the "
                "options it was started with"
            )
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError):
        raise UserError(
            f"{path}: belongs to another model or stage; resume with the options it was started "
            "with"
        ) from None
    return state["progress"]
