"""The three training stages: which networks learn, with which loss.

A stage holds the networks to train (``trained``) and the frozen ones, and computes a ``Step`` from
a batch with a loss of tvqrap/models/assembly.py. Everything else (optimizer, averaging,
checkpoints, logs) is the same for all stages: see update.py and trainer.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvqrap.models.assembly import (
    Step,
    SuperResolver,
    TextureTokenizer,
    predictor_losses,
    rap_loss,
    tokenizer_loss,
)
from vqprior import ChainedRules, default_rules, initialize_codebooks_
from vqprior.losses import ReconstructionAwareLoss

# Makes the loss on images for the parameter at which adversarial gradients are balanced.
MakeObjective = Callable[[nn.Parameter], ReconstructionAwareLoss]


class StepRandomness(NamedTuple):
    """The randomness of a step besides its samples.

    Attributes:
        joint: One number in [0, 1) per sample of the joint batch, ``(batch,)``.
        own: Positions of this part's samples in the joint batch.
        generator: Source of randomness that may differ with the number of processes.
    """

    joint: Tensor
    own: range
    generator: torch.Generator | None = None


class Stage(nn.Module):
    """Base class of the stages.

    Every parameter that requires a gradient gets one in every step, as ``DistributedDataParallel``
    requires. A discriminator is not part of a stage: it has its own optimizer.
    """

    name: str
    trained: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.rules = ChainedRules()  # none

    def forward(self, hr: Tensor, lr: Tensor, randomness: StepRandomness) -> Step:
        """Computes the loss of ``(b, 3, H, W)`` and ``(b, 3, H/4, W/4)`` in [0, 1]."""
        raise NotImplementedError

    def model(self, trained: nn.Module) -> TextureTokenizer | SuperResolver:
        """Returns the model to save."""
        raise NotImplementedError

    def validate(self, trained: nn.Module, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns images, their indices, and the true indices."""
        raise NotImplementedError


class TokenizerStage(Stage):
    """Stage 1: reconstructs images from structure and codes.

    With structure from the low-resolution image, a share of the samples is decoded without codes
    (``code_dropout``), so that the structure alone predicts as much as possible and the codes hold
    the residual.

    Args:
        tokenizer: The tokenizer to train.
        make_objective: Makes the loss on the image.
        codebook: Whether codes learn by ``"rules"`` or by ``"gradient"``.
        code_dropout: Share of samples without codes.

    Attributes:
        starts_from_data: Whether to call ``start_codes`` before the first step.
    """

    name = "tokenizer"

    def __init__(
        self,
        tokenizer: TextureTokenizer,
        make_objective: MakeObjective,
        *,
        codebook: str = "rules",
        code_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.config = tokenizer.config
        self.trained = tokenizer
        self.objective = make_objective(tokenizer.decoder.last_layer.weight)
        self.starts_from_data = codebook == "rules"
        self.code_dropout = 0.0 if tokenizer.structure.regressed else code_dropout
        if codebook == "rules":
            self.rules = default_rules(tokenizer.quantizer)

    @torch.no_grad()
    def start_codes(self, hr: Tensor, lr: Tensor) -> None:
        """Initializes the codebook by k-means on the batches of all processes."""
        texture = self.trained.texture(hr)
        features = self.trained.structure.features(hr, lr, texture)
        structure = self.trained.structure.expand(features)
        generator = torch.Generator().manual_seed(0)
        initialize_codebooks_(self.trained.quantizer, texture, structure, generator=generator)

    def forward(self, hr: Tensor, lr: Tensor, randomness: StepRandomness) -> Step:
        """Reconstructs a batch."""
        grid = self.config.grid
        size = (len(hr), hr.shape[-2] // grid, hr.shape[-1] // grid)
        kept = randomness.joint >= self.code_dropout
        own = kept[randomness.own.start : randomness.own.stop]
        mask = own[:, None, None].expand(size)
        # The quantizer averages over samples with codes, whose number differs between processes;
        # with this weight, the mean over processes is that of the joint batch.
        share = own.float().mean() / kept.float().mean().clamp_min(1 / len(kept))
        return tokenizer_loss(self.trained, hr, lr, self.objective, mask=mask, code_weight=share)

    def model(self, trained: nn.Module) -> TextureTokenizer:
        """Returns the tokenizer."""
        return trained

    @torch.no_grad()
    def validate(self, trained: nn.Module, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns reconstructions, their indices, and the true indices (the same)."""
        indices = trained.describe(hr, lr).indices
        return trained(hr, lr).image, indices, indices


class PredictorStage(Stage):
    """Stage 2: predicts the true codes and, for the paper's structure, regresses it.

    Args:
        tokenizer: The tokenizer, which is frozen.
        predictor: The predictor to start from; None for a new one.
    """

    name = "predictor"

    def __init__(self, tokenizer: TextureTokenizer, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.config = tokenizer.config
        self.tokenizer = tokenizer.requires_grad_(requires_grad=False).eval()
        self.trained = tokenizer.config.make_predictor() if predictor is None else predictor

    def forward(self, hr: Tensor, lr: Tensor, randomness: StepRandomness) -> Step:
        """Predicts the codes of a batch."""
        model = SuperResolver(self.tokenizer, self.trained)
        prediction = model.predict(lr)
        terms = predictor_losses(model, prediction, hr, lr)
        indices = prediction.logits.argmax(dim=-1)
        return Step(sum(terms.values()), terms, indices)

    def model(self, trained: nn.Module) -> SuperResolver:
        """Returns the super-resolver."""
        return SuperResolver(self.tokenizer, trained)

    @torch.no_grad()
    def validate(self, trained: nn.Module, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns predicted images, predicted indices, and true indices."""
        model = self.model(trained)
        return model(lr), model.indices(lr), self.tokenizer.describe(hr, lr).indices


class RapStage(PredictorStage):
    """Stage 3: reconstruction-aware prediction, with the loss on the decoded image.

    Args:
        tokenizer: The tokenizer, which is frozen.
        predictor: The predictor of stage 2.
        make_objective: Makes the loss on the image.
        estimator: Gradient estimator of the choice of codes; see ``select_codes``.
        temperature: Temperature of the estimator.
        code_weight: Weight of the code-level loss; the paper has 0.
    """

    name = "rap"

    def __init__(
        self,
        tokenizer: TextureTokenizer,
        predictor: nn.Module,
        make_objective: MakeObjective,
        *,
        estimator: str = "straight_through",
        temperature: float = 1.0,
        code_weight: float = 0.0,
    ) -> None:
        super().__init__(tokenizer, predictor)
        # The decoder is frozen, so gradients are balanced at the head of the predictor.
        self.objective = make_objective(predictor.head.head.weight)
        self.estimator = estimator
        self.temperature = temperature
        self.code_weight = code_weight

    def forward(self, hr: Tensor, lr: Tensor, randomness: StepRandomness) -> Step:
        """Predicts codes, decodes them, compares images."""
        model = SuperResolver(self.tokenizer, self.trained)
        return rap_loss(
            model, hr, lr, self.objective, code_weight=self.code_weight,
            estimator=self.estimator, temperature=self.temperature,
            generator=randomness.generator,
        )  # fmt: skip
