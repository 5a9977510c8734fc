"""Stops a training between two steps on Ctrl-C or SIGTERM."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGTERM is sent by a system that shuts down, and by torchrun to its processes.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_between_steps() -> Iterator[list[bool]]:
    """Collects Ctrl-C and SIGTERM in a list, so that steps are never interrupted.

    A second Ctrl-C acts at once. A second SIGTERM does not: schedulers send it to torchrun and its
    processes, and torchrun forwards it.
    """
    asked: list[bool] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        asked.append(True)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_trainer(worker: int = 0) -> None:
    """Ignores signals in a process that reads photos, which ends with the trainer.

    A terminal sends Ctrl-C to every process, and torchrun sends SIGTERM.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
