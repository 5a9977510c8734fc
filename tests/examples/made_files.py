"""Image files made byte by byte, of kinds that Pillow cannot write."""

import struct
import zlib

import numpy as np

COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def png(width, height, depth, color, rows, *between):
    """A PNG file; ``between`` are chunks, kind and data, before the pixels."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(chunk(*more) for more in between)
    body += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_png(values, *between):
    """A PNG file of 16 bits ``(h, w, channels)``; each row is stored as differences to the left."""
    height, width, channels = values.shape
    rows = b""
    for row in values.astype(">u2"):
        flat = np.frombuffer(row.tobytes(), np.uint8)
        left = np.concatenate([np.zeros(2 * channels, np.uint8), flat[: -2 * channels]])
        rows += b"\1" + (flat - left).tobytes()
    return png(width, height, 16, COLOR_TYPES[channels], rows, *between)


def deep_tiff(values, order, *, packed):
    """A TIFF file of 16 bits ``(h, w, channels)`` in either byte order, packed or not."""
    height, width, channels = values.shape
    data = values.astype(order + "u2").tobytes()
    data = zlib.compress(data) if packed else data
    data += b"\0" * (len(data) % 2)
    short, long = 3, 4
    fields = [
        (256, long, width), (257, long, height), (258, short, None),
        (259, short, 8 if packed else 1), (262, short, 2), (273, long, 8), (277, short, channels),
        (278, long, height), (279, long, len(data)), *([(338, short, 2)] if channels == 4 else []),
    ]  # fmt: skip
    start = 8 + len(data)
    depths = start + 2 + 12 * len(fields) + 4
    file = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", start) + data
    file += struct.pack(order + "H", len(fields))
    for tag, kind, value in fields:
        count, value = (channels, depths) if value is None else (1, value)
        one = kind == short and count == 1
        file += struct.pack(order + "HHI", tag, kind, count)
        file += struct.pack(order + ("HH" if one else "I"), *((value, 0) if one else (value,)))
    return file + struct.pack(f"{order}I{channels}H", 0, *[16] * channels)
