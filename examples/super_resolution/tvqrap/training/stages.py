"""What each of the three stages trains, on which loss.

A stage holds the networks that learn (``trained``) beside those that do not, and turns a batch into
a ``Step``, by a loss of tvqrap/models/assembly.py. Everything else (optimizer, averaging,
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
from vqprior import CodebookEMA, CodebookRevival, initialize_codebooks_
from vqprior.losses import ReconstructionAwareLoss

# The loss on images is made for the parameter at which an adversarial gradient is balanced.
MakeObjective = Callable[[nn.Parameter], ReconstructionAwareLoss]


class StepRandomness(NamedTuple):
    """What is random in a step, beside the samples.

    Attributes:
        joint: A number in [0, 1) for each sample of the joint batch, ``(batch,)``.
        own: Where in the joint batch the samples at hand are.
        generator: For what may differ with the number of processes.
    """

    joint: Tensor
    own: range
    generator: torch.Generator | None = None


class Stage(nn.Module):
    """What the stages have in common.

    Whatever in it requires gradients gets one in every step, as ``DistributedDataParallel`` asks.
    A discriminator is not in it: it has an optimizer of its own.
    """

    name: str
    trained: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.rules = nn.ModuleList()

    def forward(self, hr: Tensor, lr: Tensor, randomness: StepRandomness) -> Step:
        """Computes the loss of ``(b, 3, H, W)`` and ``(b, 3, H/4, W/4)`` in [0, 1]."""
        raise NotImplementedError

    def model(self, trained: nn.Module) -> TextureTokenizer | SuperResolver:
        """Returns what is saved."""
        raise NotImplementedError

    def validate(self, trained: nn.Module, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns images, the indices they used, and the true ones."""
        raise NotImplementedError


class TokenizerStage(Stage):
    """Stage 1: reconstruct images from structure and codes.

    With structure from the low-resolution image, some samples are decoded without codes
    (``code_dropout``): the structure then learns to say all it can by itself, and what is left to
    the codes is a conditional residual.

    Args:
        tokenizer: What to train.
        make_objective: Makes the loss on the image.
        codebook: Whether codes learn by ``"rules"`` or by ``"gradient"``.
        code_dropout: Share of samples without codes.

    Attributes:
        starts_from_data: Whether ``start_codes`` is to be called before the first step.
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
            self.rules.append(CodebookEMA(tokenizer.quantizer))
            self.rules.append(CodebookRevival(tokenizer.quantizer))

    @torch.no_grad()
    def start_codes(self, hr: Tensor, lr: Tensor) -> None:
        """Starts the codebook from what the untrained networks see on all processes."""
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
        # The quantizer averages over samples with codes, of which other processes may have more:
        # so weighted, the mean over processes is that of the joint batch.
        share = own.float().mean() / kept.float().mean().clamp_min(1 / len(kept))
        return tokenizer_loss(self.trained, hr, lr, self.objective, mask=mask, code_weight=share)

    def model(self, trained: nn.Module) -> TextureTokenizer:
        """Returns what is saved."""
        return trained

    @torch.no_grad()
    def validate(self, trained: nn.Module, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns reconstructions, the indices they used, and the true ones."""
        indices = trained.describe(hr, lr).indices
        return trained(hr, lr).image, indices, indices


class PredictorStage(Stage):
    """Stage 2: predict the true codes (and, for the paper's structure, regress it).

    Args:
        tokenizer: The prior, which is frozen.
        predictor: Where to start; None for an untrained one.
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
        """Returns what is saved."""
        return SuperResolver(self.tokenizer, trained)

    @torch.no_grad()
    def validate(self, trained: nn.Module, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns predicted images, the predicted indices, and the true ones."""
        model = self.model(trained)
        return model(lr), model.indices(lr), self.tokenizer.describe(hr, lr).indices


class RapStage(PredictorStage):
    """Stage 3: reconstruction-aware prediction, the loss is on the image.

    Args:
        tokenizer: The frozen prior.
        predictor: The predictor of stage 2.
        make_objective: Makes the loss on the image.
        estimator: How the gradient passes the choice of codes.
        temperature: Softens (above 1) the distribution in that gradient.
        code_weight: Weight of the code-level loss that is kept beside; the paper has 0.
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
        # The decoder is frozen: the head of the predictor stands in for its last layer.
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
