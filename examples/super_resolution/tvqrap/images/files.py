"""Reads image files as ``Photo`` and writes them.

A ``Photo`` holds the three color channels for the network, and the other properties of the file
(alpha, gray, 16 bits, color profile, EXIF), so that a result can have them, too.
"""

import glob
import io
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

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
from tvqrap.images.levels import from_pillow, in_strips, quantize, to_float, to_pillow

Image.init()
# Not all formats of Pillow: EPS, for example, would start another program on an untrusted file.
FORMATS = tuple(
    {"PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"} & set(Image.OPEN)
)
READ_SUFFIXES = frozenset(s for s, kind in Image.registered_extensions().items() if kind in FORMATS)
WRITE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LONGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}
SAVE_OPTIONS = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "method": 4},
}
# Tags that describe the stored pixels and are wrong for an image of another size.
PIXEL_TAGS = (0x0100, 0x0101, 0x0112)  # width, height, orientation
PIXEL_TAGS_OF_CAMERA = (0xA002, 0xA003)  # width, height again
LONGEST_EXIF = 65000  # bytes in one JPEG segment


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
                notes = _notes(image)  # before loading, which discards how the file is coded
                image.load()
                return replace(_to_photo(image), notes=notes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise many kinds of errors on damaged data
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from error


def write_image(path: Path, photo: Photo) -> None:
    """Writes ``photo`` atomically as PNG, JPEG or WebP, by the suffix of ``path``.

    JPEG blends alpha onto white. 16-bit gray is kept in PNG and rounded to 8 bits elsewhere.

    Raises:
        UserError: If the suffix is another one, the format cannot hold an image of this size, or
            the file cannot be written.
    """
    kind = check_output_size(path, *photo.size)
    data = io.BytesIO()  # encoders that write to disk themselves miss a full disk
    image = _pillow_to_save(photo, kind)
    icc = photo.icc_profile
    if icc is not None and icc[16:20] != (b"GRAY" if photo.grayscale else b"RGB "):
        icc = None  # the profile of another color space would make the file invalid
    metadata = {"icc_profile": icc, "exif": photo.exif}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    image.save(data, kind, **SAVE_OPTIONS[kind], **metadata)
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


def collect_inputs(arguments: Iterable[str]) -> list[Path]:
    """Finds the images of files, folders and glob patterns.

    A file is taken whatever its name, even if it is missing (reading it will report that); a folder
    gives the images directly in it, and a pattern the images that it matches (``**`` for folders at
    all levels). Hidden files are skipped.

    Returns:
        Paths in the order of the arguments, sorted within each, every file once.

    Raises:
        UserError: If a folder or a pattern has no images.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        for path in _expand(argument):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def preview(photo: Photo) -> Image.Image:
    """Returns the image on white as 8-bit RGB, without alpha."""
    return _pillow_to_save(photo, "JPEG").convert("RGB")


def _expand(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if path.is_dir():
        return _images(path.iterdir()) or _nothing(f"{path}: no images directly in this folder")
    if path.exists() or not glob.has_magic(argument):
        return [path]
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207  (Path.glob: no absolute ones)
    return _images(map(Path, matches)) or _nothing(f"{argument}: no image matches")


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in READ_SUFFIXES and path.name[0] != "." and path.is_file()
    )


def _nothing(message: str) -> NoReturn:
    raise UserError(message)


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


def _notes(image: Image.Image) -> tuple[str, ...]:
    """Returns what reading ``image``, which is open but not loaded, loses."""
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # whose other frames belong to the same photo
        notes.append(f"the first of {frames} frames is used")
    if image.mode[0] != "I" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        notes.append("16-bit color is read as 8-bit")
    return tuple(notes)


def _to_photo(image: Image.Image) -> Photo:
    with suppress(Exception):  # damaged EXIF has no usable orientation
        image = ImageOps.exif_transpose(image)
    icc, exif = image.info.get("icc_profile"), _exif(image)
    if image.mode == "CMYK":
        image, icc = _cmyk_to_rgb(image, icc), None
    photo = _from_deep_gray(image) if image.mode[0] in "IF" else _from_eight_bit(image)
    return replace(photo, icc_profile=icc, exif=exif)


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
    """Converts to the mode and depth that ``kind`` can hold."""
    if photo.grayscale and photo.bit_depth == 16 and photo.alpha is None and kind == "PNG":
        return Image.fromarray(in_strips(_to_sixteen_bit_gray, photo.rgb)[0].numpy())
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


def _to_sixteen_bit_gray(rgb: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114])  # as Pillow for 8 bits
    return quantize(torch.einsum("chw,c->hw", to_float(rgb), weights)[None], torch.uint16)
