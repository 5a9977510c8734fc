"""Pairs of a large and a small image: read from two files, or made from the large one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from tvqrap.cli import UserError
from tvqrap.images.files import collect_inputs, preview, read_image
from tvqrap.images.levels import from_pillow
from tvqrap.models.assembly import SCALE

SMALLEST_SIDE = 32  # of a large image
BICUBIC = Image.Resampling.BICUBIC


class Pair(NamedTuple):
    """One scene, large and small: ``uint8`` levels ``(3, 4h, 4w)`` and ``(3, h, w)``."""

    name: str
    hr: Tensor
    lr: Tensor


def pair_loaders(folder: Path) -> list[Callable[[], Pair]]:
    """Finds the pairs ``HR/NAME`` and ``LR/NAME``; each is read when its loader is called.

    Raises:
        UserError: If a subfolder is missing or empty, or an image has no partner.
    """
    large, small = (
        {path.name: path for path in _images_in(folder / side)} for side in ("HR", "LR")
    )
    alone = [f"HR/{name}" for name in large.keys() - small.keys()]
    alone += [f"LR/{name}" for name in small.keys() - large.keys()]
    if alone:
        raise UserError(f"{folder}: no partner of the same name for {', '.join(sorted(alone))}")
    return [partial(read_pair, large[name], small[name]) for name in large]


def photo_loaders(folder: Path) -> list[Callable[[], Pair]]:
    """Finds large images; the small version of each is made when its loader is called.

    Raises:
        UserError: If the folder is missing or has no images.
    """
    return [partial(make_pair, path) for path in _images_in(folder)]


def read_pair(hr_path: Path, lr_path: Path) -> Pair:
    """Reads a pair from two files.

    Raises:
        UserError: If a file cannot be read, or the large image is not 4 times the small one.
    """
    hr, lr = (preview(read_image(path)) for path in (hr_path, lr_path))
    if hr.size != (lr.width * SCALE, lr.height * SCALE):
        raise UserError(
            f"{hr_path}: is {hr.width}x{hr.height}, which is not {SCALE} times the "
            f"{lr.width}x{lr.height} of {lr_path}"
        )
    return _checked(hr_path, hr, lr)


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


def _checked(path: Path, hr: Image.Image, lr: Image.Image) -> Pair:
    if min(hr.size) < SMALLEST_SIDE:
        raise UserError(
            f"{path}: is {hr.width}x{hr.height}; the smallest size that can be measured is "
            f"{SMALLEST_SIDE}x{SMALLEST_SIDE}"
        )
    return Pair(path.name, from_pillow(hr), from_pillow(lr))
