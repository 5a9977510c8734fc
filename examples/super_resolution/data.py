"""Pairs of high- and low-resolution crops, cut from photos that fit into memory."""

import sys
from pathlib import Path

import numpy as np
import torch
from cli import UserError
from model import SCALE
from pairs import photo_loaders
from torch import Tensor
from tqdm import tqdm


class PhotoPairs:
    """Photos and their low-resolution versions, in memory as 8-bit RGB.

    The low-resolution version is Pillow's bicubic reduction of the whole photo, rounded to 8 bits,
    so that crops see no border that the photo has not. A batch depends on the seed and its number
    alone: a resumed training sees the batches that an uninterrupted one would have seen.

    Args:
        folder: Where the photos are; subfolders are not searched.
        crop: Side of a crop in high-resolution pixels.
        seed: Starts the choice of crops.

    Raises:
        UserError: If there is no photo, none is large enough, or one cannot be read.
    """

    def __init__(self, folder: Path, *, crop: int, seed: int = 0) -> None:
        self.crop = crop
        self.seed = seed
        loaders = tqdm(photo_loaders(folder), "reading photos", leave=False, disable=None)
        pairs = [load() for load in loaders]
        self.pairs = [pair for pair in pairs if min(pair.hr.shape[-2:]) >= crop]
        if not self.pairs:
            largest = max(min(pair.hr.shape[-2:]) for pair in pairs)
            raise UserError(
                f"{folder}: every photo is smaller than the crop of {crop} pixels (the largest "
                f"short side is {largest}); pass a smaller --crop"
            )
        if skipped := len(pairs) - len(self.pairs):
            print(f"{skipped} photos smaller than the crop are left out", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """Returns ``(b, 3, crop, crop)`` and ``(b, 3, crop / 4, crop / 4)`` in [0, 1]."""
        rng = np.random.default_rng((self.seed, number))
        crops = [self._crop(rng) for _ in range(size)]
        hr, lr = (torch.stack(part).float() / 255 for part in zip(*crops, strict=True))
        return hr, lr

    def _crop(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        _, hr, lr = self.pairs[rng.integers(len(self.pairs))]
        small = self.crop // SCALE
        top = int(rng.integers(lr.shape[-2] - small + 1))
        left = int(rng.integers(lr.shape[-1] - small + 1))
        flip, turns = bool(rng.integers(2)), int(rng.integers(4))

        def cut(picture: Tensor, scale: int) -> Tensor:
            rows = slice(top * scale, (top + small) * scale)
            columns = slice(left * scale, (left + small) * scale)
            part = picture[:, rows, columns].rot90(turns, (1, 2))
            return part.flip(2) if flip else part

        return cut(hr, SCALE), cut(lr, 1)
