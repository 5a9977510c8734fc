"""What the scripts here share at the edges: errors a user can act on, and files written whole.

A script's ``main`` raises ``UserError`` for anything its user can put right; ``run`` turns that
into one line and an exit status. A traceback on the screen therefore always means a bug.
"""

import argparse
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

FAILURE = 1
USAGE = 2  # the status of argparse, too
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE, by number because Windows has no such name


class UserError(Exception):
    """A mistake or a mishap that the user can put right; the message is one clear line."""

    exit_status = FAILURE


class UsageError(UserError):
    """The command line asks for something that cannot be."""

    exit_status = USAGE


def describe(error: BaseException) -> str:
    """The one line that a user gets for ``error``."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    if is_out_of_memory(error):
        return "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says, in any of the ways of Python and torch, that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def run(main: Callable[[], int | None]) -> int:
    """Runs a script's ``main`` and returns the exit status for ``sys.exit``.

    ``UserError``, failures of the operating system and a lack of memory become one line,
    ``error: ...``, on stderr; Ctrl-C gives status 130; a reader of stdout that has gone away ends
    the script quietly. Other exceptions are bugs and keep their traceback.

    Args:
        main: returns an exit status, or ``None`` for success.
    """
    try:
        status = main() or 0
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
    except UserError as error:
        return _fail(error, error.exit_status)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except OSError as error:
        return _fail(error, FAILURE)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(error, FAILURE)
    return status


def at_least(minimum: int) -> Callable[[str], int]:
    """An argument type: whole numbers from ``minimum`` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} on: {text}")
        return int(text)

    return number


def share(text: str) -> float:
    """An argument type: from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1: {text}")
    return value


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears at ``path`` whole, or not at all.

    The bytes go to a temporary file in the same folder, which replaces ``path`` when the block
    ends without an exception; otherwise it is removed and ``path`` is as it was.

    Args:
        path: the file to write or to replace.

    Yields:
        A binary file, open for writing.

    Raises:
        UserError: the file cannot be written; the message names ``path`` and says why.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        if error.filename not in (None, str(temporary)):
            raise  # about some other file, used inside the block
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        _remove(temporary)
        raise


def ensure_writable_folder(folder: Path) -> None:
    """Makes ``folder`` where it is missing and proves, with a file, that it can be written to.

    Raises:
        UserError: the folder cannot be made or written to; the message names it and says why.
    """
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as error:
        reason = "it is not a folder" if folder.is_file() else error.strerror
        raise UserError(f"{folder}: cannot write to this folder: {reason}") from error
    finally:
        _remove(probe)


def check_free_space(folder: Path, needed: int) -> None:
    """Finds a disk that is too full, before there is work to lose.

    Raises:
        UserError: fewer than ``needed`` bytes are free; the message says how many are.
    """
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:  # some network drives say 0 of 0
        raise UserError(
            f"{folder}: only {usage.free / 1e6:.1f} MB are free on this disk, "
            f"and the result may need {needed / 1e6:.1f} MB"
        )


def _fail(error: BaseException, status: int) -> int:
    print(f"error: {describe(error)}", file=sys.stderr)
    return status


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _discard_stdout() -> None:
    """Sends what is still buffered nowhere, or Python may try again, and complain, as it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
