"""Trains tokenizers and predictors with the stages and updates of the super-resolution example."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from study.priors import build_tokenizer, mask_of
from study.quantizers import QUANTIZERS
from study.setting import Setting
from study.table import Phase, PredictorRow, TokenizerRow
from train import objective_maker
from tvqrap.models import assembly
from tvqrap.models.assembly import Prediction, SuperResolver, TextureTokenizer
from tvqrap.training.data import Split
from tvqrap.training.ranks import Ranks
from tvqrap.training.recipes import Recipe
from tvqrap.training.stages import MakeObjective, Stage, StepRandomness, TokenizerStage
from tvqrap.training.update import Critic, Update
from vqprior import IndexPredictor
from vqprior.functional import distance_cross_entropy, nearest_indices, straight_through

TOKENIZER = Recipe(learning_rate=8e-4)
START_BATCHES = 8  # batches from which codebooks are initialized


def train_tokenizer(row: TokenizerRow, setting: Setting) -> TextureTokenizer:
    """Trains the tokenizer of a row and freezes it."""
    tokenizer = build_tokenizer(row).to(setting.device)
    choice = QUANTIZERS[row.quantizer]
    hr, lr, *_ = next(setting.batches(row.seed, START_BATCHES * TOKENIZER.batch, first=-1))
    with torch.no_grad():
        choice.start(tokenizer.quantizer.quantizer.quantizer, prepared(tokenizer, hr, lr))
    stage = TokenizerStage(
        tokenizer, objective_maker(TOKENIZER, None), codebook=choice.codebook, code_dropout=0.0
    )
    if mask_of(row, lr) is not None:
        stage.code_dropout = 1.0
    run_steps(stage, TOKENIZER, row.steps, setting, seed=row.seed)
    return tokenizer.eval().requires_grad_(requires_grad=False)


def prepared(tokenizer: TextureTokenizer, hr: Tensor, lr: Tensor) -> Tensor:
    """Returns the quantizer's input, ``(b, H/8, W/8, d)``."""
    texture = tokenizer.texture(hr)
    structure = tokenizer.structure.expand(tokenizer.structure.features(hr, lr, texture))
    return tokenizer.quantizer.fuse(structure, texture).movedim(1, -1)


def run_steps(
    stage: Stage, recipe: Recipe, steps: int, setting: Setting, *, seed: int, first: int = 0,
    critic: Critic | None = None,
) -> None:  # fmt: skip
    """Trains a stage on batches from ``first`` on, with a cosine learning rate that ends at 0."""
    ranks, split = Ranks(device=setting.device), Split(recipe.batch)
    stage.to(setting.device, memory_format=torch.channels_last)
    update = Update(stage, recipe, ranks, split=split, critic=critic, precision=setting.precision)
    generator = torch.Generator(setting.device).manual_seed(seed)
    # All samples get the same number, so they are decoded all with or all without codes.
    alike = torch.zeros(recipe.batch, device=setting.device)
    randomness = [StepRandomness(alike, range(recipe.batch), generator)]
    batches = setting.batches(seed, recipe.batch, first)
    for step in tqdm(range(steps), stage.name, leave=False, disable=None):
        update.set_learning_rate(recipe.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2)
        outcome = update.compute(batches, randomness)
        if outcome.is_finite:
            update.apply(outcome)


class VectorResolver(SuperResolver):
    """A super-resolver whose predictor outputs vectors, used as they are or as nearest codes."""

    nearest = False

    def choose(self, prediction: Prediction, **options: object) -> Tensor:
        """Returns vectors ``(b, H/8, W/8, d)``."""
        vectors, codes = prediction.logits.float(), self.tokenizer.codes
        if not self.nearest:
            return vectors
        return straight_through(vectors, codes[nearest_indices(vectors, codes)])


def build_model(row: PredictorRow, tokenizer: TextureTokenizer) -> SuperResolver:
    """Makes the untrained predictor of a row."""
    torch.manual_seed(row.seed)
    config, estimator = tokenizer.config, row.phases[-1].estimator
    model = SuperResolver(tokenizer, config.make_predictor())
    if estimator in ("continuous", "nearest"):
        model = VectorResolver(tokenizer, model.predictor)
        model.predictor.head = IndexPredictor(2 * config.predictor_width, config.code_dim)
        model.nearest = estimator == "nearest"
    return model


class PhaseStage(Stage):
    """A phase: ``RapStage`` with additional losses and choices."""

    name = "phase"

    def __init__(self, model: SuperResolver, phase: Phase, make_objective: MakeObjective) -> None:
        super().__init__()
        self.resolver, self.phase = model, phase
        model.tokenizer.requires_grad_(phase.end_to_end)
        model.predictor.requires_grad_(requires_grad=True)
        self.trained = model if phase.end_to_end else model.predictor
        # The decoder is frozen, so gradients are balanced at the head of the predictor.
        self.objective = make_objective(model.predictor.head.head.weight)
        codes = model.tokenizer.codes.detach()
        distances = torch.cdist(codes, codes).square().fill_diagonal_(float("inf"))
        self.distance = float(distances.amin(dim=1).mean())  # of a code to its nearest neighbor

    def forward(self, hr: Tensor, lr: Tensor, randomness: StepRandomness) -> assembly.Step:
        """Adds the losses on codes and image, and the tokenizer's if it is trained."""
        model, phase = self.resolver, self.phase
        prediction = model.predict(lr)
        terms = self.code_losses(prediction, hr, lr) if phase.code > 0 else {}
        loss, image = sum(terms.values()), None
        if phase.image > 0:
            options = {"estimator": phase.estimator, "temperature": phase.temperature}
            image = model.reconstruct(prediction, lr, generator=randomness.generator, **options)
            on_image, image_terms = self.objective(image, hr)
            loss, terms = loss + phase.image * on_image, terms | image_terms
        if phase.end_to_end:
            loss = loss + assembly.tokenizer_loss(model.tokenizer, hr, lr, self.objective).loss
        return assembly.Step(loss, terms, prediction.logits.argmax(dim=-1), image)

    def code_losses(self, prediction: Prediction, hr: Tensor, lr: Tensor) -> dict[str, Tensor]:
        """Returns the weighted losses of stage 2, with the targets of the phase."""
        model, phase = self.resolver, self.phase
        terms = assembly.predictor_losses(model, prediction, hr, lr)
        if phase.targets == "distance":
            truth, codes = model.tokenizer.describe(hr, lr).indices, model.tokenizer.codes
            logits, temperature = prediction.logits, self.distance
            terms["code"] = distance_cross_entropy(logits, truth, codes, temperature=temperature)
        return {name: phase.code * term for name, term in terms.items()}


def train_predictor(row: PredictorRow, model: SuperResolver, setting: Setting) -> None:
    """Trains the predictor of a row in place through all phases, and freezes it."""
    done, seed = row.steps_before, 1000 + row.seed
    for phase in row.phases:
        recipe = Recipe(
            learning_rate=phase.learning_rate, batch=phase.batch, perceptual=phase.perceptual,
            adversarial=phase.adversarial,
        )  # fmt: skip
        torch.manual_seed(0)
        critic = Critic(Ranks(device=setting.device), recipe) if phase.adversarial > 0 else None
        stage = PhaseStage(model, phase, objective_maker(recipe, critic))
        # Continues with batches that no earlier phase has seen.
        run_steps(stage, recipe, phase.steps, setting, seed=seed, first=done, critic=critic)
        done += phase.steps
    model.eval().requires_grad_(requires_grad=False)
