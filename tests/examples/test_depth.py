"""Images of 16 bits keep them, from file to file; what cannot be kept is said."""

import io
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features

from tests.examples.made_files import deep_png, deep_tiff, png
from tests.examples.stand_in import StandIn
from tvqrap.cli import UserError
from tvqrap.images.depth import stored_bits
from tvqrap.images.files import Photo, read_image, write_image
from tvqrap.images.jobs import Job
from upscale import upscale_file, upscale_photo

VALUES = np.random.default_rng(0).integers(0, 65536, (9, 7, 4)).astype(np.uint16)


def header(path):
    """Bits and color type of a PNG file."""
    return tuple(path.read_bytes()[24:26])


def color_and_alpha(photo):
    planes = [photo.rgb[:1] if photo.grayscale else photo.rgb]
    planes += [] if photo.alpha is None else [photo.alpha]
    return (torch.cat(planes).double() * 65535).round().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_gray_makes_the_round_trip_exactly(name, tmp_path):
    values = np.arange(0, 65536, 257 // 2, dtype=np.uint16)[:500].reshape(20, 25)
    Image.fromarray(values).save(tmp_path / name)
    photo = read_image(tmp_path / name)
    assert (photo.grayscale, photo.bit_depth) == (True, 16)
    write_image(tmp_path / "out.png", photo)
    with Image.open(tmp_path / "out.png") as again:
        assert again.mode == "I;16"
        assert (np.array(again) == values).all()


def test_sixteen_bit_gray_with_a_transparent_level(tmp_path):
    Image.fromarray(np.array([[0, 300, 65535]], dtype=np.uint16)).save(
        tmp_path / "a.png", transparency=300
    )
    assert read_image(tmp_path / "a.png").alpha.tolist() == [[[1, 0, 1]]]


@pytest.mark.parametrize(("channels", "kind"), [(2, 4), (3, 2), (4, 6)])
def test_png_makes_the_round_trip_exactly(channels, kind, tmp_path):
    values = VALUES[..., :channels]
    (tmp_path / "a.png").write_bytes(deep_png(values))
    photo = read_image(tmp_path / "a.png")
    assert (photo.grayscale, photo.bit_depth, photo.notes) == (channels == 2, 16, ())
    assert (color_and_alpha(photo) == values).all()
    write_image(tmp_path / "b.png", photo)
    assert header(tmp_path / "b.png") == (16, kind)
    assert (color_and_alpha(read_image(tmp_path / "b.png")) == values).all()
    with Image.open(tmp_path / "b.png") as image:  # which takes the upper bytes
        upper = np.array(image)
    assert (upper[..., : min(channels, 3)] == values[..., : min(channels, 3)] // 256).all() or (
        upper[..., [0, 3]] == values // 256
    ).all()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [3, 4])
def test_tiff(order, packed, channels, tmp_path):
    values = VALUES[..., :channels]
    (tmp_path / "a.tif").write_bytes(deep_tiff(values, order, packed=packed))
    photo = read_image(tmp_path / "a.tif")
    assert (color_and_alpha(photo) == values).all()
    assert photo.notes == ()


def test_portable_pixmaps_of_every_range(tmp_path):
    values = VALUES[..., :3]
    (tmp_path / "a.ppm").write_bytes(b"P6 7 9 65535\n" + values.astype(">u2").tobytes())
    assert (color_and_alpha(read_image(tmp_path / "a.ppm")) == values).all()
    (tmp_path / "a.ppm").write_bytes(b"P6 7 9 4095\n" + (values // 16).astype(">u2").tobytes())
    assert read_image(tmp_path / "a.ppm").notes == ("color of 16 bits is read as 8-bit",)


def test_a_camera_on_its_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turn = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(deep_png(VALUES[..., :3], turn))
    upright = np.rot90(VALUES[..., :3], -1)
    assert (color_and_alpha(read_image(tmp_path / "a.png")) == upright).all()


def test_a_transparent_color_differs_from_its_neighbors(tmp_path):
    row = b"\0" + struct.pack(">6H", 256, 512, 768, 256, 512, 769)
    see_through = (b"tRNS", struct.pack(">3H", 256, 512, 768))
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, row, see_through))
    assert read_image(tmp_path / "a.png").alpha.tolist() == [[[0, 1]]]


@pytest.mark.parametrize(
    ("suffix", "mark", "place", "byte", "bits"),
    [("jp2", b"\xff\x4f\xff\x51", 42, 15, 16), ("avif", b"pixi", 9, 10, 10)],
)
def test_bits_that_pillow_does_not_tell_of(suffix, mark, place, byte, bits, tmp_path):
    if not features.check({"jp2": "jpg_2000"}.get(suffix, suffix)):
        pytest.skip("this Pillow cannot write it")
    kind = SimpleNamespace(format={"jp2": "JPEG2000", "avif": "AVIF"}[suffix])
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, kind.format)
    path, data = tmp_path / f"a.{suffix}", bytearray(file.getvalue())
    for expected in (8, bits):
        path.write_bytes(data)
        assert stored_bits(path, kind) == expected
        data[data.index(mark) + place] = byte


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_deep_gray_without_a_known_white(dtype, tmp_path):
    top = 1 if dtype == np.float32 else 65535
    Image.fromarray(np.array([[0, top]], dtype=dtype)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").rgb[0].tolist() == [[0, 1]]
    Image.fromarray(np.array([[0, top + 1]], dtype=dtype)).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match=rf"b.tif: its gray values leave 0\.\.{top}; rescale"):
        read_image(tmp_path / "b.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_upscaling_keeps_it_or_says_that_it_is_lost(suffix, tmp_path, capsys):
    values = np.repeat(np.repeat(VALUES, 2, 0), 2, 1)
    (tmp_path / "a.png").write_bytes(deep_png(values))
    result = tmp_path / f"b.{suffix}"
    upscale_file(StandIn().eval(), Job(tmp_path / "a.png", result))
    note = "16 bits are rounded to 8, which --format png would keep"
    assert (note in capsys.readouterr().err) == (suffix == "jpg")
    if suffix == "png":
        assert header(result) == (16, 6)
        photo = read_image(result)
        small = Image.fromarray(values[..., 3].astype(np.float32))
        expected = np.array(small.resize((56, 72), Image.Resampling.BICUBIC)).clip(0, 65535)
        assert np.abs(photo.alpha[0].numpy() * 65535 - expected).max() < 1


def test_sixteen_bits_in_between_levels_survive():
    gray = torch.linspace(0.5, 0.51, 20).expand(3, 16, 20)
    photo = Photo(gray, grayscale=True, bit_depth=16)
    deep = upscale_photo(StandIn().eval(), photo)
    assert deep.rgb.dtype == torch.uint16
    assert len(deep.rgb.to(torch.int32).unique()) > 60
    assert upscale_photo(StandIn().eval(), photo, deep=False).rgb.dtype == torch.uint8
