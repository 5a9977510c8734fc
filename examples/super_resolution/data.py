"""Pairs of high- and low-resolution crops, cut from photos that fit into memory."""

import sys
from pathlib import Path

import numpy as np
import torch
from cli import UserError
from model import SCALE
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


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
        paths = find_photos(folder)
        pairs = [read_pair(path) for path in tqdm(paths, desc="reading photos", leave=False)]
        self.pairs = [pair for pair in pairs if min(pair[0].shape[-2:]) >= crop]
        if not self.pairs:
            largest = max(min(hr.shape[-2:]) for hr, _ in pairs)
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
        hr, lr = self.pairs[rng.integers(len(self.pairs))]
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


def find_photos(folder: Path) -> list[Path]:
    """Returns the photos of a folder in the order of their names.

    Raises:
        UserError: If the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --photos takes a folder of photos")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: holds no photo ({', '.join(sorted(SUFFIXES))})")
    return paths


def read_pair(path: Path) -> tuple[Tensor, Tensor]:
    """Reads a photo and reduces it 4 times: two uint8 tensors ``(3, h, w)``.

    The photo loses the rows and columns beyond a multiple of 32.

    Raises:
        UserError: If the file is not a readable photo of at least 32 x 32 pixels.
    """
    try:
        with Image.open(path) as image:
            photo = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from None
    width, height = (side // 32 * 32 for side in photo.size)
    if not width or not height:
        raise UserError(f"{path}: smaller than 32 x 32 pixels")
    photo = photo.crop((0, 0, width, height))
    small = photo.resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC)
    hr, lr = (torch.from_numpy(np.array(p)).permute(2, 0, 1).contiguous() for p in (photo, small))
    return hr, lr
