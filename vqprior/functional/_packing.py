"""Bit packing of indices with checksums, and the bits that indices cost."""

import math
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_integer
from vqprior._precision import widest_float
from vqprior.functional._index_columns import (
    BLOCKS,
    EMPTY,
    FULL,
    SYMBOL,
    BitReader,
    fixed_bytes,
    pack_simply,
    pack_smallest,
    unpack_column,
)

_MAGIC = b"vqix"
_KINDS = {1: (FULL, SYMBOL), 2: (FULL, SYMBOL, EMPTY, BLOCKS)}  # of columns, by format version
# Little-endian: magic, version, number of leading dimensions, number of columns (0: no column
# dimension). Then the leading sizes and the codebook sizes (64 bits each), the kind of each column
# (8 bits each), and the checksums of payload and header (32 bits each).
_PREFIX = struct.Struct("<4sHHI")
_MAX_SIZE = 1 << 62
# Some columns take no or hardly any bits: without limits, a few bytes could claim any memory.
_MAX_FREE_INDICES = 1 << 24
_MAX_INDICES_PER_BYTE = 64


def pack_indices(indices: Tensor, codebook_sizes: int | Sequence[int]) -> bytes:
    """Packs indices into bytes, with ``ceil(log2(k))`` bits per index.

    In a column with -1, an entry takes at most about one bit more; stretches of -1 take next to
    nothing, and a column without any index takes no bytes. Columns are padded to whole bytes. A
    header stores the shape, the codebook sizes and checksums, so ``unpack_indices`` needs only the
    bytes and detects corruption. Runs on the host, in bounded memory beyond the result.

    Args:
        indices: Indices of one codebook, or of several in the last dimension; -1 for masked or
            dropped tokens.
        codebook_sizes: The codebook size for indices ``(...)``, or ``q`` sizes for indices
            ``(..., q)``, each in ``[1, 2**62]``.

    Returns:
        A header of ``20 + 8 * dimensions + 9 * q`` bytes, followed by the packed columns.

    Raises:
        TypeError: If ``indices`` is not an integer tensor.
        ValueError: If a size is out of range, the last dimension of ``indices`` is not ``q``,
            an index is outside ``[-1, k)``, or more than ``2**24`` indices take 0 bits.

    Shape:
        - ``indices``: ``(...)``, or ``(..., q)`` for ``q`` sizes

    Examples:
        >>> import torch
        >>> from vqprior.functional import pack_indices, unpack_indices
        >>> indices = torch.randint(0, 1024, (16, 16))
        >>> data = pack_indices(indices, 1024)
        >>> len(data) - 45  # 256 indices of 10 bits, after the header
        320
        >>> torch.equal(unpack_indices(data), indices)
        True
    """
    sizes, has_columns = _sizes_of_columns(indices, codebook_sizes)
    columns = indices.detach().cpu().reshape(-1, len(sizes)).numpy()
    ranges = [_range(column) for column in columns.T]
    for place, (size, (low, high)) in enumerate(zip(sizes, ranges, strict=True)):
        if low < -1 or high >= size:
            raise ValueError(
                f"`indices` must be in [-1, {size}) in column {place}, got values from {low} to "
                f"{high}. Pass the size of the codebook that produced them."
            )
    num_free = len(columns) * sum(
        k == 1 and low == 0 for k, (low, _) in zip(sizes, ranges, strict=True)
    )
    if num_free > _MAX_FREE_INDICES:
        raise ValueError(
            f"`indices` must hold at most {_MAX_FREE_INDICES} entries of codebooks of one code, "
            f"got {num_free}. Drop these columns: they carry no information."
        )
    kinds, payload = _pack_columns(columns, sizes, pack_smallest)
    if columns.size > _most_indices(len(payload)):  # `unpack_indices` would take it for a forgery
        kinds, payload = _pack_columns(columns, sizes, pack_simply)
    lead = indices.shape[:-1] if has_columns else indices.shape
    version = min(version for version, known in _KINDS.items() if set(kinds) <= set(known))
    header = _PREFIX.pack(_MAGIC, version, len(lead), len(sizes) if has_columns else 0)
    header += struct.pack(f"<{len(lead)}Q{len(sizes)}Q{len(sizes)}B", *lead, *sizes, *kinds)
    header += struct.pack("<I", zlib.crc32(payload))
    return header + struct.pack("<I", zlib.crc32(header)) + payload


def unpack_indices(data: bytes) -> Tensor:
    """Restores the indices that ``pack_indices`` packed.

    Safe for untrusted data: memory is allocated only after the checksum of the header and the
    length of ``data`` match, and a changed, missing or additional byte raises.

    Args:
        data: The result of ``pack_indices``.

    Returns:
        The indices, as ``int64`` on the CPU.

    Raises:
        TypeError: If ``data`` is not bytes.
        ValueError: If ``data`` is not the unchanged result of ``pack_indices``, or has an unknown
            format version.

    Shape:
        - returns: ``(...)``, or ``(..., q)``, as packed

    Examples:
        >>> import torch
        >>> from vqprior.functional import pack_indices, unpack_indices
        >>> unpack_indices(pack_indices(torch.tensor([[5, 0], [-1, 2]]), (8, 3)))
        tensor([[ 5,  0],
                [-1,  2]])
    """
    if not isinstance(data, bytes):
        raise TypeError(f"`data` must be bytes, got {type(data).__name__}.")
    lead, sizes, kinds, has_columns, start = _read_header(data)
    num_rows = math.prod(lead)
    payload = memoryview(data)[start + 8 :]
    fewest = sum(fixed_bytes(num_rows, *part) for part in zip(sizes, kinds, strict=True))
    if len(payload) < fewest or (len(payload) > fewest and BLOCKS not in kinds):
        raise _damaged(f"{len(payload)} bytes of indices instead of {fewest}")
    if zlib.crc32(payload) != struct.unpack_from("<I", data, start)[0]:
        raise _damaged("indices with a wrong checksum")
    if num_rows * len(sizes) > _most_indices(len(payload)):
        raise _damaged(f"{num_rows * len(sizes)} indices in {len(payload)} bytes")
    columns = np.empty((num_rows, len(sizes)), dtype=np.int64)
    _unpack_columns(payload, columns, sizes, kinds)
    return torch.from_numpy(columns.reshape((*lead, len(sizes)) if has_columns else lead))


def index_bits(indices: Tensor, codebook_sizes: int | Sequence[int]) -> Tensor:
    """Counts the bits of each sample's indices, without entropy coding.

    Returns the sum of ``log2(k)`` over the entries that are not -1, so masked tokens and dropped
    codebooks cost nothing. Dimension 0 is the sample; in indices ``(n,)`` each token is a sample.
    ``pack_indices`` can need more, since it rounds each index up to whole bits.

    Args:
        indices: Indices of one codebook, or of several in the last dimension; -1 for masked or
            dropped tokens.
        codebook_sizes: The codebook size for indices ``(...)``, or ``q`` sizes for indices
            ``(..., q)``, each in ``[1, 2**62]``.

    Returns:
        Bits per sample, as ``float64`` (``float32`` on Apple GPUs).

    Raises:
        TypeError: If ``indices`` is not an integer tensor.
        ValueError: If a size is out of range or the last dimension of ``indices`` is not ``q``.

    Shape:
        - ``indices``: ``(b, ...)``, or ``(b, ..., q)`` for ``q`` sizes
        - returns: ``(b,)``, or ``()`` for the indices of one token

    Examples:
        Bits per image, and per pixel of 128 x 128 images:

        >>> import torch
        >>> from vqprior.functional import index_bits
        >>> indices = torch.randint(0, 512, (2, 16, 16))
        >>> bits = index_bits(indices, 512)
        >>> bits, bits / 128**2
        (tensor([2304., 2304.], dtype=torch.float64), tensor([0.1406, 0.1406], dtype=torch.float64))

        Bits per second of audio with 50 tokens per second and four codebooks, of which the second
        clip uses two:

        >>> indices = torch.randint(0, 1024, (2, 150, 4))
        >>> indices[1, :, 2:] = -1
        >>> index_bits(indices, (1024,) * 4) / (150 / 50)
        tensor([2000., 1000.], dtype=torch.float64)

        For bits per token, flatten the tokens into dimension 0:

        >>> index_bits(indices.flatten(0, 1), (1024,) * 4).mean()
        tensor(30., dtype=torch.float64)
    """
    sizes, has_columns = _sizes_of_columns(indices, codebook_sizes)
    emitted = indices >= 0 if has_columns else (indices >= 0).unsqueeze(-1)
    if emitted.ndim > 2:
        emitted = emitted.flatten(1, -2).sum(dim=1)
    dtype, device = widest_float(indices.device), indices.device
    costs = torch.tensor([math.log2(k) for k in sizes], dtype=dtype, device=device)
    return (emitted * costs).sum(dim=-1)


def _sizes_of_columns(
    indices: Tensor, codebook_sizes: int | Sequence[int]
) -> tuple[list[int], bool]:
    """Checks the input; returns the size of each column and whether there is a column dimension."""
    check_integer("indices", indices)
    has_columns = isinstance(codebook_sizes, Sequence)
    sizes = list(codebook_sizes) if isinstance(codebook_sizes, Sequence) else [codebook_sizes]
    if not sizes:
        raise ValueError("`codebook_sizes` must hold at least one size, got none.")
    check_at_least("codebook_sizes", min(sizes), 1)
    if max(sizes) > _MAX_SIZE:
        raise ValueError(f"`codebook_sizes` must be at most 2**62, got {max(sizes)}.")
    if has_columns and (indices.ndim == 0 or indices.shape[-1] != len(sizes)):
        raise ValueError(
            f"`indices` must have shape (..., {len(sizes)}), one entry for each codebook, got "
            f"{tuple(indices.shape)}. For one codebook, pass its size as an int."
        )
    return sizes, has_columns


def _most_indices(num_bytes: int) -> int:
    return _MAX_FREE_INDICES + _MAX_INDICES_PER_BYTE * num_bytes


def _range(column: npt.NDArray[np.integer]) -> tuple[int, int]:
    return (int(column.min()), int(column.max())) if column.size else (0, 0)


def _pack_columns(
    columns: npt.NDArray[np.integer],
    sizes: Sequence[int],
    pack: Callable[[npt.NDArray[np.integer], int], tuple[int, bytes]],
) -> tuple[list[int], bytes]:
    packed = [pack(column, size) for column, size in zip(columns.T, sizes, strict=True)]
    return [kind for kind, _ in packed], b"".join(part for _, part in packed)


def _unpack_columns(
    payload: memoryview, columns: npt.NDArray[np.int64], sizes: Sequence[int], kinds: Sequence[int]
) -> None:
    bits = BitReader(payload)
    for column, size, kind in zip(columns.T, sizes, kinds, strict=True):
        try:
            unpack_column(bits, column, size, kind)
        except EOFError:
            raise _damaged("too few bytes of indices") from None
        if _range(column)[1] >= size:
            raise _damaged(f"an index of {size} or more")
    if bits.num_left:
        raise _damaged(f"{bits.num_left} bytes after the indices")


def _read_header(
    data: bytes,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, int]:
    """Returns leading sizes, codebook sizes, kinds of columns, and two layout values.

    These are whether there is a column dimension, and the offset of the checksums.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise _damaged(f"bytes that start with {data[: len(_MAGIC)]!r}")
    if len(data) < _PREFIX.size:
        raise _damaged(f"{len(data)} bytes, less than a header")
    _, version, num_lead, num_columns = _PREFIX.unpack_from(data)
    if version not in _KINDS:
        raise ValueError(
            f"`data` must have format version 1 or 2, got {version}. Read it with a version of "
            "vqprior at least as new as the one that wrote it."
        )
    num_sizes = max(num_columns, 1)
    start = _PREFIX.size + 8 * num_lead + 9 * num_sizes
    if len(data) < start + 8:
        raise _damaged(f"{len(data)} bytes, less than a header")
    if zlib.crc32(memoryview(data)[: start + 4]) != struct.unpack_from("<I", data, start + 4)[0]:
        raise _damaged("a header with a wrong checksum")
    numbers = struct.unpack_from(f"<{num_lead + num_sizes}Q{num_sizes}B", data, _PREFIX.size)
    lead, sizes = numbers[:num_lead], numbers[num_lead:-num_sizes]
    # A checksum can be forged; these bounds keep all later arithmetic in 64 bits.
    entries = math.prod(max(size, 1) for size in lead) * num_sizes
    kinds = numbers[-num_sizes:]
    if entries > _MAX_SIZE or not all(1 <= k <= _MAX_SIZE for k in sizes):
        raise _damaged("a header with sizes out of range")
    if not set(kinds) <= set(_KINDS[version]):
        raise _damaged("a header with unknown kinds of columns")
    return lead, sizes, kinds, num_columns > 0, start


def _damaged(what: str) -> ValueError:
    return ValueError(
        f"`data` must be the unchanged result of `pack_indices`, got {what}. Copy or download it "
        "again."
    )
