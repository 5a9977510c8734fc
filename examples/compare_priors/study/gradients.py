"""How near an estimated gradient is to the exact one, place by place.

At one place of an image, with the most likely codes everywhere else, the expected loss of a code
drawn from ``p`` is ``sum_k p_k L_k``, and its gradient with respect to the logits is
``p_k (L_k - sum_j p_j L_j)``. Both can be had exactly, by decoding an image for every code.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from study.images import PIECES, Pair
from study.predictors import SuperResolver
from study.setting import Setting
from study.table import GradientRow
from vqprior.functional import select_codes
from vqprior.losses import FilterBank

ESTIMATORS = ("straight_through", "soft", "gumbel", "reinmax")
RANDOM = ("gumbel", "reinmax")
PERCEPTUAL = 0.2  # as in training
AT_ONCE = 64  # images that are decoded at once
TINY = 1e-30


def measure(row: GradientRow, model: SuperResolver, setting: Setting) -> dict:
    """Compares estimates at random places of held-out images.

    Returns:
        ``places``, a dict for each: ``confidence``, the probability of the most likely code;
        ``exact``, the norm of the exact gradient; and for each estimator its ``cosine`` to the
        exact one (of the mean over draws where it is random), ``single``, the same of one draw,
        ``norm``, its norm as a share of the exact one, and ``improves``, whether the code that the
        estimate favors most lowers the loss (None if that is the one chosen already).
    """
    chance = torch.Generator().manual_seed(row.seed)
    rng = torch.Generator(setting.device).manual_seed(row.seed)
    held_out = setting.images.held_out
    places = []
    for number in setting.steps(row.places, row.name):
        one = PIECES * number % len(held_out.hr)
        pair = Pair(held_out.hr[one : one + 1], held_out.lr[one : one + 1])
        place = _Place(model, pair, chance, row.sharpened)
        places.append(_compare(place, row.draws, rng))
    return {"places": places}


class _Place:
    """One place of one image, and what the image loses for the vector there."""

    def __init__(
        self, model: SuperResolver, pair: Pair, chance: torch.Generator, sharpened: float = 1.0
    ) -> None:
        self.model = model
        self.truth = pair.hr
        self.bank = FilterBank().to(pair.hr.device)
        self.codes = model.tokenizer.codebook
        with torch.no_grad():
            self.true_maps = self.bank(pair.hr)
            self.prediction = model.predict(pair.lr)
        rows, columns = self.prediction.logits.shape[1:3]
        self.row, self.column = (
            int(torch.randint(side, (), generator=chance)) for side in (rows, columns)
        )
        self.logits = sharpened * self.prediction.logits[0, self.row, self.column]
        chosen = self.prediction.logits.argmax(dim=-1)
        self.chosen = int(chosen[0, self.row, self.column])
        self.vectors = self.codes[chosen].movedim(-1, 1)

    def losses(self, vectors: Tensor) -> Tensor:
        """Returns the loss of the image for each of ``(n, d)``."""
        around = self.vectors.repeat(len(vectors), 1, 1, 1)
        here = torch.zeros_like(around[:1, :1], dtype=torch.bool)
        here[..., self.row, self.column] = True
        replaced = torch.where(here, vectors[:, :, None, None], around)
        structure = self.prediction.structure.expand(len(vectors), -1, -1, -1)
        prediction = self.prediction._replace(structure=structure)
        image = self.model.decode(replaced, prediction)
        pixel = (image - self.truth).abs().flatten(1).mean(dim=1)
        filters = [
            F.smooth_l1_loss(ours, theirs.expand_as(ours), beta=0.1, reduction="none")
            .flatten(1)
            .mean(dim=1)
            for ours, theirs in zip(self.bank(image), self.true_maps, strict=True)
        ]
        return pixel + PERCEPTUAL * torch.stack(filters).mean(dim=0)

    @torch.no_grad()
    def all_losses(self) -> Tensor:
        """Returns the loss for each code ``(k,)``."""
        return torch.cat([self.losses(part) for part in self.codes.split(AT_ONCE)])

    def estimates(self, estimator: str, draws: int, rng: torch.Generator) -> Tensor:
        """Returns gradients of the loss with respect to the logits ``(draws, k)``."""
        logits = self.logits.expand(draws, -1).clone().requires_grad_()
        vectors, _ = select_codes(logits, self.codes, estimator=estimator, generator=rng)
        (gradient,) = torch.autograd.grad(self.losses(vectors).sum(), logits)
        return gradient


def _compare(place: _Place, draws: int, rng: torch.Generator) -> dict:
    losses = place.all_losses()
    p = place.logits.softmax(dim=-1)
    exact = p * (losses - (p * losses).sum())
    found: dict = {"confidence": float(p.max()), "exact": float(exact.norm())}
    for estimator in ESTIMATORS:
        gradients = place.estimates(estimator, draws if estimator in RANDOM else 1, rng)
        mean = gradients.mean(dim=0)
        favored = int(mean.argmin())
        found[estimator] = {
            "cosine": float(F.cosine_similarity(mean, exact, dim=0)),
            "single": float(F.cosine_similarity(gradients, exact[None], dim=1).mean()),
            "norm": float(mean.norm() / exact.norm().clamp_min(TINY)),
            "improves": _improves(losses, favored, place.chosen),
        }
    return found


def _improves(losses: Tensor, favored: int, chosen: int) -> bool | None:
    return None if favored == chosen else bool(losses[favored] < losses[chosen])
