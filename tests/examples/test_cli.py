"""One line and a status for every mishap; files appear whole or not at all."""

import argparse
import errno
import os
import stat
import subprocess
import sys

import pytest

from tests.examples.conftest import EXAMPLE
from tvqrap.cli import (
    UsageError,
    UserError,
    at_least,
    atomic_write,
    ensure_writable_folder,
    run,
)


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("cat.png: is empty"), 1, "error: cat.png: is empty"),
        (UsageError("no such thing"), 2, "error: no such thing"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "error: x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device"),
        (OSError("encoder error -2"), 1, "error: encoder error -2"),
        (MemoryError(), 1, "error: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 1, "error: not enough"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_mishaps_are_one_line_and_a_status(error, status, line, capsys):
    assert run(raising(error)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip().startswith(line)
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("x"), KeyError("y")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run(raising(error))


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_what_main_returns(returned, status):
    assert run(lambda: returned) == status


def script(body, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLE)!r})\nfrom tvqrap.cli import run\n"
        f"def main():\n    {body}\nsys.exit(run(main))\n"
    )
    return [sys.executable, str(path)]


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_is_no_error(lines, tmp_path):
    command = script(f"print('x\\n' * {lines})", tmp_path)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_under_stdout_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            script("print('x')", tmp_path), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device\n"


def test_atomic_write_replaces_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_atomic_write_leaves_no_trace_of_a_failure(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def attempt():
        with atomic_write(path) as file:
            file.write(b"half")
            raise error("no")

    with pytest.raises(error, match="no"):
        attempt()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_names_the_file_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match=r"file: cannot be written: No space left on device$"),
        atomic_write(tmp_path / "file") as file,
    ):
        file.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_names_a_file_whose_folder_is_missing(tmp_path):
    path = tmp_path / "missing" / "file"
    with (
        pytest.raises(UserError, match="missing/file: cannot be written: No such"),
        atomic_write(path),
    ):
        pass


def test_atomic_write_does_not_take_the_blame_for_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "file"):
        (tmp_path / "elsewhere").read_bytes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_atomic_write_gives_the_usual_permissions(tmp_path):
    usual, ours = tmp_path / "usual", tmp_path / "ours"
    usual.write_bytes(b"")
    with atomic_write(ours):
        pass
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    ensure_writable_folder(folder)
    assert list(folder.iterdir()) == []


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"file: cannot write to this folder: it is not a folder$"):
        ensure_writable_folder(path)


def test_a_folder_that_refuses_is_named(tmp_path, monkeypatch):
    def refuse(self, data):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "write_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot write to this folder: Permission denied$"):
        ensure_writable_folder(tmp_path)


def test_at_least():
    assert at_least(8)("8") == 8
    for text in ("7", "-9", "x", "8.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="of at least 8"):
            at_least(8)(text)
