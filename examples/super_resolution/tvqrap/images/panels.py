"""Shows images side by side."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from tvqrap.images.files import Photo, preview
from tvqrap.images.levels import from_pillow

PANEL = 640  # longest side of an image in a comparison
ZOOM = 3  # enlargement of the detail in a comparison
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
    """Shows bicubic on the left and ``result`` on the right: the whole image and a detail."""
    small, large = preview(photo), preview(result)
    scale = large.width // small.width
    images = {"bicubic": upscale_by(small, scale), "model": large}
    sides = find_detail(small, PANEL // ZOOM // scale)
    left, top, right, bottom = (side * scale for side in sides)
    box = (left, top, right, bottom)
    if max(large.size) <= PANEL // 2:  # a detail would show nothing new
        whole = [(name, _upscaled(image)) for name, image in images.items()]
        return contact_sheet([whole])
    whole = [(name, _shrunk(image, box)) for name, image in images.items()]
    detail = [
        (f"{name}, {ZOOM}x", upscale_by(p.crop(box), ZOOM, NEAREST)) for name, p in images.items()
    ]
    return contact_sheet([whole, detail])


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


def _shrunk(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Shrinks an image to its panel and marks the place of the detail."""
    small = image.copy()
    small.thumbnail((PANEL, PANEL), Image.Resampling.LANCZOS)
    factor = small.width / image.width
    left, top, right, bottom = (round(side * factor) for side in box)
    draw = ImageDraw.Draw(small)
    draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline="black", width=3)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white")
    return small
