"""Packed indices: exact round trips, exact sizes, and no damage that goes unnoticed."""

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
from vqprior.functional._packing import _CHUNK

DAMAGED = r"^`data` must be the unchanged result of `pack_indices`, got .+\. Copy or download it"


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def header_size(num_lead, num_columns):
    return 20 + 8 * num_lead + 9 * num_columns


def column_bytes(n, k, *, holes=False):
    """Bits by trial: the fewest that can tell the symbols apart."""
    symbols, width = k + holes, 0
    while 2**width < symbols:
        width += 1
    return math.ceil(n * width / 8)


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
        column_bytes(len(flat), k, holes=bool((flat[:, place] < 0).any()))
        for place, k in enumerate(ks)
    )


@pytest.mark.parametrize("k", [1, 2, 3, 1000, 2**31 + 1, 2**62 - 1, 2**62])
@pytest.mark.parametrize("n", [_CHUNK - 1, _CHUNK, 2 * _CHUNK + 3])
@pytest.mark.parametrize("hole", [False, True])
def test_round_trip_of_several_chunks(n, k, hole):
    indices = torch.randint(0, k, (n,))
    indices[-1] = -1 if hole else k - 1
    data = pack_indices(indices, k)
    exactly(unpack_indices(data), indices)
    assert len(data) == header_size(1, 1) + column_bytes(n, k, holes=hole)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_any_integer_dtype_and_layout(dtype):
    indices = torch.randint(0, 100, (3, 4, 2)).to(dtype).transpose(0, 1)
    exactly(unpack_indices(pack_indices(indices, (100, 101))), indices.long())


def test_the_bytes_do_not_change():
    """A format is a promise: these bytes were written by version 1."""
    data = pack_indices(torch.tensor([[5, 0], [-1, 2], [7, 1]]), (8, 3))
    header = b"vqix" + struct.pack("<HHI", 1, 1, 2) + struct.pack("<QQQBB", 3, 8, 3, 1, 0)
    # Nine symbols, four bits each, 0 for -1: 6, 0, 8. Three symbols, two bits: 0, 2, 1.
    payload = bytes([0x06, 0x08, 0b01_10_00])
    header += struct.pack("<I", zlib.crc32(payload))
    assert data == header + struct.pack("<I", zlib.crc32(header)) + payload


def test_packing_is_bounded_in_memory():
    indices = torch.randint(0, 2**40, (200_000,))
    tracemalloc.start()
    data = pack_indices(indices, 2**40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data) + 64 * 3 * _CHUNK


SMALL = pack_indices(torch.tensor([[5, 0], [-1, 2], [7, 1]]), (8, 3))


@pytest.mark.parametrize("place", range(len(SMALL)))
def test_every_flipped_bit_raises(place):
    for bit in range(8):
        data = bytearray(SMALL)
        data[place] ^= 1 << bit
        with pytest.raises(ValueError, match=r"^`data` must (be|have) .+, got .+\. \w.+\.$"):
            unpack_indices(bytes(data))


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_every_truncation_raises(length):
    with pytest.raises(ValueError, match=DAMAGED):
        unpack_indices(SMALL[:length])


@pytest.mark.parametrize("tail", [b"\0", b"\xff", SMALL])
def test_every_extension_raises(tail):
    with pytest.raises(ValueError, match=DAMAGED):
        unpack_indices(SMALL + tail)


@given(st.binary(max_size=200))
def test_noise_raises(noise):
    for data in (noise, b"vqix" + noise, b"vqix\1\0" + noise):
        with pytest.raises(ValueError, match=r"^`data` must "):
            unpack_indices(data)


def forged(lead, ks, holes, payload=b"", columns=None):
    """A file with right checksums, whatever else is wrong with it."""
    columns = len(ks) if columns is None else columns
    header = b"vqix" + struct.pack("<HHI", 1, len(lead), columns)
    header += struct.pack(f"<{len(lead)}Q{len(ks)}Q{len(ks)}B", *lead, *ks, *holes)
    header += struct.pack("<I", zlib.crc32(payload))
    return header + struct.pack("<I", zlib.crc32(header)) + payload


def test_forgeries_can_be_right():
    exactly(unpack_indices(forged([2], [4], [0], b"\x07")), torch.tensor([[3], [1]]))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (forged([2**40], [8], [0]), "0 bytes of indices instead of 412316860416"),
        (forged([2**40], [1], [0]), "1099511627776 indices that take no bits"),
        (forged([2**23], [1, 1, 1], [0, 0, 0]), "25165824 indices that take no bits"),
        (forged([2**40, 2**40], [1], [0]), "a header with sizes out of range"),
        (forged([0, 2**63], [1], [0]), "a header with sizes out of range"),
        (forged([1], [0], [0]), "a header with sizes out of range"),
        (forged([1], [2**62 + 1], [0], b"\0" * 8), "a header with sizes out of range"),
        (forged([1], [2], [2], b"\0"), "a header with sizes out of range"),
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
    data = SMALL[:4] + struct.pack("<H", 2) + SMALL[6:]
    message = (
        "`data` must have format version 1, got 2. Read it with a version of vqprior at least as "
        "new as the one that wrote it."
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
