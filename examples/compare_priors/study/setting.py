"""The data of the study: crops to train on, fixed images to measure on."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from tvqrap.training.data import Batch, Crops, reduce_part
from tvqrap.training.photos import PhotoFiles, name_damage

CROP = 64  # side of a crop to train on, and of a piece to measure on
CUTS = 2
PIECES = CUTS**2  # of a held-out image
VIEW = CUTS * CROP  # side of a held-out image
PART = 40  # images measured at once


class Setting:
    """Random crops of photos to train on, and the middles of at most ``most`` held-out photos.

    Photos that cannot be read are named; others are trained on, and are measured, in their place.

    Models are measured on pieces of the size of the training crops. A structure encoded at H/32 has
    2 x 2 vectors in a crop, all of them at a border, and does not generalize to larger images.
    ``hr`` and ``lr`` are the pieces, photo after photo, RGB in [0, 1].
    """

    def __init__(
        self, photos: Path, val: Path, *, most: int, device: torch.device | str = "cpu",
        precision: str = "float32",
    ) -> None:  # fmt: skip
        self.device, self.precision = torch.device(device), precision
        self.photos = PhotoFiles(photos, smallest=CROP)
        self.named: set[str] = set()
        files = PhotoFiles(val, smallest=VIEW)
        middles = []
        for number in range(len(files)):
            if len(middles) == most:
                break
            found = files.find(number)
            name_damage(found.damage, self.named)
            if not found.damage:
                middles.append(middle(found.photo))
        self.hr, self.lr = (pieces(part).to(device) for part in zip(*middles, strict=True))

    def batches(self, seed: int, batch: int, first: int = 0) -> Iterator[Batch]:
        """Yields the batches of a training from number ``first`` on; ``seed`` determines them."""
        crops = Crops(self.photos, crop=CROP, augmentation="crop_flip_rotate", seed=seed)
        for number in itertools.count(first):
            samples = crops.batch(range(number * batch, (number + 1) * batch))
            name_damage(samples.damage, self.named)
            yield samples.to(self.device)

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the held-out pieces in parts that fit into memory."""
        return zip(self.hr.split(PART), self.lr.split(PART), strict=True)


def middle(photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the middle of a photo, and of its bicubic reduction."""
    rows, columns = (side // 4 * 4 for side in photo.shape[:2])
    top, left = ((side - VIEW) // 8 * 4 for side in (rows, columns))
    hr = photo[top : top + VIEW, left : left + VIEW]
    return hr, reduce_part(photo[:rows, :columns], top, left, VIEW)


def pieces(images: tuple[np.ndarray, ...]) -> Tensor:
    """Cuts byte images ``(h, w, 3)`` into four pieces each, as floats in [0, 1]."""
    whole = torch.from_numpy(np.stack(images)).float() / 255
    pattern = "b (rows h) (columns w) c -> (b rows columns) c h w"
    cut = rearrange(whole, pattern, rows=CUTS, columns=CUTS)
    return cut.contiguous(memory_format=torch.channels_last)
