"""Every kind of image is read right, written in kind, and refused in one line if damaged."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.examples.made_files import png
from tvqrap.cli import UsageError, UserError
from tvqrap.images.files import (
    Photo,
    check_output_size,
    preview,
    read_image,
    write_image,
)
from tvqrap.images.levels import quantize, to_float
from tvqrap.images.panels import contact_sheet

WIDTH, HEIGHT = 20, 12


@pytest.fixture
def image():
    """A smooth image of which no two corners look alike."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    channels = (x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) * 255 // (WIDTH + HEIGHT))
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def levels(photo):
    return (photo.rgb * 255).round().permute(1, 2, 0).numpy()


# Reading


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("a.png", "RGB", 0),
        ("a.bmp", "RGB", 0),
        ("a.tif", "RGB", 0),
        ("a.ppm", "RGB", 0),
        ("a.jpg", "RGB", 12),
        ("a.jpg", "CMYK", 12),
        ("a.tif", "CMYK", 1),
        ("a.webp", "RGB", 25),
    ],
)
def test_color_of_any_format(name, mode, tolerance, image, tmp_path):
    path = tmp_path / name
    image.convert(mode).save(path, **({"quality": 100} if name[2] in "jw" else {}))
    photo = read_image(path)
    assert photo.rgb.shape == (3, HEIGHT, WIDTH)
    assert photo.rgb.dtype == torch.float32
    assert (photo.alpha, photo.grayscale, photo.bit_depth) == (None, False, 8)
    assert np.abs(levels(photo) - np.array(image).astype(float)).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "1"])
def test_gray(mode, image, tmp_path):
    gray = image.convert(mode)
    gray.save(tmp_path / "a.png")
    photo = read_image(tmp_path / "a.png")
    assert photo.grayscale
    assert (levels(photo) == np.array(gray.convert("L"))[..., None]).all()


def test_palette_of_colors_and_palette_of_grays(image, tmp_path):
    for name, source in (("color", image), ("gray", image.convert("L"))):
        source.convert("RGB").quantize(16).save(tmp_path / f"{name}.png")
    assert not read_image(tmp_path / "color.png").grayscale
    assert read_image(tmp_path / "gray.png").grayscale


def test_palette_with_a_transparent_color(tmp_path):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    photo = read_image(tmp_path / "a.png")
    assert photo.alpha.flatten().tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    assert levels(photo)[1, 1].tolist() == [200, 100, 50]


@pytest.mark.parametrize(("mode", "gray"), [("RGBA", False), ("LA", True)])
def test_alpha_is_kept_beside_unchanged_colors(mode, gray, image, tmp_path):
    converted = image.convert(mode)
    converted.putalpha(image.getchannel("R"))
    converted.save(tmp_path / "a.png")
    photo = read_image(tmp_path / "a.png")
    assert photo.grayscale == gray
    assert torch.equal(photo.alpha[0], to_float(torch.tensor(np.array(image.getchannel("R")))))
    assert (levels(photo) == np.array(converted.convert("RGBA"))[..., :3]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_on_its_side(orientation, image, tmp_path):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # transpositions by their Pillow number
    stored = image.transpose(undo[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    exif.get_ifd(0x8769)[0xA002] = WIDTH
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    stored.save(tmp_path / "a.png", exif=exif)
    photo = read_image(tmp_path / "a.png")
    assert (levels(photo) == np.array(image)).all()
    write_image(tmp_path / "b.jpg", photo)
    with Image.open(tmp_path / "b.jpg") as written:
        kept = written.getexif()
        assert (kept.get(0x0112), kept[0x010F]) == (None, "Maker")
        assert kept.get_ifd(0x8769) == {0x9003: "2024:01:01 00:00:00"}


def test_damaged_exif_is_left_behind(image, tmp_path):
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    photo = read_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b.jpg", photo)
    assert photo.size == (WIDTH, HEIGHT)


def test_the_first_frame_of_an_animation(image, tmp_path):
    second = Image.new("RGB", image.size, "red")
    image.save(tmp_path / "a.png", save_all=True, append_images=[second])
    photo = read_image(tmp_path / "a.png")
    assert photo.notes == ("the first of 2 frames is used",)
    assert (levels(photo) == np.array(image)).all()


def test_check_size_comes_before_the_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png(3000, 2000, 8, 2, b""))  # a header without pixels

    def check(width, height):
        raise UserError(f"is {width}x{height}")

    with pytest.raises(UserError, match=r"a.png: is 3000x2000$"):
        read_image(tmp_path / "a.png", check_size=check)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tif"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files(name, share, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: is ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty$"),
        (b"Dear diary", r"is not an image that can be read \(.*PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image that can be read"),
        (png(60000, 60000, 8, 2, b""), "has more than 89 megapixels according to its header"),
        (png(11000, 11000, 8, 2, b""), "has more than 89 megapixels according to its header"),
    ],
)
def test_what_is_no_image(content, message, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.png: {message}"):
        read_image(path)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"a\.png: No such file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=": Is a directory"):
        read_image(tmp_path)


# Writing


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.uint16])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_results_are_of_the_sources_kind(gray, alpha, dtype, suffix, tmp_path):
    color = torch.tensor([0.8, 0.4, 0.2] if not gray else [0.5, 0.5, 0.5])
    rgb = color[:, None, None].expand(3, 16, 24)
    rgb = rgb if dtype == torch.float32 else quantize(rgb, dtype)
    photo = Photo(rgb, torch.full((1, 16, 24), 0.5) if alpha else None, grayscale=gray)
    write_image(tmp_path / f"a{suffix}", photo)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.size == (24, 16)
        opaque = image.convert("RGBA").getpixel((5, 5))
    shown = color * 0.5 + 0.5 if alpha and suffix == ".jpg" else color
    assert np.abs(np.array(opaque[:3]) / 255 - shown.numpy()).max() < 0.02
    assert opaque[3] == (128 if alpha and suffix != ".jpg" else 255)


def test_png_modes(tmp_path):
    gray, alpha = torch.full((3, 4, 4), 0.5), torch.ones(1, 4, 4)
    cases = {
        "RGB": Photo(gray),
        "RGBA": Photo(gray, alpha),
        "L": Photo(gray, grayscale=True),
        "LA": Photo(gray, alpha, grayscale=True),
        "I;16": Photo(gray, grayscale=True, bit_depth=16),
    }
    for mode, photo in cases.items():
        write_image(tmp_path / "a.png", photo)
        with Image.open(tmp_path / "a.png") as image:
            assert image.mode == mode


def test_a_profile_is_kept_where_it_fits(image, tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "a.png", icc_profile=srgb)
    photo = read_image(tmp_path / "a.png")
    for suffix in (".png", ".jpg", ".webp"):
        write_image(tmp_path / f"b{suffix}", photo)
        with Image.open(tmp_path / f"b{suffix}") as image:
            assert image.info["icc_profile"] == srgb
    write_image(tmp_path / "gray.png", Photo(photo.rgb, grayscale=True, icc_profile=srgb))
    with Image.open(tmp_path / "gray.png") as image:
        assert "icc_profile" not in image.info


def test_a_profile_of_inks_is_not_passed_on(image, tmp_path):
    image.convert("CMYK").save(tmp_path / "a.jpg", icc_profile=b"not a profile at all")
    assert read_image(tmp_path / "a.jpg").icc_profile is None


def test_an_unknown_suffix_is_a_usage_error(tmp_path):
    with pytest.raises(
        UsageError, match=r"a\.bmp: .* must end in one of \.png, \.jpg, \.jpeg, \.webp"
    ):
        write_image(tmp_path / "a.bmp", Photo(torch.zeros(3, 4, 4)))


def test_formats_with_short_sides(tmp_path):
    assert check_output_size(tmp_path / "a.PNG", 10**6, 10) == "PNG"
    with pytest.raises(UserError, match=r"WEBP image has at most 16383 pixels a side.*20000x10"):
        check_output_size(tmp_path / "a.webp", 20000, 10)
    with pytest.raises(UserError, match="JPEG image has at most 65500"):
        check_output_size(tmp_path / "a.jpg", 10, 65501)


def test_preview_is_on_white():
    photo = Photo(torch.zeros(3, 1, 2), torch.tensor([[[0.0, 1.0]]]))
    assert np.array(preview(photo)).tolist() == [[[255] * 3, [0] * 3]]


def test_levels():
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    assert quantize(values, torch.uint8).tolist() == [0, 0, 128, 255, 255]
    assert quantize(values, torch.uint16).tolist() == [0, 0, 32768, 65535, 65535]
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    assert torch.equal(quantize(to_float(every), torch.uint16), every)


def test_contact_sheet():
    red, blue = (
        Image.new("RGB", size, name) for size, name in (((50, 20), "red"), ((30, 30), "blue"))
    )
    sheet = contact_sheet([[("one", red), ("two", blue)], [("a caption that is too long", blue)]])
    assert sheet.size == (10 + 50 + 10 + 30 + 10, 2 * (18 + 10 + 30 + 10))
    assert sheet.getpixel((10, 28)) == (255, 0, 0)
    assert sheet.getpixel((70 + 29, 28 + 29)) == (0, 0, 255)
    caption = np.array(sheet.convert("L"))[:28]
    assert caption.min() < 60  # there is ink
    assert (np.array(sheet)[68:96, 40:] == 255).all()  # none beyond the image it belongs to
