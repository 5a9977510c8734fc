"""Photos decoded once, kept in the memory of the training device, and cut into crops there.

``data.py`` reads photos crop by crop, so that every sample follows from its number. A fast device
would wait for that: here a few million pixels of crops are gathered by one indexing operation, and
degraded together.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tvqrap.cli import UserError
from tvqrap.degradations.chances import Chances
from tvqrap.degradations.mixture import Mixture
from tvqrap.images.files import preview, read_image
from tvqrap.models.assembly import SCALE
from tvqrap.training.photos import find_photos

LANCZOS = Image.Resampling.LANCZOS
BORDER = 4 * SCALE  # around a crop, so that what makes it small sees beyond it
READERS = 8  # threads; decoding is done outside of Python's lock


@dataclasses.dataclass(frozen=True)
class Copies:
    """Which reduced copies of photos are kept, too: things are seen at several sizes.

    Attributes:
        factors: Of the sides of a copy, the photo's own included, as long as it is large enough.
        weight: How likely a reduced copy is, compared with a photo of its size.
    """

    factors: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35)
    weight: float = 0.6


class PhotoMemory:
    """Photos as 8-bit RGB in one tensor.

    How likely a photo is grows with its side, not with its area: a large one has more to show, but
    not as much more as it has pixels.

    Args:
        sources: Folders of photos, or lists of them.
        smallest: Sides that a photo must have.
        device: Where they are kept.
        copies: Which reduced copies are made.

    Raises:
        UserError: If there is no photo, none is large enough, or one cannot be read.
    """

    def __init__(
        self, sources: Sequence[Path], *, smallest: int, device: torch.device,
        copies: Copies | None = None,
    ) -> None:  # fmt: skip
        copies = Copies() if copies is None else copies
        paths = [path for source in sources for path in find_photos(source)]
        with ThreadPoolExecutor(READERS) as pool:
            kept = list(pool.map(lambda path: _decode(path, copies, smallest), paths))
        images = [image for group in kept for image in group]
        if not images:
            raise UserError(
                f"{sources[0]}: every photo is smaller than {smallest} pixels; pass a smaller "
                "--crop"
            )
        self.photos = sum(bool(group) for group in kept)
        likely = [
            (1.0 if number == 0 else copies.weight) * np.sqrt(image[..., 0].size)
            for group in kept
            for number, image in enumerate(group)
        ]
        sizes = torch.tensor([image.shape[:2] for image in images])
        areas = sizes.prod(1)
        pixels = np.concatenate([image.reshape(-1, 3) for image in images])
        self.pixels = torch.from_numpy(pixels).to(device)
        self.starts = (areas.cumsum(0) - areas).to(device)
        self.sizes = sizes.to(device)
        shares = torch.tensor(likely, dtype=torch.float64).cumsum(0)
        self.ends = (shares / shares[-1]).float().to(device)

    def crops(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        """Returns random crops, each turned in one of eight ways: ``(n, 3, side, side)`` bytes.

        Args:
            count: How many.
            side: Their side, at most ``smallest``.
            generator: On the device of the photos.
        """
        chances = Chances(count, generator)
        photo = torch.searchsorted(self.ends, chances.uniform()).clamp_max(len(self.ends) - 1)
        height, width = self.sizes[photo].unbind(1)
        top, left = (
            (chances.uniform() * (extent - side + 1)).long().minimum(extent - side)
            for extent in (height, width)
        )
        line = torch.arange(side, device=generator.device)
        rows, columns = (
            torch.where(chances.whether(0.5)[:, None], side - 1 - line, line) for _ in range(2)
        )
        begin, width = (self.starts[photo] + top * width + left)[:, None, None], width[:, None]
        upright = (rows * width)[:, :, None] + columns[:, None, :]
        lying = rows[:, :, None] + (columns * width)[:, None, :]
        places = begin + torch.where(chances.whether(0.5)[:, None, None], lying, upright)
        return self.pixels[places].movedim(-1, 1)

    def detailed_crops(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        """Returns crops as ``crops`` does, fewer of them without detail.

        Of two, the one with more contrast is taken three times out of four: sky and blurred
        backgrounds are a third of some photos, and teach little.
        """
        first, second = self.crops(2 * count, side, generator).chunk(2)
        richer = _contrast(first) > _contrast(second)
        swapped = Chances(count, generator).whether(0.25)
        return torch.where((richer ^ swapped)[:, None, None, None], first, second)


class CropPair(NamedTuple):
    """A batch in both sizes, floats in [0, 1], channels last."""

    hr: Tensor
    lr: Tensor


def crop_pairs(
    photos: PhotoMemory,
    mixture: Mixture,
    *,
    batch: int,
    crop: int,
    generator: torch.Generator,
    ahead: int = 1,
) -> Iterator[CropPair]:
    """Cuts and degrades crops without end.

    Args:
        photos: Where they come from.
        mixture: How they are degraded.
        batch: Crops in a batch.
        crop: Side of a crop in high-resolution pixels.
        generator: On the device of the photos.
        ahead: Batches that are made at once: on a GPU the launches, not the pixels, take time.
    """
    border = BORDER // SCALE
    inner = (..., slice(BORDER, BORDER + crop), slice(BORDER, BORDER + crop))
    small = (..., *(slice(border, border + crop // SCALE),) * 2)
    while True:
        around = photos.detailed_crops(ahead * batch, crop + 2 * BORDER, generator).float() / 255
        lr = mixture(around, generator)[small]
        for hr, low in zip(around[inner].split(batch), lr.split(batch), strict=True):
            yield CropPair(
                hr.contiguous(memory_format=torch.channels_last),
                low.contiguous(memory_format=torch.channels_last),
            )


def _contrast(crops: Tensor) -> Tensor:
    """The mean difference of neighbors in green, for each crop."""
    green = crops[:, 1].float()
    return green.diff(dim=-1).abs().mean((1, 2)) + green.diff(dim=-2).abs().mean((1, 2))


def _decode(path: Path, copies: Copies, smallest: int) -> list[np.ndarray]:
    """Returns a photo and its reduced copies, those that are large enough."""
    image = preview(read_image(path))
    found = []
    for factor in copies.factors:
        size = tuple(round(factor * side) for side in image.size)
        if min(size) >= smallest:
            found.append(np.asarray(image if factor == 1 else image.resize(size, LANCZOS)))
    return found
