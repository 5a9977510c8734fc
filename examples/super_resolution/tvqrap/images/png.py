"""Writes PNG files of 8 or 16 bits per channel, a few rows at a time.

Pillow cannot write colors of 16 bits, and would need a copy of the whole image.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOR_TYPES = {1: 0, 3: 2, 2: 4, 4: 6}  # by the number of channels
LEVEL = 6


def write_png(
    file: BinaryIO,
    size: tuple[int, int],
    strips: Iterator[np.ndarray],
    *,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
) -> None:
    """Writes an image from top to bottom.

    Args:
        file: The open file.
        size: Width and height.
        strips: Rows ``(rows, width, channels)`` of ``uint8`` or ``uint16``: gray, gray and alpha,
            RGB, or RGB and alpha.
        icc_profile: Color profile.
        exif: Metadata.
    """
    first = next(strips)
    channels, depth = first.shape[2], 8 * first.itemsize
    file.write(SIGNATURE)
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", *size, depth, COLOR_TYPES[channels], 0, 0, 0))
    if icc_profile is not None:
        _chunk(file, b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    if exif is not None:
        _chunk(file, b"eXIf", exif.removeprefix(b"Exif\0\0"))
    packer = zlib.compressobj(LEVEL)
    above = np.zeros(first[0].nbytes, np.uint8)
    strip: np.ndarray | None = first
    while strip is not None:
        rows = np.ascontiguousarray(strip.astype(strip.dtype.newbyteorder(">"), copy=False))
        rows = rows.view(np.uint8).reshape(len(strip), -1)
        _data(file, packer.compress(_filtered(rows, above, channels * depth // 8)))
        above, strip = rows[-1], next(strips, None)
    _data(file, packer.flush())
    _chunk(file, b"IEND", b"")


def _filtered(rows: np.ndarray, above: np.ndarray, pixel: int) -> bytes:
    """Returns rows with the type of their filter: of three, the one with the least differences.

    Args:
        rows: Bytes ``(rows, n)``.
        above: The row before them.
        pixel: Bytes per pixel.
    """
    up = np.vstack([above, rows[:-1]])
    left = np.zeros_like(rows)
    left[:, pixel:] = rows[:, :-pixel]
    mean = ((left.astype(np.uint16) + up) // 2).astype(np.uint8)
    options = np.stack([rows - left, rows - up, rows - mean])
    costs = np.abs(options.view(np.int8).astype(np.int16)).sum(axis=2, dtype=np.int64)
    best = costs.argmin(axis=0)
    result = np.empty((len(rows), rows.shape[1] + 1), np.uint8)
    result[:, 0] = best + 1  # the types are 1, 2 and 3
    result[:, 1:] = np.take_along_axis(options, best[None, :, None], axis=0)[0]
    return result.tobytes()


def _data(file: BinaryIO, data: bytes) -> None:
    if data:
        _chunk(file, b"IDAT", data)


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data)
    file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
