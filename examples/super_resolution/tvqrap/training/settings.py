"""The settings of a training besides its hyperparameters."""

import dataclasses
from pathlib import Path

from tvqrap.training.data import Split


@dataclasses.dataclass
class Settings:
    """Settings of a training besides its recipe.

    Attributes:
        out: Folder of this stage.
        run: Options that identify the training; a resumed one must have the same.
        split: How a joint batch is divided.
        steps: Number of steps to stop after; None for no limit.
        minutes: Minutes of training to stop after, resumed ones included; None for no limit.
        seed: Random seed.
        workers: Processes that read photos, per training process.
        precision: Precision of the networks, ``"float32"`` or ``"bfloat16"``.
        report_every: Steps between two rows of the log.
        sample_every: Steps between two images.
        checkpoint_every: Steps between two checkpoints; a multiple of ``report_every``.
    """

    out: Path
    run: dict[str, str | int | float | None]
    split: Split
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    workers: int = 0
    precision: str = "float32"
    report_every: int = 50
    sample_every: int = 500
    checkpoint_every: int = 200
