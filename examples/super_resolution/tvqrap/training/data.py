"""Batches of crops in two sizes, the same for any number of processes and workers.

Samples are numbered from the first step to the last. Everything random about a sample (photo,
position, rotation, degradation) follows from the seed and its number alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tvqrap.cli import UserError
from tvqrap.degradations.pipeline import Degradation
from tvqrap.models.assembly import SCALE
from tvqrap.training.photos import PhotoFiles
from tvqrap.training.stopping import leave_signals_to_the_trainer

BICUBIC = Image.Resampling.BICUBIC
MARGIN = 4 * SCALE  # more than the radius of the bicubic kernel

# Maps a photo (h, w, 3), the side of a crop, and a source of randomness to a crop in both sizes.
Crop = Callable[[np.ndarray, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Split:
    """How a joint batch is divided among processes, and the share of each into parts.

    Attributes:
        batch: Samples in a step of all processes together.
        rank: Number of this process.
        processes: Number of processes.
        accumulate: Number of parts of each process's share, computed one after the other.

    Raises:
        UserError: If the parts would differ in size, so that a mean of means would not be the mean.
    """

    batch: int
    rank: int = 0
    processes: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.processes * self.accumulate):
            raise UserError(
                f"--batch: {self.batch} samples cannot be divided evenly among {self.processes} "
                f"processes x --accumulate {self.accumulate}"
            )

    def parts(self) -> list[range]:
        """Returns the positions of this process's parts in the joint batch."""
        size = self.batch // (self.processes * self.accumulate)
        first = self.rank * self.accumulate
        return [
            range(part * size, (part + 1) * size) for part in range(first, first + self.accumulate)
        ]


class Batch(NamedTuple):
    """A batch of crops in both sizes."""

    hr: Tensor  # (b, 3, crop, crop), bytes or floats in [0, 1]
    lr: Tensor  # (b, 3, crop / 4, crop / 4): the clean reduction
    seeds: list[int]  # one per sample, for its degradation
    damage: tuple[str, ...] = ()  # a line for each photo that was replaced, for each sample

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch as floats in [0, 1] on a device."""
        hr, lr = (
            part.to(device, memory_format=torch.channels_last, non_blocking=True).float() / 255
            for part in (self.hr, self.lr)
        )
        return self._replace(hr=hr, lr=lr)


class Crops(Dataset):
    """A dataset of samples by number.

    A photo that cannot be read is replaced by another. If none can be read, the error is returned,
    not raised: an exception that leaves a worker process of a ``DataLoader`` loses its type.

    Args:
        photos: The photos.
        crop: Side of a crop in high-resolution pixels.
        augmentation: A name in ``AUGMENTATIONS``.
        seed: Random seed.
    """

    def __init__(self, photos: PhotoFiles, *, crop: int, augmentation: str, seed: int) -> None:
        self.photos = photos
        self.crop = crop
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, number: int) -> Batch | UserError:
        """Returns a batch of one sample."""
        # Samples that initialize a codebook have negative numbers; a seed must not be negative.
        rng = np.random.default_rng((self.seed, number % 2**60))
        try:
            photo, damage = self.photos.find(int(rng.integers(len(self.photos))))
        except UserError as error:
            return error
        pair = AUGMENTATIONS[self.augmentation](photo, self.crop, rng)
        hr, lr = (torch.from_numpy(np.ascontiguousarray(part)) for part in pair)
        seed = int(rng.integers(2**62))
        return Batch(hr.permute(2, 0, 1)[None], lr.permute(2, 0, 1)[None], [seed], damage)

    def batch(self, numbers: range) -> Batch:
        """Returns samples as one batch of bytes.

        Raises:
            UserError: If no photo can be read.
        """
        batch = collate([self[number] for number in numbers])
        if isinstance(batch, UserError):
            raise batch
        return batch


@dataclasses.dataclass
class Data:
    """The data to train and to validate on.

    Attributes:
        training: Crops to train on.
        validation: Crops to validate on.
        degrade: Makes low-resolution images; None for the clean ones of the crops.
    """

    training: Crops
    validation: Crops
    degrade: Degradation | None = None

    def degraded(self, batch: Batch) -> Batch:
        """Returns the batch with degraded low-resolution images."""
        if self.degrade is None:
            return batch
        lr = self.degrade(batch.hr, batch.seeds)
        return batch._replace(lr=lr.contiguous(memory_format=torch.channels_last))


class SampleNumbers(Sampler[range]):
    """Yields the sample numbers of each part, from the first step on, without end."""

    def __init__(self, split: Split, first_step: int) -> None:
        self.split = split
        self.first_step = first_step

    def __iter__(self) -> Iterator[range]:
        for step in itertools.count(self.first_step):
            start = step * self.split.batch
            for part in self.split.parts():
                yield range(start + part.start, start + part.stop)


@contextmanager
def reading(
    crops: Crops, numbers: SampleNumbers, *, workers: int, device: torch.device
) -> Iterator[Iterator[Batch]]:
    """Reads the parts of all steps, one after the other.

    Args:
        crops: The samples.
        numbers: The numbers to read.
        workers: Number of processes that read ahead; 0 to read in this process.
        device: Device of the batches.

    Yields:
        An iterator of batches of floats on the device; it raises ``UserError`` if no photo can be
        read.

    Raises:
        UserError: If a worker has died; torch may raise this anywhere in the block.
    """
    loader = DataLoader(
        crops,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),  # the default would draw from the global one
    )
    try:
        with closing(_on_device(loader, device)) as batches:
            yield batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a process that reads photos has died, perhaps out of memory; continue with "
            "--resume and fewer --workers"
        ) from error


def _on_device(loader: DataLoader, device: torch.device) -> Generator[Batch, None, None]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch.to(device)


def collate(samples: list[Batch | UserError]) -> Batch | UserError:
    """Joins batches of one sample, or returns the first error among them."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    hr, lr, seeds, damage = zip(*samples, strict=True)
    lines = tuple(itertools.chain.from_iterable(damage))
    return Batch(torch.cat(hr), torch.cat(lr), [seed for part in seeds for seed in part], lines)


def crop_flip_rotate(photo: np.ndarray, crop: int, rng: np.random.Generator) -> tuple:
    """Cuts a random crop, flipped and rotated in one of eight ways."""
    pair = cut(photo, crop, rng)
    flip, turns = bool(rng.integers(2)), int(rng.integers(4))
    pair = tuple(np.rot90(part, turns) for part in pair)
    return tuple(part[:, ::-1] if flip else part for part in pair)


def crop_flip(photo: np.ndarray, crop: int, rng: np.random.Generator) -> tuple:
    """Cuts a random crop, flipped or not; the paper's stage 1."""
    pair = cut(extend(photo, crop), crop, rng)
    flip = bool(rng.integers(2))
    return tuple(part[:, ::-1] if flip else part for part in pair)


def resize_flip(photo: np.ndarray, crop: int, rng: np.random.Generator) -> tuple:
    """Resizes a square of full side to the crop, flipped or not; the paper's stages 2 and 3."""
    photo = extend(photo, crop)
    side = min(photo.shape[:2])
    top, left = (int(rng.integers(n - side + 1)) for n in photo.shape[:2])
    flip = bool(rng.integers(2))
    hr = average_areas(photo[top : top + side, left : left + side], crop)
    hr = hr[:, ::-1] if flip else hr
    return hr, reduce_part(hr, 0, 0, crop)


AUGMENTATIONS: dict[str, Crop] = {
    "crop_flip_rotate": crop_flip_rotate,
    "crop_flip": crop_flip,
    "resize_flip": resize_flip,
}


def cut(photo: np.ndarray, crop: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the same random place from a photo and from its bicubic reduction."""
    rows, columns = (side // SCALE for side in photo.shape[:2])
    photo = photo[: rows * SCALE, : columns * SCALE]
    top, left = (SCALE * int(rng.integers(n - crop // SCALE + 1)) for n in (rows, columns))
    return photo[top : top + crop, left : left + crop], reduce_part(photo, top, left, crop)


def reduce_part(photo: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    """Returns a square of Pillow's bicubic reduction of the whole photo, bit for bit.

    It is computed from the square and the surrounding pixels that the kernel reaches, so crops have
    no border artifacts.
    """
    up, before = min(top, MARGIN), min(left, MARGIN)
    around = photo[top - up : top + side + MARGIN, left - before : left + side + MARGIN]
    image = Image.fromarray(np.ascontiguousarray(around))
    box = (before, up, before + side, up + side)
    return np.array(image.resize((side // SCALE, side // SCALE), BICUBIC, box=box))


def extend(photo: np.ndarray, side: int) -> np.ndarray:
    """Pads a photo by reflection at the bottom and right to at least ``side``.

    The last row is not repeated; photos smaller than the padding are reflected several times.
    """
    missing = [(0, max(side - n, 0)) for n in photo.shape[:2]]
    return np.pad(photo, [*missing, (0, 0)], mode="reflect")


def average_areas(square: np.ndarray, side: int) -> np.ndarray:
    """Reduces a square by area averaging, with fractions of pixels at the edges of an area."""
    if len(square) == side:
        return square
    edges = np.linspace(0, len(square), side + 1)
    starts = np.arange(len(square))
    # overlap[i, j]: how much of row j lies between the edges i and i + 1.
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    weights = (overlap.clip(0) * (side / len(square))).astype(np.float32)
    values = np.moveaxis(square, 2, 0).astype(np.float32)
    means = np.moveaxis(weights @ values @ weights.T, 0, 2)
    return means.round().clip(0, 255).astype(np.uint8)
