"""Pairs of a large and a small image: read from two files, or made from the large one."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from tvqrap.cli import UserError
from tvqrap.images.files import preview, read_image
from tvqrap.images.inputs import collect_inputs
from tvqrap.images.levels import from_pillow
from tvqrap.models.assembly import SCALE

SMALLEST_SIDE = 32  # of a large image
MOST_CUT = 32  # pixels of a side; more would hardly be of the same image
MARK = re.compile(rf"[_-]?x{SCALE}$", re.IGNORECASE)  # at the end of a small image's name
BICUBIC = Image.Resampling.BICUBIC


class Pair(NamedTuple):
    """One scene, large and small: ``uint8`` levels ``(3, 4h, 4w)`` and ``(3, h, w)``."""

    name: str
    hr: Tensor
    lr: Tensor
    note: str = ""  # what was done to the files


def pair_loaders(folder: Path) -> list[Callable[[], Pair]]:
    """Finds the pairs of ``HR`` and ``LR``; each is read when its loader is called.

    Partners have the same name: ``HR/0801.png`` with ``LR/0801.png``, else with another suffix
    (``LR/0801.jpg``) or marked as reduced (``LR/0801x4.png``).

    Raises:
        UserError: If a subfolder is missing or empty, or an image has no partner or several.
    """
    large, small = (_images_in(folder / side) for side in ("HR", "LR"))
    partners: dict[Path, list[Path]] = {path: [] for path in large}
    alone = []
    for path in small:
        whole = _original(path, large)
        alone.append(path) if whole is None else partners[whole].append(path)
    for whole, parts in partners.items():
        alone += [whole, *parts] if len(parts) != 1 else []
    if alone:
        names = ", ".join(sorted(f"{path.parent.name}/{path.name}" for path in alone))
        raise UserError(
            f"{folder}: no partner, or several, of the same name for {names}; HR/NAME.png and "
            f"LR/NAME.png or LR/NAMEx{SCALE}.png are partners"
        )
    return [partial(read_pair, whole, *parts) for whole, parts in partners.items()]


def photo_loaders(folder: Path) -> list[Callable[[], Pair]]:
    """Finds large images; the small version of each is made when its loader is called.

    Raises:
        UserError: If the folder is missing or has no images.
    """
    return [partial(make_pair, path) for path in _images_in(folder)]


def read_pair(hr_path: Path, lr_path: Path) -> Pair:
    """Reads a pair from two files, and cuts both at the right and at the bottom to the same part.

    Data sets are made by cutting the large image before it is reduced, to multiples of up to 32, or
    by rounding the size of the small one up.

    Raises:
        UserError: If a file cannot be read, or the large image is not about 4 times the small one.
    """
    hr, lr = (preview(read_image(path)) for path in (hr_path, lr_path))
    width, height = (min(n // SCALE, m) for n, m in zip(hr.size, lr.size, strict=True))
    beyond = [n - SCALE * m for n, m in zip(hr.size, lr.size, strict=True)]
    if not all(-SCALE < rest < MOST_CUT for rest in beyond):
        raise UserError(
            f"{hr_path}: is {hr.width}x{hr.height}, which is not {SCALE} times the "
            f"{lr.width}x{lr.height} of {lr_path}, nor up to {MOST_CUT - 1} pixels more"
        )
    note = f"{hr_path}: {width * SCALE}x{height * SCALE} of {hr.width}x{hr.height} are measured"
    hr, lr = hr.crop((0, 0, width * SCALE, height * SCALE)), lr.crop((0, 0, width, height))
    return _checked(hr_path, hr, lr, note if any(beyond) else "")


def make_pair(path: Path) -> Pair:
    """Reads a large image, cuts it to multiples of 4, and makes the small one from it.

    Raises:
        UserError: If the file cannot be read or is too small to be measured.
    """
    hr = preview(read_image(path))
    width, height = (side // SCALE for side in hr.size)
    hr = hr.crop((0, 0, width * SCALE, height * SCALE))
    return _checked(path, hr, hr.resize((max(width, 1), max(height, 1)), BICUBIC))


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return collect_inputs([str(folder)])


def _original(path: Path, large: list[Path]) -> Path | None:
    """Returns the large image of which a small one has the name; None if there is none."""
    stems = (path.stem, MARK.sub("", path.stem))
    same = [whole for whole in large if whole.name == path.name]
    return next(iter(same or [whole for whole in large if whole.stem in stems]), None)


def _checked(path: Path, hr: Image.Image, lr: Image.Image, note: str = "") -> Pair:
    if min(hr.size) < SMALLEST_SIDE:
        raise UserError(
            f"{path}: is {hr.width}x{hr.height}; the smallest size that can be measured is "
            f"{SMALLEST_SIDE}x{SMALLEST_SIDE}"
        )
    return Pair(path.name, from_pillow(hr), from_pillow(lr), note)
