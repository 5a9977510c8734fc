"""Finds the images that a command line means: files, folders and glob patterns."""

import glob
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from PIL import Image

from tvqrap.cli import UserError
from tvqrap.images.files import FORMATS

KINDS = Image.registered_extensions()
READ_SUFFIXES = frozenset(  # the reader of JPEG opens MPO as well
    suffix for suffix, kind in KINDS.items() if kind in (*FORMATS, "MPO")
)
# Of pictures that are not read: formats of Pillow and of cameras. Files of other kinds, such as
# texts and films, are expected beside photos.
UNREAD_SUFFIXES = (
    {s for s, kind in KINDS.items() if kind in Image.OPEN and kind not in ("HDF5", "MPEG")}
    | {".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf"}
) - READ_SUFFIXES
MOST_NAMED = 5


def collect_inputs(arguments: Iterable[str]) -> list[Path]:
    """Finds the images of files, folders and glob patterns.

    A file is taken whatever its name, even if it is missing (reading it will report that); a folder
    gives the images directly in it, and a pattern the images that it matches (``**`` for folders at
    all levels). Parts of a pattern that exist as they are written match themselves, so brackets in
    the name of a folder need no escape. Hidden files are skipped; a note on stderr names pictures
    of a format that cannot be read.

    Returns:
        Paths in the order of the arguments, sorted within each, every file once.

    Raises:
        UserError: If a folder or a pattern has no images.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        for path in _expand(argument):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def images_among(paths: Iterable[Path], where: str, *, quiet: bool = False) -> list[Path]:
    """Returns the images among paths, sorted, and names the pictures that cannot be read.

    Args:
        paths: Files and folders; hidden ones are skipped.
        where: What was searched, for the note.
        quiet: Whether to write no note.
    """
    files = [path for path in paths if path.name[0] != "." and path.is_file()]
    unread = sorted(path.name for path in files if path.suffix.lower() in UNREAD_SUFFIXES)
    if unread and not quiet:
        names = ", ".join(unread[:MOST_NAMED]) + (", ..." if len(unread) > MOST_NAMED else "")
        print(
            f"note: {where}: {len(unread)} passed over, of formats that cannot be read: {names}",
            file=sys.stderr,
        )
    return sorted(path for path in files if path.suffix.lower() in READ_SUFFIXES)


def _expand(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if path.is_dir():
        found = images_among(path.iterdir(), str(path))
        return found or _nothing(f"{path}: no images directly in this folder")
    if path.exists() or not glob.has_magic(argument):
        return [path]
    return images_among(_matches(path), argument) or _nothing(f"{argument}: no image matches")


def _matches(pattern: Path) -> list[Path]:
    """Resolves a pattern part by part; what exists as it is written is no pattern."""
    anchor = pattern.anchor
    found = [Path(anchor)]
    for part in pattern.parts[1 if anchor else 0 :]:
        found = [match for folder in found for match in _step(folder, part)]
    return found


def _step(folder: Path, part: str) -> list[Path]:
    if os.path.lexists(folder / part):
        return [folder / part]
    matches = glob.glob(part, root_dir=folder, recursive=True)  # noqa: PTH207  (no hidden files)
    itself = [folder] if part == "**" else []
    return itself + [folder / match for match in matches]


def _nothing(message: str) -> NoReturn:
    raise UserError(message)
