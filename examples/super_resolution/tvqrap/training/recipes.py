"""Hyperparameters: one recipe per preset and stage; options of train.py replace single values.

The recipes of ``paper`` are those of Li et al., ICLR 2026, arXiv 2509.23774, and the authors' code,
except for the perceptual loss: the weights of LPIPS may not be shipped, so ``FilterBankLoss``
replaces it.
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

STAGES = ("tokenizer", "predictor", "rap")


def signed_mse(image: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error of images in [0, 1], scaled as for [-1, 1]."""
    return 4 * F.mse_loss(image, target)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one stage.

    Attributes:
        learning_rate: Learning rate of Adam, for the networks and the discriminator.
        betas: Betas of Adam for the networks.
        critic_betas: Betas of Adam for the discriminator.
        averaging: Decay of the moving average of the weights, which is saved.
        batch: Samples per step, of all processes together.
        crop: Side of a crop in high-resolution pixels.
        pixel: Pixel loss on images in [0, 1].
        perceptual: Weight of the filter-bank loss.
        adversarial: Weight of the adversarial loss.
        signed: Whether the discriminator sees images in [-1, 1] instead of [0, 1].
        degradation: A name in ``DEGRADATIONS`` of degradations/pipeline.py.
        augmentation: A name in ``AUGMENTATIONS`` of data.py.
        codebook: How codes learn: by ``"rules"``, initialized by k-means, or by ``"gradient"``,
            initialized uniformly.
        code_weight: Weight of the code-level loss in stage 3.
        code_dropout: Share of samples that are decoded without codes; not used with regressed
            structure.
    """

    learning_rate: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.99)
    critic_betas: tuple[float, float] = (0.5, 0.9)
    averaging: float = 0.998
    batch: int = 16
    crop: int = 64
    pixel: Callable[[Tensor, Tensor], Tensor] = F.l1_loss
    perceptual: float = 0.2
    adversarial: float = 0.0
    signed: bool = False
    degradation: str = "bicubic"
    augmentation: str = "crop_flip_rotate"
    codebook: str = "rules"
    code_weight: float = 0.0
    code_dropout: float = 0.1


OURS = {
    "tokenizer": Recipe(),
    "predictor": Recipe(),
    # The authors keep no code-level loss; here it helps, see docs/benchmarks/priors.md.
    "rap": Recipe(learning_rate=1e-4, code_weight=0.01),
}

PAPER_TOKENIZER = Recipe(
    learning_rate=4e-5,
    betas=(0.5, 0.9),
    critic_betas=(0.5, 0.9),
    averaging=0.995,
    batch=8,
    crop=512,
    pixel=signed_mse,
    perceptual=1.0,
    adversarial=0.75,
    signed=True,
    augmentation="crop_flip",
    codebook="gradient",
    code_dropout=0.0,
)
PAPER_RAP = dataclasses.replace(
    PAPER_TOKENIZER,
    betas=(0.9, 0.99),
    critic_betas=(0.9, 0.99),
    averaging=0.997,
    batch=4,
    degradation="second-order",
    augmentation="resize_flip",
)
PAPER = {
    "tokenizer": PAPER_TOKENIZER,
    # The authors continue for 4000 steps with crops of 512 and batches of 4.
    "predictor": dataclasses.replace(
        PAPER_RAP, learning_rate=1e-4, averaging=0.995, batch=32, crop=256, adversarial=0.0
    ),
    "rap": PAPER_RAP,
}

RECIPES: dict[str, dict[str, Recipe]] = {"tiny": OURS, "small": OURS, "paper": PAPER}


@dataclasses.dataclass(frozen=True)
class TimedRecipe(Recipe):
    """Hyperparameters of one stage of train_all.py.

    The learning rate warms up briefly and then falls along half a cosine over the stage's time, so
    every stage ends annealed on any machine.

    Attributes:
        share: Share of the total time.
        learned: Weight of the learned perceptual loss; ``perceptual`` is that of the filter bank
            used in its place.
        adversarial_from: Share of the stage's time after which the discriminator learns; before,
            images are too poor for it to be informative.
        critic_learning_rate: Learning rate of the discriminator.
        true_codes: Share of samples that are decoded with their true codes, in the stage that
            trains the decoder with the predictor.
    """

    batch: int = 64
    crop: int = 128
    learning_rate: float = 3e-4
    adversarial: float = 0.5
    code_dropout: float = 0.2
    share: float = 0.25
    learned: float = 0.03
    adversarial_from: float = 0.0
    critic_learning_rate: float = 2e-4
    true_codes: float = 0.0


# All stages use the degradations of mixture.py: structure and decoder are frozen after the first
# stage, so they must see every degradation there.
TIMED: dict[str, TimedRecipe] = {
    "tokenizer": TimedRecipe(share=0.45, adversarial=0.4, adversarial_from=0.5),
    "predictor": TimedRecipe(share=0.13, adversarial=0.0, code_dropout=0.0),
    # Less adversarial than the first stage and the paper (0.75), because predicted codes are a
    # guess: with 0.3, clean images had more texture and were further from the original.
    "rap": TimedRecipe(
        share=0.12, learning_rate=2e-4, adversarial=0.15, adversarial_from=0.3,
        code_weight=0.01, code_dropout=0.0,
    ),
    # Not in the paper, which keeps structure and decoder frozen.
    "joint": TimedRecipe(
        share=0.3, learning_rate=2e-4, adversarial=0.15, adversarial_from=0.3,
        code_weight=0.01, true_codes=0.2,
    ),
}  # fmt: skip
