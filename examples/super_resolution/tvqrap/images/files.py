"""Reads image files as ``Photo`` and writes them.

A ``Photo`` holds the three color channels for the network, and the other properties of the file
(alpha, gray, 16 bits, color profile, EXIF), so that a result can have them, too.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageOps,
    UnidentifiedImageError,
)
from torch import Tensor

from tvqrap.cli import UsageError, UserError, atomic_write, describe, is_out_of_memory
from tvqrap.images.depth import is_deep_gray_with_alpha, joined, lower_bytes, stored_bits
from tvqrap.images.levels import from_pillow, quantize, to_float, to_pillow
from tvqrap.images.png import write_png

Image.init()
# Not all formats of Pillow: EPS, for example, would start another program on an untrusted file.
FORMATS = tuple(
    {"PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"} & set(Image.OPEN)
)
WRITE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LONGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}
SAVE_OPTIONS = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "method": 4},
}
# Tags that describe the stored pixels and are wrong for an image of another size.
PIXEL_TAGS = (0x0100, 0x0101, 0x0112)  # width, height, orientation
PIXEL_TAGS_OF_CAMERA = (0xA002, 0xA003)  # width, height again
LONGEST_EXIF = 65000  # bytes in one JPEG segment
STRIP_PIXELS = 2**20  # of a PNG file that are converted and written at a time


@dataclass(frozen=True)
class Photo:
    """An image, and the properties of its file.

    Attributes:
        rgb: ``(3, h, w)``, floats in [0, 1] or ``uint8`` or ``uint16`` levels; the channels of gray
            images are equal.
        alpha: ``(1, h, w)``, floats in [0, 1] or levels, or ``None``; colors are not premultiplied.
        grayscale: Whether the file had one color channel.
        bit_depth: Bits per channel, 8 or 16.
        icc_profile: Color profile of the values.
        exif: Metadata of the camera, without orientation and sizes.
        notes: What could not be kept, as clauses for the user.
    """

    rgb: Tensor
    alpha: Tensor | None = None
    grayscale: bool = False
    bit_depth: int = 8
    icc_profile: bytes | None = None
    exif: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.rgb.shape[2], self.rgb.shape[1]


def read_image(path: Path, *, check_size: Callable[[int, int], None] | None = None) -> Photo:
    """Reads an image: upright, as floats in [0, 1], the first frame if there are several.

    Args:
        path: The file.
        check_size: Called with the stored width and height before any pixel is decoded; may
            raise ``UserError``, to which the file's name is added.

    Raises:
        UserError: If the file is missing, empty, damaged, too large, or not an image; the message
            is one line and names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about details that do not make a file unusable
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if check_size is not None:
                    check_size(*image.size)
                # Before loading, which discards how the file is coded.
                gray = is_deep_gray_with_alpha(image)
                lower = lower_bytes(path, image, FORMATS)
                bits = 8 if lower is not None else stored_bits(path, image)
                notes = _notes(image, bits)
                image.load()
                return replace(_to_photo(image, lower, gray=gray), notes=notes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise many kinds of errors on damaged data
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from error


def write_image(path: Path, photo: Photo) -> None:
    """Writes ``photo`` atomically as PNG, JPEG or WebP, by the suffix of ``path``.

    JPEG blends alpha onto white. 16 bits are kept in PNG and rounded to 8 elsewhere. PNG is written
    a few rows at a time; for the others there is a copy of the whole image, and the whole file.

    Raises:
        UserError: If the suffix is another one, the format cannot hold an image of this size, or
            the file cannot be written.
    """
    kind = check_output_size(path, *photo.size)
    icc = photo.icc_profile
    if icc is not None and icc[16:20] != (b"GRAY" if photo.grayscale else b"RGB "):
        icc = None  # the profile of another color space would make the file invalid
    metadata = {"icc_profile": icc, "exif": photo.exif}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    if kind == "PNG":
        with atomic_write(path) as file:
            write_png(file, photo.size, _strips(photo), **metadata)
        return
    data = io.BytesIO()  # encoders that write to disk themselves miss a full disk
    _pillow_to_save(photo, kind).save(data, kind, **SAVE_OPTIONS[kind], **metadata)
    with atomic_write(path) as file:
        file.write(data.getbuffer())


def check_output_size(path: Path, width: int, height: int) -> str:
    """Returns the format of ``path``'s suffix, if it can hold an image of this size.

    Raises:
        UserError: If the suffix is not supported, or the format cannot hold the size.
    """
    kind = WRITE_FORMATS.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(WRITE_FORMATS)
        raise UsageError(f"{path}: the name of an image to write must end in one of {known}")
    if max(width, height) > LONGEST_SIDE[kind]:
        raise UserError(
            f"{path}: a {kind} image has at most {LONGEST_SIDE[kind]} pixels a side, this one "
            f"is {width}x{height}; PNG can hold it"
        )
    return kind


def preview(photo: Photo) -> Image.Image:
    """Returns the image on white as 8-bit RGB, without alpha."""
    return _pillow_to_save(photo, "JPEG").convert("RGB")


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"has more than {limit:.0f} megapixels according to its header; it was not opened"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if is_out_of_memory(error):
        return "not enough memory to read it"
    with suppress(OSError):
        if path.stat().st_size == 0:
            return "is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image that can be read ({', '.join(sorted(FORMATS))})"
    return f"is damaged: {describe(error)}"


def _notes(image: Image.Image, bits: int) -> tuple[str, ...]:
    """Returns what reading ``image``, which is open but not loaded, loses."""
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # whose other frames belong to the same photo
        notes.append(f"the first of {frames} frames is used")
    if bits > 8 and image.mode[0] != "I":
        notes.append(f"color of {bits} bits is read as 8-bit")
    return tuple(notes)


def _to_photo(image: Image.Image, lower: Image.Image | None, *, gray: bool) -> Photo:
    """Converts a loaded image; ``lower`` and ``gray`` are of depth.py."""
    image = _upright(image)
    icc, exif = image.info.get("icc_profile"), _exif(image)
    if image.mode == "CMYK":
        image, icc = _cmyk_to_rgb(image, icc), None
    if lower is not None:
        values = joined(image, _upright(lower), gray=gray)
        photo = _from_deep_color(values, image.info.get("transparency"), gray=gray)
    else:
        photo = _from_deep_gray(image) if image.mode[0] in "IF" else _from_eight_bit(image)
    return replace(photo, icc_profile=icc, exif=exif)


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # damaged EXIF has no usable orientation
        return ImageOps.exif_transpose(image)
    return image


def _from_deep_color(
    values: np.ndarray, see_through: tuple[int, ...] | None, *, gray: bool
) -> Photo:
    channels = to_float(torch.from_numpy(values)).permute(2, 0, 1)
    rgb, alpha = channels[:3], channels[3:] if len(channels) > 3 else None
    if see_through is not None:
        alpha = torch.from_numpy((values != see_through).any(axis=2))[None].float()
    return Photo(rgb, alpha, grayscale=gray, bit_depth=16)


def _from_deep_gray(image: Image.Image) -> Photo:
    values = np.array(image, dtype=np.float32)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= top):
        raise UserError(f"its gray values leave 0..{top:g}; rescale them to that range first")
    gray = torch.from_numpy(values / top)[None]
    see_through = image.info.get("transparency")
    alpha = None if see_through is None else torch.from_numpy(values != see_through)[None].float()
    return Photo(gray.expand(3, -1, -1), alpha, grayscale=True, bit_depth=16)


def _from_eight_bit(image: Image.Image) -> Photo:
    mode = image.mode
    if image.has_transparency_data:
        channels = to_float(from_pillow(image.convert("RGBA")))
        rgb, alpha = channels[:3], channels[3:]
    else:
        rgb, alpha = to_float(from_pillow(image.convert("RGB"))), None
    gray = mode in ("1", "L", "LA", "La") or (mode[0] == "P" and bool((rgb == rgb[:1]).all()))
    return Photo(rgb, alpha, grayscale=gray)


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Converts by the color profile, or by arithmetic without a usable one."""
    if icc:
        with suppress(ImageCms.PyCMSError, OSError):
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, io.BytesIO(icc), srgb, outputMode="RGB")
    return image.convert("RGB")


def _exif(image: Image.Image) -> bytes | None:
    """Returns the EXIF block without the tags that are wrong for the result."""
    if "exif" not in image.info:
        return None
    with suppress(Exception):  # damaged metadata does not make an image unusable
        exif = image.getexif()
        for tag in PIXEL_TAGS:
            exif.pop(tag, None)
        for tag in PIXEL_TAGS_OF_CAMERA:
            exif.get_ifd(ExifTags.IFD.Exif).pop(tag, None)
        data = exif.tobytes()
        return data if 0 < len(data) <= LONGEST_EXIF else None
    return None


def _pillow_to_save(photo: Photo, kind: str) -> Image.Image:
    """Converts to 8 bits and the mode that ``kind`` can hold."""
    image = to_pillow(photo.rgb)
    if photo.grayscale:
        image = image.convert("L")
    if photo.alpha is None:
        return image
    alpha = to_pillow(photo.alpha)
    if kind == "JPEG":
        return Image.composite(image, Image.new(image.mode, image.size, "white"), alpha)
    image.putalpha(alpha)
    return image


def _strips(photo: Photo) -> Iterator[np.ndarray]:
    """Yields rows ``(rows, w, channels)`` for a PNG file, in the depth of the source."""
    dtype = torch.uint16 if photo.bit_depth == 16 else torch.uint8
    count = max(1, STRIP_PIXELS // photo.size[0])
    for top in range(0, photo.size[1], count):
        rows = slice(top, top + count)
        channels = [_levels(photo.rgb[:, rows], dtype)]
        if photo.grayscale:
            channels = [_to_gray(channels[0])]
        if photo.alpha is not None:
            channels.append(_levels(photo.alpha[:, rows], dtype))
        yield torch.cat(channels).permute(1, 2, 0).numpy()


def _levels(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype == dtype else quantize(to_float(values), dtype)


def _to_gray(levels: Tensor) -> Tensor:
    if levels.dtype == torch.uint8:
        return from_pillow(to_pillow(levels).convert("L"))
    weights = torch.tensor([0.299, 0.587, 0.114])  # as Pillow for 8 bits
    return quantize(torch.einsum("chw,c->hw", to_float(levels), weights)[None], torch.uint16)
