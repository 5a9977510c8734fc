"""What each of the three stages trains, on which loss.

A stage holds the module that learns (``trained``) and turns a batch into a ``Step``. Everything
else (optimizer, averaging, checkpoints, logs) is the same for all stages: see trainer.py.
"""

import dataclasses
from collections.abc import Callable

import torch
from model import Architecture, SuperResolver, TextureTokenizer
from torch import Tensor, nn

from vqprior import CodebookEMA, CodebookRevival, QuantizerOutput, Rule, initialize_
from vqprior.functional import code_cross_entropy
from vqprior.losses import ReconstructionAwareLoss, alignment_loss

Batches = Callable[[int], tuple[Tensor, Tensor]]
# The loss on pictures is made for the parameter at which an adversarial gradient is balanced.
MakeObjective = Callable[[nn.Parameter], ReconstructionAwareLoss]


@dataclasses.dataclass
class Step:
    """What one batch gave."""

    loss: Tensor
    terms: dict[str, Tensor]
    picture: Tensor | None = None  # for a discriminator
    quantizer_output: QuantizerOutput | None = None  # for rules
    indices: Tensor | None = None  # for the meter of codebook usage


class TokenizerStage:
    """Stage 1: reconstruct pictures from structure and codes.

    With structure from the low-resolution picture, some samples are decoded without codes
    (``code_dropout``): the structure then learns to say all it can by itself, and what is left to
    the codes is a conditional residual.
    """

    name = "tokenizer"

    def __init__(
        self, config: Architecture, make_objective: MakeObjective, *, code_dropout: float = 0.1
    ) -> None:
        self.config = config
        self.trained = TextureTokenizer(config)
        self.objective = make_objective(self.trained.decoder.last_layer.weight)
        self.code_dropout = 0.0 if self.trained.structure.regressed else code_dropout
        self.rules: list[Rule] = [
            CodebookEMA(self.trained.quantizer),
            CodebookRevival(self.trained.quantizer),
        ]

    @torch.no_grad()
    def prepare(self, batches: Batches) -> None:
        """Starts the codebook from what the untrained networks see."""
        hr, lr = (torch.cat(part) for part in zip(*map(batches, range(-8, 0)), strict=True))
        texture = self.trained.texture(hr)
        features = self.trained.structure.features(hr, lr, texture)
        structure = self.trained.structure.expand(features)
        generator = torch.Generator().manual_seed(0)
        initialize_(self.trained.quantizer, texture, structure, generator=generator)

    def step(self, hr: Tensor, lr: Tensor) -> Step:
        """Reconstructs a batch."""
        grid = self.trained.config.grid
        size = (len(hr), hr.shape[-2] // grid, hr.shape[-1] // grid)
        kept = torch.rand(len(hr), 1, 1, device=hr.device) >= self.code_dropout
        tokenized = self.trained(hr, lr, kept.expand(size))
        out = tokenized.quantizer_output
        loss, terms = self.objective(tokenized.picture, hr)
        terms = terms | tokenized.terms | out.terms
        loss = loss + out.loss + sum(tokenized.terms.values())
        return Step(loss, terms, tokenized.picture, out, out.indices)

    def after_step(self, step: Step) -> None:
        """Lets the codebook follow."""
        for rule in self.rules:
            rule.step(step.quantizer_output)

    def model(self, trained: nn.Module) -> TextureTokenizer:
        """What is saved."""
        return trained

    @torch.no_grad()
    def validate(self, trained: nn.Module, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns reconstructions, the indices they used, and the true ones."""
        indices = trained.describe(hr, lr).indices
        return trained(hr, lr).picture, indices, indices


class PredictorStage:
    """Stage 2: predict the true codes (and, for the paper's structure, regress it)."""

    name = "predictor"
    rules: tuple[Rule, ...] = ()

    def __init__(self, tokenizer: TextureTokenizer, predictor: nn.Module | None = None) -> None:
        self.config = tokenizer.config
        self.tokenizer = tokenizer.requires_grad_(requires_grad=False).eval()
        self.trained = tokenizer.config.make_predictor() if predictor is None else predictor

    def prepare(self, batches: Batches) -> None:
        """Nothing to start."""

    def step(self, hr: Tensor, lr: Tensor) -> Step:
        """Predicts the codes of a batch."""
        prediction, terms = self.supervise(hr, lr)
        indices = prediction.logits.argmax(dim=-1)
        return Step(sum(terms.values()), terms, indices=indices)

    def supervise(self, hr: Tensor, lr: Tensor) -> tuple:
        """Returns the prediction and its code-level losses."""
        prediction = SuperResolver(self.tokenizer, self.trained).predict(lr)
        truth = self.tokenizer.describe(hr, lr)
        terms = {"code": code_cross_entropy(prediction.logits, truth.indices)}
        if self.tokenizer.structure.regressed:
            # The paper weighs 1 : 0.5; only the ratio matters to Adam.
            terms["structure"] = 2 * alignment_loss(prediction.features, truth.features)
        return prediction, terms

    def after_step(self, step: Step) -> None:
        """Nothing follows."""

    def model(self, trained: nn.Module) -> SuperResolver:
        """What is saved."""
        return SuperResolver(self.tokenizer, trained)

    @torch.no_grad()
    def validate(self, trained: nn.Module, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns predicted pictures, the predicted indices, and the true ones."""
        model = self.model(trained)
        return model(lr), model.indices(lr), self.tokenizer.describe(hr, lr).indices


class RapStage(PredictorStage):
    """Stage 3: reconstruction-aware prediction, the loss is on the picture.

    Args:
        tokenizer: The frozen prior.
        predictor: The predictor of stage 2.
        make_objective: Makes the loss on the picture.
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

    def step(self, hr: Tensor, lr: Tensor) -> Step:
        """Predicts codes, decodes them, compares pictures."""
        prediction, code_terms = self.supervise(hr, lr)
        model = SuperResolver(self.tokenizer, self.trained)
        picture = model.reconstruct(
            prediction, lr, estimator=self.estimator, temperature=self.temperature
        )
        loss, terms = self.objective(picture, hr)
        if self.code_weight > 0:
            kept = {name: self.code_weight * term for name, term in code_terms.items()}
            loss, terms = loss + sum(kept.values()), terms | kept
        return Step(loss, terms, picture, indices=prediction.logits.argmax(dim=-1))
