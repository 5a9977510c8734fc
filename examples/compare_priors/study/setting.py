"""What all trainings of the study share: images, precision, progress."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from study.images import Images, Pair
from vqprior.losses import FilterBankLoss, ReconstructionAwareLoss

REPORTS = 12  # points of a curve, at most
PART = 40  # images that are measured at once


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is the same for all rows.

    Attributes:
        images: What to train and to measure on.
        precision: Of the networks in training, ``"float32"`` or ``"bfloat16"``.
        jobs: How many rows are done at a time.
        quiet: Show no progress.
    """

    images: Images
    precision: str = "float32"
    jobs: int = 1
    quiet: bool = False

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.images.device

    def autocast(self) -> AbstractContextManager:
        """The precision of the networks."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.precision))

    def steps(self, count: int, name: str) -> Iterator[int]:
        """Counts steps, with a bar where somebody sees it."""
        hidden = True if self.quiet else None  # None: unless it is no terminal
        return iter(tqdm(range(count), name, leave=False, disable=hidden))


def optimizer_for(
    modules: list[nn.Module], learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam, and a rate that falls to 0 along half a cosine."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, learning_rate, betas=(0.9, 0.99), fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def objective(
    device: torch.device, perceptual: float = 0.2, **options: object
) -> ReconstructionAwareLoss:
    """The loss on images: L1, and a filter bank in place of learned features."""
    weights = {"perceptual": perceptual, **options.pop("weights", {})}
    return ReconstructionAwareLoss(
        pixel=F.l1_loss, perceptual=FilterBankLoss().to(device), weights=weights, **options
    )


def reports(steps: int) -> set[int]:
    """After which steps a point of a curve is measured: the first, the last, and between."""
    points = min(REPORTS, max(2, steps // 8))  # measuring should not take longer than training
    return {1 + round((steps - 1) * i / (points - 1)) for i in range(points)}


def parts_of(pair: Pair) -> Iterator[Pair]:
    """Cuts a batch into parts that are small enough to be computed at once."""
    for start in range(0, len(pair.hr), PART):
        yield Pair(pair.hr[start : start + PART], pair.lr[start : start + PART])


def parameters_of(module: nn.Module) -> int:
    """Counts numbers that a module holds, learned by gradient or not."""
    return sum(p.numel() for p in module.parameters())


def as_floats(terms: dict[str, Tensor]) -> dict[str, float]:
    """Values without gradients."""
    return {name: float(term.detach()) for name, term in terms.items()}
