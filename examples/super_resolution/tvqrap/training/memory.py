"""Photos decoded once and kept on the training device, where crops are cut and degraded.

``data.py`` reads photos crop by crop, so that every sample follows from its number, which is too
slow for a fast device. Here one indexing operation gathers all crops of several batches.
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
from tvqrap.training.photos import check_damage, find_photos

LANCZOS = Image.Resampling.LANCZOS
BORDER = 4 * SCALE  # pixels around a crop, for the filters of the degradation
READERS = 8  # threads; decoding releases the GIL


@dataclasses.dataclass(frozen=True)
class Copies:
    """Reduced copies of photos to keep, so that objects appear at several sizes.

    Attributes:
        factors: Scales of the copies, 1 for the photo itself; copies that are too small are left
            out.
        weight: Probability of a reduced copy relative to a photo of its size.
    """

    factors: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35)
    weight: float = 0.6


class PhotoMemory:
    """Photos as 8-bit RGB in one tensor.

    The probability of a photo is proportional to the square root of its area. Photos that cannot be
    read are left out, with a note for each.

    Args:
        sources: Folders of photos, or lists of them.
        smallest: Smallest side of a photo in pixels.
        device: Device of the tensor.
        copies: Reduced copies to make.

    Attributes:
        photos: Number of photos.
        damage: Why photos were left out, a line for each.

    Raises:
        UserError: If there is no photo, none is large enough, or none can be read.
    """

    def __init__(
        self, sources: Sequence[Path], *, smallest: int, device: torch.device,
        copies: Copies | None = None,
    ) -> None:  # fmt: skip
        copies = Copies() if copies is None else copies
        paths = [path for source in sources for path in find_photos(source)]
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(lambda path: _decode(path, copies, smallest), paths))
        self.damage = [group for group in read if isinstance(group, str)]
        check_damage(self.damage, len(paths), "is left out")
        kept = [group for group in read if not isinstance(group, str)]
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
        """Returns random crops, flipped and rotated in one of eight ways, as bytes
        ``(n, 3, side, side)``.

        Args:
            count: Number of crops.
            side: Side of a crop in pixels, at most ``smallest``.
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
        """Returns crops as ``crops``, with a preference for detail.

        Of two candidates, the one with more contrast is taken with probability 3/4, because sky and
        blurred backgrounds teach little.
        """
        first, second = self.crops(2 * count, side, generator).chunk(2)
        richer = _contrast(first) > _contrast(second)
        swapped = Chances(count, generator).whether(0.25)
        return torch.where((richer ^ swapped)[:, None, None, None], first, second)


class CropPair(NamedTuple):
    """A batch of crops in both sizes, floats in [0, 1], channels last."""

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
    """Yields batches of degraded crops without end.

    Args:
        photos: The photos.
        mixture: The degradation.
        batch: Crops per batch.
        crop: Side of a crop in high-resolution pixels.
        generator: On the device of the photos.
        ahead: Batches made at once; on a GPU the launches take most of the time.
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
    """Returns the mean absolute difference of neighboring pixels in green, for each crop."""
    green = crops[:, 1].float()
    return green.diff(dim=-1).abs().mean((1, 2)) + green.diff(dim=-2).abs().mean((1, 2))


def _decode(path: Path, copies: Copies, smallest: int) -> list[np.ndarray] | str:
    """Returns a photo and its reduced copies that are large enough, or why it cannot be read."""
    try:
        image = preview(read_image(path))
    except UserError as error:
        return str(error)
    found = []
    for factor in copies.factors:
        size = tuple(round(factor * side) for side in image.size)
        if min(size) >= smallest:
            found.append(np.asarray(image if factor == 1 else image.resize(size, LANCZOS)))
    return found
