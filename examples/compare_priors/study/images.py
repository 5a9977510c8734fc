"""The images of the study: crops to train on, and fixed ones to measure on."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from tvqrap.training.data import Crops, reduce_part
from tvqrap.training.photos import PhotoFiles

CROP = 64  # side of a crop to train on, and of a piece to measure on
CUTS = 2
PIECES = CUTS**2  # of a held-out image
VIEW = CUTS * CROP  # side of a held-out image


class Pair(NamedTuple):
    """Images in two sizes, RGB in [0, 1]."""

    hr: Tensor  # (b, 3, H, W)
    lr: Tensor  # (b, 3, H/4, W/4)


class Images:
    """Random crops of some photos, and the middles of others.

    Models are measured on pieces as large as the crops that they are trained on. A structure that
    is encoded at H/32 has 2 x 2 vectors in a crop, all of them at a border, and is worth little
    where there are others.

    Args:
        photos: Folder of photos to train on.
        val: Folder of photos to measure on.
        most: Number of them at most.
        device: Where images go.

    Attributes:
        held_out: ``PIECES`` of each, one after the other.

    Raises:
        UserError: If there is no photo, or one cannot be read or is too small.
    """

    def __init__(
        self, photos: Path, val: Path, *, most: int, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.photos = PhotoFiles(photos, smallest=CROP, quiet=True)
        held_out = PhotoFiles(val, smallest=VIEW, quiet=True)
        middles = [middle(held_out[number]) for number in range(min(most, len(held_out)))]
        self.held_out = Pair(
            *(_pieces(np.stack(part)).to(self.device) for part in zip(*middles, strict=True))
        )

    def batches(self, seed: int, batch: int) -> "Batches":
        """Returns the batches of one training."""
        crops = Crops(self.photos, crop=CROP, augmentation="turned", seed=seed)
        return Batches(crops, batch, self.device)


class Batches:
    """Batches by number: the same for the same seed."""

    def __init__(self, crops: Crops, batch: int, device: torch.device) -> None:
        self.crops = crops
        self.batch = batch
        self.device = device

    def __getitem__(self, number: int) -> Pair:
        found = self.crops.batch(range(number * self.batch, (number + 1) * self.batch))
        hr, lr, _ = found.to(self.device)
        return Pair(hr, lr)


def middle(photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the middle out of a photo and out of its bicubic reduction."""
    rows, columns = (side // 4 * 4 for side in photo.shape[:2])
    photo = photo[:rows, :columns]
    top, left = ((side - VIEW) // 8 * 4 for side in (rows, columns))
    hr = photo[top : top + VIEW, left : left + VIEW]
    return hr, reduce_part(photo, top, left, VIEW)


def joined(pieces: Tensor) -> Tensor:
    """Puts pieces ``(b * PIECES, 3, h, w)`` together again."""
    return rearrange(
        pieces, "(b rows columns) c h w -> b c (rows h) (columns w)", rows=CUTS, columns=CUTS
    )


def _pieces(images: np.ndarray) -> Tensor:
    found = torch.from_numpy(images).float() / 255
    found = rearrange(
        found, "b (rows h) (columns w) c -> (b rows columns) c h w", rows=CUTS, columns=CUTS
    )
    return found.contiguous(memory_format=torch.channels_last)
