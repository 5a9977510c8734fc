"""How the indices of one codebook are written as bits, at little cost where there are none.

A column is one of four kinds. ``FULL`` and ``SYMBOL`` hold a number of fixed width per row, in
``SYMBOL`` with 0 for -1; ``EMPTY`` holds nothing: all rows are -1. ``BLOCKS`` goes by chunks of
rows. Of each chunk it holds which blocks have any index, which have no -1, a bit per row of the
blocks that have both, and then the indices, all padded to whole bytes.
"""

import numpy as np
import numpy.typing as npt

FULL, SYMBOL, EMPTY, BLOCKS = range(4)
CHUNK = 1 << 13  # rows at a time; a multiple of 8, so that chunks end on a byte
_BLOCK = 64  # rows
_Rows = npt.NDArray[np.int64]


def width_of(size: int, kind: int) -> int:
    """Returns the bits of one number in a column of a codebook of ``size`` codes."""
    return (size - (kind != SYMBOL)).bit_length()


def fixed_bytes(num_rows: int, size: int, kind: int) -> int:
    """Returns the bytes of a column, of ``BLOCKS`` the fewest."""
    if kind == BLOCKS:
        full, rest = divmod(num_rows, CHUNK)
        return 2 * (full * _num_bytes(CHUNK // _BLOCK) + _num_bytes(-(-rest // _BLOCK)))
    return 0 if kind == EMPTY else _num_bytes(num_rows * width_of(size, kind))


def pack_simply(column: npt.NDArray[np.integer], size: int) -> tuple[int, bytes]:
    """Returns the kind, ``FULL`` or ``SYMBOL``, and the bytes of ``column`` ``(n,)``."""
    kind = SYMBOL if column.min(initial=0) < 0 else FULL
    return kind, _pack(column, size, kind)


def pack_smallest(column: npt.NDArray[np.integer], size: int) -> tuple[int, bytes]:
    """Returns the kind that takes the fewest bytes, and these."""
    if column.min(initial=0) >= 0:
        return FULL, _pack(column, size, FULL)
    if column.max() < 0:
        return EMPTY, b""
    blocks = _pack(column, size, BLOCKS)
    if len(blocks) < fixed_bytes(len(column), size, SYMBOL):
        return BLOCKS, blocks
    return SYMBOL, _pack(column, size, SYMBOL)


def unpack_column(bits: "BitReader", column: _Rows, size: int, kind: int) -> None:
    """Fills ``column`` from the bytes of a column of this kind."""
    if kind == EMPTY:
        column.fill(-1)
        return
    width = width_of(size, kind)
    for start in range(0, len(column), CHUNK):
        rows = column[start : start + CHUNK]
        if kind == BLOCKS:
            present = _read_present(bits, len(rows))
            rows.fill(-1)
            rows[present] = _read_numbers(bits, int(present.sum()), width)
        else:
            rows[:] = _read_numbers(bits, len(rows), width) - (kind == SYMBOL)


class BitReader:
    """Reads bits from the start of ``data``; what is read at once begins on a byte."""

    def __init__(self, data: memoryview) -> None:
        self._left = np.frombuffer(data, np.uint8)

    @property
    def num_left(self) -> int:
        """Number of bytes that were not read."""
        return len(self._left)

    def read(self, count: int, width: int) -> npt.NDArray[np.uint8]:
        """Returns ``count`` rows of ``width`` bits, lowest first. Raises ``EOFError``."""
        length = _num_bytes(count * width)
        if length > len(self._left):
            raise EOFError
        part, self._left = self._left[:length], self._left[length:]
        return np.unpackbits(part, count=count * width, bitorder="little").reshape(count, width)


def _read_present(bits: BitReader, num_rows: int) -> npt.NDArray[np.bool_]:
    num_blocks = -(-num_rows // _BLOCK)
    has = bits.read(num_blocks, 1) == 1
    mixed = (has & (bits.read(num_blocks, 1) == 0))[:, 0]
    present = np.repeat(has, _BLOCK, axis=1)
    present[mixed] = bits.read(int(mixed.sum()), _BLOCK) == 1
    return present.reshape(-1)[:num_rows]


def _read_numbers(bits: BitReader, count: int, width: int) -> _Rows:
    digits = np.zeros((count, 64), dtype=np.uint8)
    digits[:, :width] = bits.read(count, width)
    return np.packbits(digits, axis=1, bitorder="little").view("<i8")[:, 0].astype(np.int64)


def _pack(column: npt.NDArray[np.integer], size: int, kind: int) -> bytes:
    parts: list[bytes] = []
    for start in range(0, len(column), CHUNK):
        rows = column[start : start + CHUNK].astype(np.int64)
        if kind == BLOCKS:
            present = rows >= 0
            blocks = _blocks(present)
            has, full = np.any(blocks, axis=1), ~np.any(_blocks(~present), axis=1)
            rows = rows[present]
            parts += [_to_bits(has), _to_bits(full), _to_bits(blocks[has & ~full])]
        parts.append(_to_numbers(rows + (kind == SYMBOL), width_of(size, kind)))
    return b"".join(parts)


def _num_bytes(bits: int) -> int:
    return -(-bits // 8)


def _blocks(rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Returns ``rows`` as ``(blocks, _BLOCK)``, with False after the last."""
    return np.pad(rows, (0, -len(rows) % _BLOCK)).reshape(-1, _BLOCK)


def _to_bits(bits: npt.NDArray[np.bool_]) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def _to_numbers(numbers: _Rows, width: int) -> bytes:
    digits = numbers.astype("<i8").view(np.uint8).reshape(-1, 8)
    bits = np.unpackbits(digits, axis=1, bitorder="little")[:, :width]
    return np.packbits(bits, bitorder="little").tobytes()
