"""Batches of crops in two sizes, the same whoever reads them and however many processes there are.

Samples are numbered from the first step to the last. What is random about one (which photo, where,
how it is turned, how it is degraded) follows from the seed and its number alone.
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
MARGIN = 4 * SCALE  # more than the bicubic kernel sees beyond a pixel

# From a photo (h, w, 3), the side of a crop, and a source of randomness, to both sizes of a crop.
Crop = Callable[[np.ndarray, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Split:
    """How a joint batch is shared out: each process has a slice, in slices one after the other.

    Attributes:
        batch: Samples in a step of all processes together.
        rank: The number of this process.
        processes: How many there are.
        accumulate: Into how many parts each of them cuts its share.

    Raises:
        UserError: If parts would not be equally large: a mean of means would not be the mean.
    """

    batch: int
    rank: int = 0
    processes: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.processes * self.accumulate):
            raise UserError(
                f"--batch: {self.batch} samples cannot be shared out evenly to {self.processes} "
                f"processes x --accumulate {self.accumulate}"
            )

    def parts(self) -> list[range]:
        """Returns where in the joint batch the parts of this process are."""
        size = self.batch // (self.processes * self.accumulate)
        first = self.rank * self.accumulate
        return [
            range(part * size, (part + 1) * size) for part in range(first, first + self.accumulate)
        ]


class Batch(NamedTuple):
    """Crops in both sizes."""

    hr: Tensor  # (b, 3, crop, crop), bytes or floats in [0, 1]
    lr: Tensor  # (b, 3, crop / 4, crop / 4): the clean reduction
    seeds: list[int]  # one for each sample, for what else is random about it

    def to(self, device: torch.device) -> "Batch":
        """Returns floats in [0, 1] on a device."""
        hr, lr = (
            part.to(device, memory_format=torch.channels_last, non_blocking=True).float() / 255
            for part in (self.hr, self.lr)
        )
        return Batch(hr, lr, self.seeds)


class Crops(Dataset):
    """Samples by number.

    A photo that cannot be read is returned as the error, not raised: an exception that leaves a
    worker process of a ``DataLoader`` is no longer the one that was raised.

    Args:
        photos: Where crops come from.
        crop: Side of a crop in high-resolution pixels.
        augmentation: How a crop is made, a name in ``AUGMENTATIONS``.
        seed: Starts everything random.
    """

    def __init__(self, photos: PhotoFiles, *, crop: int, augmentation: str, seed: int) -> None:
        self.photos = photos
        self.crop = crop
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, number: int) -> Batch | UserError:
        """Returns a batch of one."""
        # Samples that start a codebook have negative numbers, and a seed must not be.
        rng = np.random.default_rng((self.seed, number % 2**60))
        try:
            photo = self.photos[int(rng.integers(len(self.photos)))]
        except UserError as error:
            return error
        pair = AUGMENTATIONS[self.augmentation](photo, self.crop, rng)
        hr, lr = (torch.from_numpy(np.ascontiguousarray(part)) for part in pair)
        seed = int(rng.integers(2**62))
        return Batch(hr.permute(2, 0, 1)[None], lr.permute(2, 0, 1)[None], [seed])

    def batch(self, numbers: range) -> Batch:
        """Returns samples in one batch of bytes.

        Raises:
            UserError: If a photo cannot be read.
        """
        batch = collate([self[number] for number in numbers])
        if isinstance(batch, UserError):
            raise batch
        return batch


@dataclasses.dataclass
class Data:
    """What to train and to report on.

    Attributes:
        training: Crops of the photos to train on.
        validation: Crops of the photos to report on.
        degrade: Makes low-resolution images; None for the clean ones that crops come with.
    """

    training: Crops
    validation: Crops
    degrade: Degradation | None = None

    def degraded(self, batch: Batch) -> Batch:
        """Returns the batch with the low-resolution images that the stage should see."""
        if self.degrade is None:
            return batch
        lr = self.degrade(batch.hr, batch.seeds)
        return batch._replace(lr=lr.contiguous(memory_format=torch.channels_last))


class SampleNumbers(Sampler[range]):
    """The numbers of the samples of each part, for all steps from one on."""

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
        numbers: Which of them.
        workers: Processes that read ahead; 0 to read here, when a part is asked for.
        device: Where parts go.

    Yields:
        An iterator of floats on the device; it raises ``UserError`` if a photo cannot be read.

    Raises:
        UserError: If a worker has died; torch says so wherever the block stands just then.
    """
    loader = DataLoader(
        crops,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    try:
        with closing(_on_device(loader, device)) as batches:
            yield batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a process that reads photos has died, perhaps for want of memory; continue with "
            "--resume and fewer --workers"
        ) from error


def _on_device(loader: DataLoader, device: torch.device) -> Generator[Batch, None, None]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch.to(device)


def collate(samples: list[Batch | UserError]) -> Batch | UserError:
    """Joins batches of one, or returns the first error among them."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    hr, lr, seeds = zip(*samples, strict=True)
    return Batch(torch.cat(hr), torch.cat(lr), [seed for part in seeds for seed in part])


def crop_flip_rotate(photo: np.ndarray, crop: int, rng: np.random.Generator) -> tuple:
    """A part of the photo, mirrored and turned in any of the eight ways."""
    pair = cut(photo, crop, rng)
    flip, turns = bool(rng.integers(2)), int(rng.integers(4))
    pair = tuple(np.rot90(part, turns) for part in pair)
    return tuple(part[:, ::-1] if flip else part for part in pair)


def crop_flip(photo: np.ndarray, crop: int, rng: np.random.Generator) -> tuple:
    """A part of the photo or of its mirror image; the paper's stage 1."""
    pair = cut(extend(photo, crop), crop, rng)
    flip = bool(rng.integers(2))
    return tuple(part[:, ::-1] if flip else part for part in pair)


def resize_flip(photo: np.ndarray, crop: int, rng: np.random.Generator) -> tuple:
    """The largest square of the photo or of its mirror image, made smaller; stages 2 and 3."""
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
    """Cuts the same place out of a photo and its bicubic reduction."""
    rows, columns = (side // SCALE for side in photo.shape[:2])
    photo = photo[: rows * SCALE, : columns * SCALE]
    top, left = (SCALE * int(rng.integers(n - crop // SCALE + 1)) for n in (rows, columns))
    return photo[top : top + crop, left : left + crop], reduce_part(photo, top, left, crop)


def reduce_part(photo: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    """Returns what Pillow's bicubic reduction of the whole photo has in place of a square.

    Bit for bit: it is computed from the square and so much around it as the kernel sees, so crops
    have no border that the photo has not.
    """
    up, before = min(top, MARGIN), min(left, MARGIN)
    around = photo[top - up : top + side + MARGIN, left - before : left + side + MARGIN]
    image = Image.fromarray(np.ascontiguousarray(around))
    box = (before, up, before + side, up + side)
    return np.array(image.resize((side // SCALE, side // SCALE), BICUBIC, box=box))


def extend(photo: np.ndarray, side: int) -> np.ndarray:
    """Mirrors a photo at the bottom and on the right where it is shorter than ``side``.

    The last row is not repeated; a photo smaller than what it lacks is mirrored several times.
    """
    missing = [(0, max(side - n, 0)) for n in photo.shape[:2]]
    return np.pad(photo, [*missing, (0, 0)], mode="reflect")


def average_areas(square: np.ndarray, side: int) -> np.ndarray:
    """Reduces a square: each pixel is the mean of the area that it covers, parts of pixels too."""
    if len(square) == side:
        return square
    edges = np.linspace(0, len(square), side + 1)
    starts = np.arange(len(square))
    # Of row j of the square, how much lies between the edges i and i + 1.
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    weights = (overlap.clip(0) * (side / len(square))).astype(np.float32)
    values = np.moveaxis(square, 2, 0).astype(np.float32)
    means = np.moveaxis(weights @ values @ weights.T, 0, 2)
    return means.round().clip(0, 255).astype(np.uint8)
