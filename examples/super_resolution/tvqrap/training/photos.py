"""Photos on disk: listed at the start, decoded on demand."""

import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tvqrap.cli import UserError
from tvqrap.images.files import FORMATS, READ_SUFFIXES, preview, read_image

CACHE_BYTES = 512 * 2**20  # of decoded photos that a process caches


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

    Raises:
        UserError: If there is no photo, none is large enough, or one cannot be read.
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
        found = find_photos(source)
        # `disable=None` shows nothing if the output is not a terminal.
        bar = tqdm(found, "reading sizes", leave=False, disable=True if quiet else None)
        sides = [min(read_size(path)) for path in bar]
        self.paths = [path for path, side in zip(found, sides, strict=True) if side >= smallest]
        if not self.paths:
            raise UserError(
                f"{source}: every photo is smaller than the crop of {smallest} pixels (the "
                f"largest short side is {max(sides)}); pass a smaller --crop"
            )
        left_out = len(found) - len(self.paths)
        if left_out and not quiet:
            print(f"{left_out} photos smaller than the crop are left out", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns a photo.

        Raises:
            UserError: If the file cannot be read.
        """
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


def find_photos(source: Path) -> list[Path]:
    """Lists the photos in a folder, recursively, or those that a text file names.

    Raises:
        UserError: If there are none.
    """
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if _is_photo(path, source))
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


def _is_photo(path: Path, folder: Path) -> bool:
    hidden = any(part[0] == "." for part in path.relative_to(folder).parts)
    return path.suffix.lower() in READ_SUFFIXES and not hidden and path.is_file()
