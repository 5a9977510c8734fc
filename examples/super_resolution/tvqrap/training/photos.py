"""Photos on disk: listed at the start, decoded on demand.

A photo that cannot be read never ends a training: it is left out at the start, or another takes its
place later.
"""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from PIL import Image
from tqdm import tqdm

from tvqrap.cli import UserError
from tvqrap.images.files import FORMATS, preview, read_image
from tvqrap.images.inputs import images_among

CACHE_BYTES = 512 * 2**20  # of decoded photos that a process caches


class Found(NamedTuple):
    """A photo, and why others that should have been it could not be read, a line for each file."""

    photo: np.ndarray
    damage: tuple[str, ...]


class PhotoFiles:
    """A sequence of photos as 8-bit RGB ``(h, w, 3)``.

    At the start only sizes are read. Decoded photos are cached, so those of a small data set are
    decoded once.

    Args:
        source: A folder, searched recursively, in order of names; or a text file with one path per
            line, relative to the file, in its order.
        smallest: Photos with a side shorter than this, in pixels, are left out.
        capacity: Bytes of decoded photos to cache.
        quiet: Whether to show no progress and no notes.

    Attributes:
        paths: The photos that can be used, as far as their headers tell.

    Raises:
        UserError: If there is no photo, none is large enough, or none can be read.
    """

    def __init__(
        self,
        source: Path,
        *,
        smallest: int = 1,
        capacity: int = CACHE_BYTES,
        quiet: bool = False,
    ) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._damage: dict[int, str] = {}
        found = find_photos(source, quiet=quiet)
        # `disable=None` shows nothing if the output is not a terminal.
        bar = tqdm(found, "reading sizes", leave=False, disable=True if quiet else None)
        sides, damage = {}, []
        for path in bar:
            try:
                sides[path] = min(read_size(path))
            except UserError as error:
                damage.append(str(error))
        check_damage(damage, len(found), "is left out", quiet=quiet)
        self.paths = [path for path in found if sides.get(path, 0) >= smallest]
        if not self.paths:
            raise UserError(
                f"{source}: every photo is smaller than the crop of {smallest} pixels (the "
                f"largest short side is {max(sides.values())}); pass a smaller --crop"
            )
        left_out = len(found) - len(damage) - len(self.paths)
        if left_out and not quiet:
            print(f"{left_out} photos smaller than the crop are left out", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns a photo, or the next one that can be read; see ``find``."""
        return self.find(number).photo

    @property
    def fingerprint(self) -> list[int]:
        """The number of photos, and a number that changes with their names and order."""
        return [len(self.paths), crc32("\n".join(path.name for path in self.paths).encode())]

    def find(self, number: int) -> Found:
        """Returns a photo, or the next one after it that can be read.

        The result depends only on which photos can be read, so a resumed training gets the same.

        Raises:
            UserError: If none of all photos can be read.
        """
        count, damage = len(self.paths), []
        for place in (at % count for at in range(number, number + count)):
            if place not in self._damage:
                try:
                    return Found(self._read(place), tuple(damage))
                except UserError as error:
                    self._damage[place] = str(error)
            damage.append(self._damage[place])
        raise none_is_readable(damage)

    def _read(self, number: int) -> np.ndarray:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        photo = np.asarray(preview(read_image(self.paths[number])))
        self._kept[number] = photo
        self._bytes += photo.nbytes
        while self._bytes > self.capacity:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes
        return photo


def name_damage(damage: Iterable[str], named: set[str]) -> None:
    """Writes a note to stderr about each replaced file that is not in ``named``, and adds it."""
    for line in dict.fromkeys(damage):
        if line not in named:
            tqdm.write(f"note: {line}; other photos take its place", file=sys.stderr)
        named.add(line)


def note_changes(before: list[int], now: list[int]) -> None:
    """Writes a note to stderr if the ``fingerprint`` of the photos has changed."""
    if before != now:
        print(
            f"note: the photos have changed, there were {before[0]} and are {now[0]}; the training "
            "goes on with these",
            file=sys.stderr,
        )


def none_is_readable(damage: list[str]) -> UserError:
    """Returns the error of a training whose photos are all damaged."""
    return UserError(f"none of the {len(damage)} photos can be read; the first: {damage[0]}")


def check_damage(damage: list[str], count: int, consequence: str, *, quiet: bool = False) -> None:
    """Writes a note to stderr for each of ``count`` photos that cannot be read.

    Raises:
        UserError: If these are all of them.
    """
    if damage and len(damage) == count:
        raise none_is_readable(damage)
    for line in () if quiet else damage:
        tqdm.write(f"note: {line}; it {consequence}", file=sys.stderr)


def find_photos(source: Path, *, quiet: bool = False) -> list[Path]:
    """Lists the photos in a folder, recursively, or those that a text file names.

    A note on stderr names pictures of a format that cannot be read, unless ``quiet``.

    Raises:
        UserError: If there are none.
    """
    if source.is_dir():
        inside = (path for path in source.rglob("*") if not _is_hidden(path, source))
        found = images_among(inside, str(source), quiet=quiet)
        if not found:
            raise UserError(f"{source}: no images in this folder or in those inside it")
        return found
    if not source.exists():
        raise UserError(f"{source}: no such folder or list of photos")
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(
            f"{source}: not a list of photos; expected a folder, or a text file with one path per "
            "line"
        ) from None
    found = [source.parent / line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{source}: this list of photos is empty")
    return found


def read_size(path: Path) -> tuple[int, int]:
    """Returns the width and height of an image without decoding it.

    Raises:
        UserError: If the file is not a readable image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return image.size
    except Exception:  # decoders raise many kinds of errors, which `read_image` explains
        return read_image(path).size


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part[0] == "." for part in path.relative_to(folder).parts)
