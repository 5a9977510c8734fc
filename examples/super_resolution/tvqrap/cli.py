"""Shared by all scripts: errors that a user can act on, argument types, and atomic writes.

A script's ``main`` raises ``UserError`` for anything the user can fix; ``run`` prints it as one
line and returns an exit status. A traceback on the screen therefore always means a bug.
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
USAGE = 2  # as argparse
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE, by number because Windows has no such name


class UserError(Exception):
    """An error that the user can fix; the message is one line."""

    exit_status = FAILURE


class UsageError(UserError):
    """The command line asks for something impossible."""

    exit_status = USAGE


def describe(error: BaseException) -> str:
    """Returns the one line that a user gets for ``error``."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    if is_out_of_memory(error):
        return "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is one of those that Python and torch raise when memory runs out."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def run(main: Callable[[], int | None]) -> int:
    """Runs a script's ``main`` and returns the exit status for ``sys.exit``.

    ``UserError``, errors of the operating system and a lack of memory become one line,
    ``error: ...``, on stderr; Ctrl-C gives status 130; a closed stdout ends the script quietly.
    Other exceptions are bugs and keep their traceback.

    Args:
        main: Returns an exit status, or ``None`` for success.
    """
    try:
        status = main() or 0
        sys.stdout.flush()  # a full disk or a closed pipe can still be reported here
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
    """Returns an argparse type for whole numbers of at least ``minimum``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {minimum}, got {text}"
            )
        return int(text)

    return number


def share(text: str) -> float:
    """An argparse type for numbers from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return value


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Writes a file atomically: it appears at ``path`` complete, or not at all.

    The bytes go to a temporary file in the same folder, which replaces ``path`` when the block
    ends without an exception; otherwise it is removed and ``path`` is unchanged.

    Args:
        path: The file to write or to replace.

    Yields:
        A binary file, open for writing.

    Raises:
        UserError: If the file cannot be written; the message names ``path`` and the reason.
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
            raise  # about another file, used inside the block
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        _remove(temporary)
        raise


def ensure_writable_folder(folder: Path) -> None:
    """Creates ``folder`` if it is missing, and checks that files can be written to it.

    Raises:
        UserError: If the folder cannot be created or written to; the message names it and the
            reason.
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
    """Checks before any work that the disk of ``folder`` has ``needed`` bytes free.

    Raises:
        UserError: If fewer are free; the message says how many.
    """
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:  # some network drives report 0 of 0
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
    """Redirects buffered output to nowhere, or Python may try to write it again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
