"""Ends a training between two steps, when somebody asks for it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGTERM is what a system that shuts down sends, or torchrun to the processes it has started.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_between_steps() -> Iterator[list[bool]]:
    """Collects Ctrl-C and SIGTERM in a list, so that a step is never torn.

    A second Ctrl-C acts at once. A second SIGTERM does not: schedulers send it to torchrun and to
    its processes, to which torchrun sends it again.
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
    """For a process that reads photos: it ends with the trainer, which may want another batch.

    A terminal sends Ctrl-C to every process, and torchrun its SIGTERM as well.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
