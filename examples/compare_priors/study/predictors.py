"""Training and measuring a predictor of codes: what a low-resolution image becomes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from study.images import PIECES, Pair
from study.measures import judge
from study.networks import DIM, Predictor
from study.priors import Tokenizer
from study.setting import Setting, objective, optimizer_for, parts_of, reports
from study.table import Phase, PredictorRow
from vqprior.functional import (
    distance_cross_entropy,
    index_cross_entropy,
    nearest_indices,
    select_codes,
    straight_through,
)
from vqprior.losses import AdversarialLoss, ReconstructionAwareLoss, alignment_loss
from vqprior.nn import PatchDiscriminator

WATCHED = 16 * PIECES  # of held-out images, that a curve is measured on
STRUCTURE_WEIGHT = 2.0  # of the regression, where cross-entropy has 1: the paper's ratio
CRITIC_WIDTH = 32
MOST_LIKELY = Phase(0)  # what is done with a prediction after training


OF_VECTORS = ("continuous", "nearest")  # estimators of predictors that give vectors, not logits


class Prediction(NamedTuple):
    """What is known of a low-resolution image before codes are chosen."""

    features: Tensor | None  # of the structure, where it has to be regressed
    structure: Tensor  # on the grid of codes; zeros for a prior without
    logits: Tensor  # (b, H/8, W/8, k); or vectors (b, H/8, W/8, DIM)


class SuperResolver(nn.Module):
    """A tokenizer and a predictor of its codes.

    Args:
        tokenizer: What decodes them.
        has_structure: Whether it decodes a structure beside them.
        estimator: How codes are chosen: see ``Phase``.
    """

    def __init__(self, tokenizer: Tokenizer, *, has_structure: bool, estimator: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.estimator = estimator
        self.has_structure = has_structure
        self.regressed = has_structure and tokenizer.structure.regressed
        outputs = DIM if estimator in OF_VECTORS else len(tokenizer.codebook)
        self.predictor = Predictor(outputs, _stride(tokenizer) if self.regressed else None)

    def predict(self, lr: Tensor) -> Prediction:
        """Returns structure and logits."""
        seen = self.predictor.look(lr)
        features = None
        if self.regressed:
            features = self.predictor.regressor(seen)
            structure = self.tokenizer.structure.expand(features)
        elif self.has_structure:
            structure = self.tokenizer.structure.expand(lr)
        else:
            structure = torch.zeros_like(seen[:, :DIM])
        return Prediction(features, structure, self.predictor(seen, structure))

    def choose(self, prediction: Prediction, phase: Phase, generator: torch.Generator) -> Tensor:
        """Returns a vector for each place, ``(b, DIM, H/8, W/8)``."""
        codes = self.tokenizer.codebook.detach()
        if self.estimator in OF_VECTORS:
            vectors = prediction.logits.float()
            if self.estimator == "nearest":
                vectors = straight_through(vectors, codes[nearest_indices(vectors, codes)])
            return vectors.movedim(-1, 1)
        vectors, _ = select_codes(
            prediction.logits,
            codes,
            estimator=phase.estimator,
            temperature=phase.temperature,
            generator=generator,
        )
        return vectors.movedim(-1, 1)

    def decode(self, vectors: Tensor, prediction: Prediction) -> Tensor:
        """Returns the image."""
        return self.tokenizer.decoder(self.tokenizer.meeting.decode(vectors, prediction.structure))

    def forward(self, lr: Tensor) -> tuple[Tensor, Prediction]:
        """Enlarges ``(b, 3, h, w)`` by the most likely codes."""
        prediction = self.predict(lr)
        vectors = self.choose(prediction, MOST_LIKELY, torch.Generator(lr.device))
        return self.decode(vectors, prediction), prediction

    def indices(self, prediction: Prediction) -> Tensor | None:
        """Returns the codes that are chosen, if any are."""
        if self.estimator == "continuous":
            return None
        if self.estimator == "nearest":
            return nearest_indices(prediction.logits.float(), self.tokenizer.codebook)
        return prediction.logits.argmax(dim=-1)


def build(row: PredictorRow, tokenizer: Tokenizer) -> SuperResolver:
    """Makes the untrained predictor of a row; the tokenizer stays as it is."""
    torch.manual_seed(row.seed)
    model = SuperResolver(
        tokenizer,
        has_structure=row.tokenizer.prior != "plain",
        estimator=row.phases[-1].estimator,
    )
    return model.to(memory_format=torch.channels_last)


def train(row: PredictorRow, model: SuperResolver, setting: Setting) -> dict:
    """Trains the predictor of a row in place, through all its phases.

    Returns:
        A ``history`` of what is seen on some held-out images.
    """
    history: list[dict[str, float]] = []
    done = _length(row.start)
    for phase in row.phases:
        _train_phase(row, model, phase, setting, history, done)
        done += phase.steps
    model.eval().requires_grad_(requires_grad=False)
    return {"history": history}


def _train_phase(
    row: PredictorRow,
    model: SuperResolver,
    phase: Phase,
    setting: Setting,
    history: list[dict[str, float]],
    done: int,
) -> None:
    tokenizer, predictor = model.tokenizer, model.predictor
    tokenizer.requires_grad_(phase.end_to_end)
    predictor.requires_grad_(requires_grad=True)
    learning = [model] if phase.end_to_end else [predictor]
    optimizer, schedule = optimizer_for(learning, phase.learning_rate, phase.steps)
    loss_of, critic = _objective(phase, predictor, setting.device)
    generator = torch.Generator(setting.device).manual_seed(row.seed)
    distance = _distance_between_codes(tokenizer) if phase.targets == "distance" else 1.0
    # Batches that no earlier phase has seen.
    batches = setting.images.batches(1000 + row.seed, phase.batch)
    due = reports(phase.steps)
    for step in setting.steps(phase.steps, row.name):
        pair = batches[done + step]
        with setting.autocast():
            prediction = model.predict(pair.lr)
            image = None
            if phase.image > 0:
                image = model.decode(model.choose(prediction, phase, generator), prediction)
                image = image.float()
            loss = _code_loss(model, prediction, pair, phase, distance)
            own = tokenizer(pair.hr, pair.lr) if phase.end_to_end else None
        if image is not None:
            loss = loss + phase.image * loss_of(image, pair.hr)[0]
        if own is not None:
            loss = loss + loss_of(own.image.float(), pair.hr)[0] + own.quantizer_output.loss
            loss = loss + sum(own.terms.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in predictor.head.parameters()])
        optimizer.step()
        schedule.step()
        if critic is not None:
            critic.step(image, pair.hr)
        if step + 1 in due:
            seen = watch(model, setting)
            history.append({"step": done + step + 1, "gradient": float(norm), **seen})


class Critic:
    """A discriminator and its optimizer."""

    def __init__(self, loss: AdversarialLoss, learning_rate: float) -> None:
        self.loss = loss
        self.optimizer = torch.optim.Adam(loss.parameters(), learning_rate, betas=(0.5, 0.9))

    def step(self, image: Tensor, truth: Tensor) -> None:
        """Teaches it one batch."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.discriminator_loss(image, truth).backward()
        self.optimizer.step()


def _objective(
    phase: Phase, predictor: Predictor, device: torch.device
) -> tuple[ReconstructionAwareLoss, Critic | None]:
    if phase.adversarial == 0:
        return objective(device, phase.perceptual), None
    torch.manual_seed(0)
    adversarial = AdversarialLoss(PatchDiscriminator(width=CRITIC_WIDTH, num_layers=2).to(device))
    # The decoder is frozen: the head of the predictor stands in for its last layer.
    loss = objective(
        device,
        phase.perceptual,
        adversarial=adversarial,
        weights={"adversarial": phase.adversarial},
        reference=predictor.head.head.weight,
    )
    return loss, Critic(adversarial, phase.learning_rate)


def _code_loss(
    model: SuperResolver, prediction: Prediction, pair: Pair, phase: Phase, distance: float
) -> Tensor:
    """The loss on codes and on a regressed structure, weighed."""
    if phase.code == 0 and not model.regressed:
        return prediction.logits.new_zeros(())
    with torch.no_grad():
        described = model.tokenizer.describe(pair.hr, pair.lr)
    loss = prediction.logits.new_zeros(())
    if phase.code > 0:
        truth = model.tokenizer.meeting(described.texture, described.structure).indices
        if phase.targets == "index":
            found = index_cross_entropy(prediction.logits, truth)
        else:
            codes = model.tokenizer.codebook
            found = distance_cross_entropy(prediction.logits, truth, codes, temperature=distance)
        loss = loss + phase.code * found
    if model.regressed and phase.code > 0:
        weight = STRUCTURE_WEIGHT * phase.code
        loss = loss + weight * alignment_loss(prediction.features, described.features)
    return loss


def _distance_between_codes(tokenizer: Tokenizer) -> float:
    """The mean squared distance of a code to the one nearest to it."""
    codes = tokenizer.codebook
    distances = torch.cdist(codes, codes).square()
    distances.fill_diagonal_(float("inf"))
    return float(distances.amin(dim=1).mean())


def _stride(tokenizer: Tokenizer) -> int:
    return tokenizer.structure.stride


def _length(row: PredictorRow | None) -> int:
    """Steps that lie behind the predictor of a row."""
    if row is None:
        return 0
    return _length(row.start) + sum(phase.steps for phase in row.phases)


@torch.no_grad()
def watch(model: SuperResolver, setting: Setting) -> dict[str, float]:
    """Measures the accuracy of codes, how sure they are, and the images."""
    held_out = setting.images.held_out
    return _measure(model, Pair(held_out.hr[:WATCHED], held_out.lr[:WATCHED]))[0]


@torch.no_grad()
def measure(model: SuperResolver, setting: Setting) -> tuple[dict, Tensor]:
    """Measures on all held-out images.

    Returns:
        What ``judge`` says of the images; the share of right codes (``accuracy``); the mean
        probability of the codes that are chosen (``confidence``); and the images.
    """
    return _measure(model, setting.images.held_out)


def _measure(model: SuperResolver, held_out: Pair) -> tuple[dict[str, float], Tensor]:
    images, right, sure = [], [], []
    for pair in parts_of(held_out):
        image, prediction = model(pair.lr)
        images.append(image)
        indices = model.indices(prediction)
        if indices is not None:
            described = model.tokenizer.describe(pair.hr, pair.lr)
            truth = model.tokenizer.meeting(described.texture, described.structure).indices
            right.append(indices == truth)
        if model.estimator not in OF_VECTORS:
            sure.append(prediction.logits.softmax(dim=-1).amax(dim=-1))
    found = judge(torch.cat(images), held_out.hr)
    if right:
        found["accuracy"] = float(torch.cat(right).float().mean())
    if sure:
        found["confidence"] = float(torch.cat(sure).mean())
    return found, torch.cat(images)
