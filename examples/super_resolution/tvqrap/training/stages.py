"""What each of the three stages trains, on which loss.

A stage holds the networks that learn (``trained``) beside those that do not, and turns a batch into
a ``Step``. Everything else (optimizer, averaging, checkpoints, logs) is the same for all stages:
see update.py and trainer.py.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvqrap.models.assembly import Prediction, SuperResolver, TextureTokenizer
from vqprior import CodebookEMA, CodebookRevival, QuantizerOutput, initialize_codebooks_
from vqprior.functional import index_cross_entropy
from vqprior.losses import ReconstructionAwareLoss, alignment_loss

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


@dataclasses.dataclass
class Step:
    """What one batch gave."""

    loss: Tensor
    terms: dict[str, Tensor]
    indices: Tensor  # for the meter of codebook usage
    image: Tensor | None = None  # for a discriminator
    quantizer_output: QuantizerOutput | None = None  # for rules


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
        tokenized = self.trained(hr, lr, own[:, None, None].expand(size))
        out = tokenized.quantizer_output
        # The quantizer averages over samples with codes, of which other processes may have more:
        # so weighted, the mean over processes is that of the joint batch.
        share = own.float().mean() / kept.float().mean().clamp_min(1 / len(kept))
        quantizer_terms = {name: share * term for name, term in out.terms.items()}
        loss, terms = self.objective(tokenized.image, hr)
        terms = terms | tokenized.terms | quantizer_terms
        loss = loss + sum(quantizer_terms.values()) + sum(tokenized.terms.values())
        return Step(loss, terms, out.indices, tokenized.image, out)

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
        prediction = SuperResolver(self.tokenizer, self.trained).predict(lr)
        terms = self.code_losses(prediction, hr, lr)
        indices = prediction.logits.argmax(dim=-1)
        return Step(sum(terms.values()), terms, indices)

    def code_losses(self, prediction: Prediction, hr: Tensor, lr: Tensor) -> dict[str, Tensor]:
        """Compares a prediction with what the tokenizer sees in the high-resolution image."""
        truth = self.tokenizer.describe(hr, lr)
        terms = {"code": index_cross_entropy(prediction.logits, truth.indices)}
        if self.tokenizer.structure.regressed:
            # The paper weighs 1 : 0.5; only the ratio matters to Adam.
            terms["structure"] = 2 * alignment_loss(prediction.features, truth.features)
        return terms

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
        prediction = model.predict(lr)
        image = model.reconstruct(
            prediction, lr, estimator=self.estimator, temperature=self.temperature,
            generator=randomness.generator,
        )  # fmt: skip
        loss, terms = self.objective(image, hr)
        if self.code_weight > 0:
            kept = {
                name: self.code_weight * term
                for name, term in self.code_losses(prediction, hr, lr).items()
            }
            loss, terms = loss + sum(kept.values()), terms | kept
        return Step(loss, terms, prediction.logits.argmax(dim=-1), image)
