"""Reads colors of 16 bits, of which Pillow keeps the upper 8.

Pillow has no mode for them, but decodes either byte order. Read in the wrong order, a file gives
the lower 8 bits.
"""

import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HEAD = 2**16  # bytes in which headers say how many bits a channel has
OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
DEEP_GRAY_WITH_ALPHA = "LA;16B"
SWAPPED = re.compile(r"(RGB|RGBX|RGBA);16([BLN])")


def lower_bytes(path: Path, image: Image.Image, formats: tuple[str, ...]) -> Image.Image | None:
    """Returns an image with the lower 8 bits of each channel; None if Pillow cannot read them.

    Args:
        path: The file.
        image: The file as Pillow opened it, not loaded yet; it will load the upper 8 bits.
        formats: Formats of ``path``.
    """
    tiles = [_cut(tile) for tile in getattr(image, "tile", ())]
    swapped = [_swapped(tile) for tile in tiles]
    if not swapped or None in swapped:
        return None
    image.tile = tiles
    with Image.open(path, formats=formats) as again:
        again.tile = swapped
        again.load()
        return again


def is_deep_gray_with_alpha(image: Image.Image) -> bool:
    """Whether a file that is not loaded yet has 16 bits of gray and of alpha."""
    return any(_rawmode(tile) == DEEP_GRAY_WITH_ALPHA for tile in getattr(image, "tile", ()))


def joined(upper: Image.Image, lower: Image.Image, *, gray: bool) -> np.ndarray:
    """Returns the values ``(h, w, channels)`` of 16 bits; see ``is_deep_gray_with_alpha``."""
    low = np.array(lower)
    if gray:  # the lower image has all four bytes of a pixel: two of gray, two of alpha
        low = low[..., [1, 1, 1, 3]]
    return np.array(upper, dtype=np.uint16) * 256 + low


def stored_bits(path: Path, image: Image.Image) -> int:
    """Returns the bits of each channel that a file holds, as far as its header tells, else 8."""
    if image.format in ("JPEG2000", "AVIF"):
        return _bits_in_header(path, image.format)
    for tile in getattr(image, "tile", ()):
        raw = _rawmode(tile)
        largest = tile[3][1] if tile[0] in ("ppm", "ppm_plain") else 0
        if ";16" in raw or (isinstance(largest, int) and largest > 255):
            return 16
    return 8


def _rawmode(tile: tuple) -> str:
    return str(tile[3][0] if isinstance(tile[3], tuple) else tile[3])


def _cut(tile: tuple) -> tuple:
    """Returns a tile that cuts off the lower bytes; that of PPM rounds."""
    if (tile[0], tile[3]) == ("ppm", ("RGB", 65535)):
        return _tile(tile, "raw", ("RGB;16B", 0, 1))
    return tile


def _swapped(tile: tuple) -> tuple | None:
    """Returns a tile that reads the lower bytes."""
    options = tile[3]
    if options == DEEP_GRAY_WITH_ALPHA:
        options = "RGBA"
    elif (found := SWAPPED.fullmatch(_rawmode(tile))) is None:
        return None
    else:
        raw = f"{found[1]};16{OTHER[found[2]]}"
        options = (raw, *options[1:]) if isinstance(options, tuple) else raw
    return _tile(tile, tile[0], options)


def _tile(tile: tuple, codec: str, options: object) -> tuple:
    parts = (codec, *tile[1:3], options)
    return parts if type(tile) is tuple else type(tile)(*parts)  # named since Pillow 11.2


def _bits_in_header(path: Path, kind: str) -> int:
    with path.open("rb") as file:
        head = file.read(HEAD)
    mark, place = (b"\xff\x4f\xff\x51", 42) if kind == "JPEG2000" else (b"pixi", 9)
    start = head.find(mark)
    if start < 0 or start + place >= len(head):
        return 8
    byte = head[start + place]
    return (byte & 0x7F) + 1 if kind == "JPEG2000" else byte
