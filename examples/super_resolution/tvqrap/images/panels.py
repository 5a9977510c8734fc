"""Shows images side by side."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from tvqrap.images.files import Photo, preview
from tvqrap.images.levels import from_pillow

PANEL = 640  # longest side of an image in a comparison
ZOOM = 3  # enlargement of the detail in a comparison
REDUCED = 3  # times the panel's size, from which a large image is shrunk with a better filter
STRIP = 256  # rows of a large image that are converted at a time
BICUBIC = Image.Resampling.BICUBIC
NEAREST = Image.Resampling.NEAREST  # shows every pixel as a square


def contact_sheet(
    rows: Sequence[Sequence[tuple[str, Image.Image]]], *, gap: int = 10, font_size: int = 18
) -> Image.Image:
    """Lays out images in rows on white, each under its caption.

    Args:
        rows: Pairs of caption and image; captions wider than their image are cut.
        gap: White pixels around every image.
        font_size: Height of the captions in pixels.
    """
    font = ImageFont.load_default(font_size)
    band = font_size + gap
    heights = [max(image.height for _, image in row) + band + gap for row in rows]
    widths = [sum(image.width + gap for _, image in row) for row in rows]
    canvas = Image.new("RGB", (max(widths) + gap, sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for caption, image in row:
            text = _cut(caption, image.width, lambda text: draw.textlength(text, font))
            draw.text((left, top + band - 5), text, "black", font, anchor="ls")
            canvas.paste(image, (left, top + band))
            left += image.width + gap
        top += height
    return canvas


def _cut(text: str, width: int, length: Callable[[str], float]) -> str:
    if length(text) <= width:
        return text
    while text and length(text + "...") > width:
        text = text[:-1]
    return text + "..." if text else ""


def comparison(photo: Photo, result: Photo) -> Image.Image:
    """Shows bicubic on the left and ``result`` on the right: the whole image and a detail.

    Large results are converted only as far as they are shown.
    """
    small = preview(photo)
    scale = result.size[0] // small.width
    if max(result.size) <= PANEL // 2:  # a detail would show nothing new
        whole = {"bicubic": upscale_by(small, scale), "model": preview(result)}
        return contact_sheet([[(name, _upscaled(image)) for name, image in whole.items()]])
    sides = find_detail(small, PANEL // ZOOM // scale)
    left, top, right, bottom = box = tuple(side * scale for side in sides)
    detail = {
        # Pillow also reads the pixels around the box.
        "bicubic": small.resize((right - left, bottom - top), BICUBIC, box=sides),
        "model": preview(_part(result, box)),
    }
    size = _fitting(result.size)
    whole = {"bicubic": small.resize(size, BICUBIC), "model": _shrunk(result, size)}
    for image in whole.values():
        _mark(image, box, size[0] / result.size[0])
    return contact_sheet([
        list(whole.items()),
        [(f"{name}, {ZOOM}x", upscale_by(p, ZOOM, NEAREST)) for name, p in detail.items()],
    ])  # fmt: skip


def find_detail(image: Image.Image, side: int) -> tuple[int, int, int, int]:
    """Returns the square with the most contrast, cut to the image: left, top, right, bottom."""
    width, height = min(side, image.width), min(side, image.height)
    gray = from_pillow(image.convert("L")).float()
    contrast = torch.zeros_like(gray)
    contrast[:, 1:, 1:] = gray.diff(dim=1)[..., 1:].abs() + gray.diff(dim=2)[:, 1:].abs()
    step = max(min(width, height) // 4, 1)
    sums = F.avg_pool2d(contrast, (height, width), step)[0]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return left * step, top * step, left * step + width, top * step + height


def upscale_by(image: Image.Image, factor: int, filter_: Image.Resampling = BICUBIC) -> Image.Image:
    """Resizes an image to ``factor`` times its size with a classical filter."""
    return image.resize((image.width * factor, image.height * factor), filter_)


def _upscaled(image: Image.Image) -> Image.Image:
    return upscale_by(image, max(PANEL // 2 // max(image.size), 1), NEAREST)


def _fitting(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the size of a panel in which an image of ``size`` is as large as it can be."""
    width, height = (max(1, round(side * min(1.0, PANEL / max(size)))) for side in size)
    return width, height


def _part(photo: Photo, box: tuple[int, int, int, int]) -> Photo:
    left, top, right, bottom = box
    inside = (slice(None), slice(top, bottom), slice(left, right))
    alpha = None if photo.alpha is None else photo.alpha[inside]
    return replace(photo, rgb=photo.rgb[inside], alpha=alpha)


def _shrunk(photo: Photo, size: tuple[int, int]) -> Image.Image:
    """Shrinks a photo, strip by strip to some times the size, and then at once."""
    width, height = photo.size
    factor = max(1, width // (REDUCED * size[0]))
    reduced = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = factor * max(1, STRIP // factor)
    for top in range(0, height, rows):
        strip = preview(_part(photo, (0, top, width, min(top + rows, height))))
        reduced.paste(strip.reduce(factor), (0, top // factor))
    return reduced.resize(size, Image.Resampling.LANCZOS)


def _mark(image: Image.Image, box: tuple[int, int, int, int], factor: float) -> None:
    """Draws a frame around the detail ``box`` of the image before it was shrunk."""
    left, top, right, bottom = (round(side * factor) for side in box)
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline="black", width=3)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white")
