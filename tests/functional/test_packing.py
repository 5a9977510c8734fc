"""Packed indices: exact round trips, exact sizes, and no damage that goes unnoticed."""

import contextlib
import math
import re
import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.contracts.observers import NoHostSync
from vqprior.functional import index_bits, pack_indices, unpack_indices
from vqprior.functional._index_columns import BLOCKS, CHUNK, EMPTY

DAMAGED = r"^`data` must be the unchanged result of `pack_indices`, got .+\. Copy or download it"


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def header_size(num_lead, num_columns):
    return 20 + 8 * num_lead + 9 * num_columns


def bits_for(symbols):
    """By trial: the fewest that can tell the symbols apart."""
    width = 0
    while 2**width < symbols:
        width += 1
    return width


def in_bytes(bits):
    return math.ceil(bits / 8)


def column_bytes(column, k):
    """The smaller of -1 as one more symbol and of marks on blocks of 64 and their tokens."""
    column = column.tolist()
    if min(column, default=0) >= 0:
        return in_bytes(len(column) * bits_for(k))
    if max(column) < 0:
        return 0
    marked = 0
    for start in range(0, len(column), CHUNK):
        chunk = column[start : start + CHUNK]
        blocks = [chunk[i : i + 64] for i in range(0, len(chunk), 64)]
        mixed = [block for block in blocks if min(block) < 0 <= max(block)]
        marked += 2 * in_bytes(len(blocks)) + 8 * len(mixed)
        marked += in_bytes(sum(index >= 0 for index in chunk) * bits_for(k))
    return min(marked, in_bytes(len(column) * bits_for(k + 1)))


sizes = st.one_of(
    st.integers(1, 9),
    st.integers(0, 62).flatmap(
        lambda bits: st.integers(max(1, 2**bits - 1), min(2**bits + 1, 2**62))
    ),
)


@st.composite
def packings(draw):
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    columns = draw(st.one_of(sizes, st.lists(sizes, min_size=1, max_size=4)))
    ks = columns if isinstance(columns, list) else [columns]
    n = math.prod(lead)
    values = [[draw(st.integers(-1, k - 1)) for k in ks] for _ in range(n)]
    indices = torch.tensor(values, dtype=torch.int64).reshape(*lead, len(ks))
    return (indices, columns) if isinstance(columns, list) else (indices.squeeze(-1), columns)


@given(packings())
def test_round_trip(packing):
    indices, columns = packing
    data = pack_indices(indices, columns)
    unpacked = unpack_indices(data)
    assert unpacked.dtype == torch.int64
    exactly(unpacked, indices)
    ks = columns if isinstance(columns, list) else [columns]
    flat = indices.reshape(-1, len(ks))
    lead = indices.ndim - isinstance(columns, list)
    assert len(data) == header_size(lead, len(ks)) + sum(
        column_bytes(flat[:, place], k) for place, k in enumerate(ks)
    )


@pytest.mark.parametrize("k", [1, 2, 3, 1000, 2**31 + 1, 2**62 - 1, 2**62])
@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 0.999, 1.0])
def test_round_trip_of_several_chunks(n, k, share):
    indices = torch.randint(0, k, (n,))
    indices[torch.rand(n) < share] = -1
    data = pack_indices(indices, k)
    exactly(unpack_indices(data), indices)
    assert len(data) == header_size(1, 1) + column_bytes(indices, k)


@pytest.mark.parametrize("kept", range(7))
def test_dropped_stages_take_no_bytes(kept):
    indices = torch.randint(0, 64, (4, 1024, 6))
    indices[..., kept:] = -1
    data = pack_indices(indices, (64,) * 6)
    exactly(unpack_indices(data), indices)
    assert len(data) == header_size(2, 6) + 4096 * 6 * kept // 8


def test_dropout_by_sample_takes_next_to_no_bytes():
    indices = torch.randint(0, 64, (8, 500, 6))
    for sample in range(8):
        indices[sample, :, 1 + sample % 6 :] = -1
    data = pack_indices(indices, (64,) * 6)
    exactly(unpack_indices(data), indices)
    ideal = float(index_bits(indices, (64,) * 6).sum()) / 8
    assert len(data) - header_size(2, 6) < 1.05 * ideal


def test_masked_tokens_take_at_most_a_bit():
    indices = torch.randint(0, 64, (64 * CHUNK,))
    indices[torch.rand(len(indices)) < 0.5] = -1
    ideal = float(index_bits(indices.unsqueeze(0), 64)) / 8
    assert len(pack_indices(indices, 64)) - header_size(1, 1) < ideal + 1.05 * len(indices) / 8


def test_what_would_look_forged_is_packed_at_greater_length():
    """An entry must stand for a bounded share of a byte, or no reader could trust the header."""
    indices = torch.full((2**20, 24), -1, dtype=torch.int8)
    indices[5, 3] = 0
    data = pack_indices(indices, (2,) * 24)
    assert len(data) == header_size(1, 24) + 24 * 2 * 2**20 // 8
    exactly(unpack_indices(data), indices.long())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_any_integer_dtype_and_layout(dtype):
    indices = torch.randint(0, 100, (3, 4, 2)).to(dtype).transpose(0, 1)
    exactly(unpack_indices(pack_indices(indices, (100, 101))), indices.long())


def test_the_bytes_do_not_change():
    """A format is a promise: these bytes were written by version 1, which holds what it can."""
    data = pack_indices(torch.tensor([[5, 0], [-1, 2], [7, 1]]), (8, 3))
    header = b"vqix" + struct.pack("<HHI", 1, 1, 2) + struct.pack("<QQQBB", 3, 8, 3, 1, 0)
    # Nine symbols, four bits each, 0 for -1: 6, 0, 8. Three symbols, two bits: 0, 2, 1.
    payload = bytes([0x06, 0x08, 0b01_10_00])
    header += struct.pack("<I", zlib.crc32(payload))
    assert data == header + struct.pack("<I", zlib.crc32(header)) + payload


def test_the_bytes_of_version_2_do_not_change():
    indices = torch.full((130, 3), -1)
    indices[:64, 1], indices[129, 1] = 5, 7
    indices[:, 2] = torch.arange(130) % 3
    data = pack_indices(indices, (8, 8, 3))
    header = b"vqix" + struct.pack("<HHI", 2, 1, 3) + struct.pack("<4Q3B", 130, 8, 8, 3, 2, 3, 0)
    # Three blocks: the first and the third have indices, the first has no -1. Of the third, the
    # second row is one. Then 64 times 5 and once 7, three bits each, lowest bit first.
    numbers = sum(5 << 3 * i for i in range(64)) | 7 << 3 * 64
    payload = bytes([0b101, 0b001]) + struct.pack("<Q", 2) + numbers.to_bytes(25, "little")
    payload += sum((i % 3) << 2 * i for i in range(130)).to_bytes(33, "little")
    header += struct.pack("<I", zlib.crc32(payload))
    assert data == header + struct.pack("<I", zlib.crc32(header)) + payload
    exactly(unpack_indices(data), indices)


@pytest.mark.parametrize("hole", [False, True])
def test_packing_is_bounded_in_memory(hole):
    indices = torch.randint(0, 2**40, (200_000,))
    indices[100_000 : 100_000 + hole] = -1
    tracemalloc.start()
    data = pack_indices(indices, 2**40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data) + 64 * 3 * CHUNK


SMALL = pack_indices(torch.tensor([[5, 0], [-1, 2], [7, 1]]), (8, 3))
SPARSE = pack_indices(torch.tensor([[-1, -1]] * 70 + [[7, -1]]), (8, 3))
every_file = pytest.mark.parametrize("file", [SMALL, SPARSE], ids=["version 1", "version 2"])


@every_file
def test_every_flipped_bit_raises(file):
    for place in range(8 * len(file)):
        data = bytearray(file)
        data[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"^`data` must (be|have) .+, got .+\. \w.+\.$"):
            unpack_indices(bytes(data))


@every_file
def test_every_truncation_raises(file):
    for length in range(len(file)):
        with pytest.raises(ValueError, match=DAMAGED):
            unpack_indices(file[:length])


@every_file
@pytest.mark.parametrize("tail", [b"\0", b"\xff", SMALL])
def test_every_extension_raises(file, tail):
    with pytest.raises(ValueError, match=DAMAGED):
        unpack_indices(file + tail)


@given(st.binary(max_size=200))
def test_noise_raises(noise):
    for data in (noise, b"vqix" + noise, b"vqix\1\0" + noise, b"vqix\2\0" + noise):
        with pytest.raises(ValueError, match=r"^`data` must "):
            unpack_indices(data)


def forged(lead, ks, kinds, payload=b"", version=1):
    """A file with right checksums, whatever else is wrong with it."""
    header = b"vqix" + struct.pack("<HHI", version, len(lead), len(ks))
    header += struct.pack(f"<{len(lead)}Q{len(ks)}Q{len(ks)}B", *lead, *ks, *kinds)
    header += struct.pack("<I", zlib.crc32(payload))
    return header + struct.pack("<I", zlib.crc32(header)) + payload


def test_forgeries_can_be_right():
    exactly(unpack_indices(forged([2], [4], [0], b"\x07")), torch.tensor([[3], [1]]))
    ones = struct.pack("<BBQB", 1, 0, 2, 3)  # of one block of two rows, the second is index 3
    exactly(unpack_indices(forged([2], [4], [BLOCKS], ones, 2)), torch.tensor([[-1], [3]]))


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(1, 9))
def test_forged_blocks_raise_or_are_indices(payload, n, k):
    data = forged([n], [k, k], [BLOCKS, EMPTY], payload, 2)
    with contextlib.suppress(ValueError):
        indices = unpack_indices(data)
        assert indices.shape == (n, 2)
        assert bool(((indices >= -1) & (indices < k)).all())


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (forged([2**40], [8], [0]), "0 bytes of indices instead of 412316860416"),
        (forged([2**40], [1], [0]), "1099511627776 indices in 0 bytes"),
        (forged([2**23], [1, 1, 1], [0, 0, 0]), "25165824 indices in 0 bytes"),
        (forged([2**40], [8], [EMPTY], b"", 2), "1099511627776 indices in 0 bytes"),
        (forged([2**25], [8], [BLOCKS], b"", 2), "0 bytes of indices instead of 131072"),
        (forged([2**25], [8], [BLOCKS], b"\0" * 131072, 2), "33554432 indices in 131072 bytes"),
        (forged([1], [8], [BLOCKS], b"\1\1", 2), "too few bytes of indices"),
        (forged([1], [8], [BLOCKS], b"\0\0\0", 2), "1 bytes after the indices"),
        (forged([1], [8], [EMPTY], b""), "a header with unknown kinds of columns"),
        (forged([1], [8], [4], b"", 2), "a header with unknown kinds of columns"),
        (forged([2**40, 2**40], [1], [0]), "a header with sizes out of range"),
        (forged([0, 2**63], [1], [0]), "a header with sizes out of range"),
        (forged([1], [0], [0]), "a header with sizes out of range"),
        (forged([1], [2**62 + 1], [0], b"\0" * 8), "a header with sizes out of range"),
        (forged([1], [2], [2], b"\0"), "a header with unknown kinds of columns"),
        (forged([1], [3], [0], b"\3"), "an index of 3 or more"),
        (forged([1], [2], [1], b"\3"), "an index of 2 or more"),
        (b"vqix\1\0" + b"\xff" * 6, "12 bytes, less than a header"),
        (b"vqix\1\0" + b"\xff" * 40, "46 bytes, less than a header"),
        (b"GIF89a", "bytes that start with b'GIF8'"),
        (b"", "bytes that start with b''"),
        (b"vqix", "4 bytes, less than a header"),
    ],
)
def test_nothing_is_allocated_for_impossible_headers(data, what):
    message = (
        f"`data` must be the unchanged result of `pack_indices`, got {what}. Copy or download it "
        "again."
    )
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            unpack_indices(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_future_versions_say_what_to_do():
    data = SMALL[:4] + struct.pack("<H", 3) + SMALL[6:]
    message = (
        "`data` must have format version 1 or 2, got 3. Read it with a version of vqprior at least "
        "as new as the one that wrote it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        unpack_indices(data)


def test_text_is_not_bytes():
    with pytest.raises(TypeError, match=r"^`data` must be bytes, got str\.$"):
        unpack_indices("vqix")


@pytest.mark.parametrize(
    ("indices", "columns", "message"),
    [
        (
            torch.tensor([[0, 1], [3, 0]]),
            (3, 3),
            "`indices` must be in [-1, 3) in column 0, got values from 0 to 3. Pass the size of "
            "the codebook that produced them.",
        ),
        (
            torch.tensor([0, -2]),
            3,
            "`indices` must be in [-1, 3) in column 0, got values from -2 to 0. Pass the size of "
            "the codebook that produced them.",
        ),
        (
            torch.zeros(1, dtype=torch.int64).expand(2**24 + 1),
            1,
            "`indices` must hold at most 16777216 entries of codebooks of one code, got "
            "16777217. Drop these columns: they carry no information.",
        ),
    ],
    ids=["high", "low", "free"],
)
def test_wrong_values(indices, columns, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack_indices(indices, columns)


@pytest.mark.parametrize("function", [pack_indices, index_bits])
@pytest.mark.parametrize(
    ("indices", "columns", "error", "message"),
    [
        (
            torch.zeros(2),
            3,
            TypeError,
            "`indices` must be an integer tensor, got torch.float32.",
        ),
        (
            torch.zeros(2, 3).long(),
            (4, 4),
            ValueError,
            "`indices` must have shape (..., 2), one entry for each codebook, got (2, 3). For "
            "one codebook, pass its size as an int.",
        ),
        (
            torch.zeros(()).long(),
            (4,),
            ValueError,
            "`indices` must have shape (..., 1), one entry for each codebook, got (). For one "
            "codebook, pass its size as an int.",
        ),
        (
            torch.zeros(2, 2).long(),
            (4, 0),
            ValueError,
            "`codebook_sizes` must be at least 1, got 0.",
        ),
        (
            torch.zeros(2).long(),
            2**62 + 1,
            ValueError,
            "`codebook_sizes` must be at most 2**62, got 4611686018427387905.",
        ),
        (
            torch.zeros(2, 0).long(),
            (),
            ValueError,
            "`codebook_sizes` must hold at least one size, got none.",
        ),
    ],
)
def test_wrong_arguments(function, indices, columns, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(indices, columns)


def test_bits_of_one_codebook():
    indices = torch.tensor([[0, 1, -1], [2, 3, 4], [-1, -1, -1]])
    bits = math.log2(1000) * torch.tensor([2, 3, 0], dtype=torch.float64)
    assert_close(index_bits(indices, 1000), bits, rtol=1e-15, atol=0)
    assert_close(index_bits(indices[:, None, :, None], 1000), bits, rtol=1e-15, atol=0)


def test_bits_of_several_codebooks():
    indices = torch.tensor([[[0, 1, 2], [5, -1, -1]], [[-1, -1, -1], [0, 0, -1]]])
    bits = [2 * 3 + 4 + math.log2(5), 3 + 4]
    assert_close(index_bits(indices, (8, 16, 5)), torch.tensor(bits, dtype=torch.float64))
    tokens = index_bits(indices.flatten(0, 1), (8, 16, 5))
    exactly(tokens, torch.tensor([7 + math.log2(5), 3, 0, 7], dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "columns", "result"),
    [
        ((), 4, ()),
        ((2,), (4, 4), ()),
        ((0,), 4, (0,)),
        ((0, 3), 4, (0,)),
        ((2, 0, 3), (4,) * 3, (2,)),
    ],
)
def test_shapes_of_bits(shape, columns, result):
    indices = torch.zeros(shape, dtype=torch.int16)
    bits = index_bits(indices, columns)
    expected = 2.0 * indices.numel() / max(1, math.prod(result))
    exactly(bits, torch.full(result, expected, dtype=torch.float64))


def test_bits_compile_in_one_graph_without_waiting():
    torch.compiler.reset()
    indices = torch.randint(-1, 5, (3, 7, 2))
    compiled = torch.compile(lambda i: index_bits(i, (5, 9)), fullgraph=True, backend="aot_eager")
    with NoHostSync():
        expected = index_bits(indices, (5, 9))
    assert_close(compiled(indices), expected)
