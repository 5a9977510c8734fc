"""Compares estimated gradients with the exact one, place by place.

At one place of an image, with the most likely codes everywhere else, the expected loss of a code
drawn from ``p`` is ``sum_k p_k L_k``, and its gradient with respect to the logits is
``p_k (L_k - sum_j p_j L_j)``. Decoding an image for every code gives both exactly.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from study.setting import PIECES, Setting
from study.table import GradientRow
from train import objective_maker
from tvqrap.models.assembly import SuperResolver
from tvqrap.training.recipes import Recipe
from vqprior.functional import select_codes

ESTIMATORS = {"straight_through": False, "soft": False, "gumbel": True, "reinmax": True}  # random?
AT_ONCE = 64  # images decoded at once


def measure_gradients(row: GradientRow, model: SuperResolver, setting: Setting) -> dict:
    """Compares estimates at random places of held-out images; see ``Place.compare``."""
    rng = torch.Generator().manual_seed(row.seed)
    noise = torch.Generator(setting.device).manual_seed(row.seed)
    found = []
    for number in range(row.places):
        one = PIECES * number % len(setting.hr)
        hr, lr = setting.hr[one : one + 1], setting.lr[one : one + 1]
        found.append(Place(model, hr, lr, rng, row.sharpened).compare(row.draws, noise))
    return {"places": found}


class Place:
    """One place of an image, with the loss of the image as a function of the vector there."""

    def __init__(
        self, model: SuperResolver, hr: Tensor, lr: Tensor, rng: torch.Generator,
        sharpened: float = 1.0,
    ) -> None:  # fmt: skip
        self.model, self.hr, self.lr = model, hr, lr
        self.codes = model.tokenizer.codes
        last_layer = model.tokenizer.decoder.last_layer.weight
        self.objective = objective_maker(Recipe(), None)(last_layer).to(hr.device)
        with torch.no_grad():
            self.prediction = model.predict(lr)
        sides = self.prediction.logits.shape[1:3]
        self.place = (0, *(int(torch.randint(side, (), generator=rng)) for side in sides))
        self.logits = sharpened * self.prediction.logits[self.place]
        self.chosen = self.prediction.logits.argmax(dim=-1)

    def losses(self, vectors: Tensor) -> Tensor:
        """Returns the loss of the image for each of the vectors ``(n, d)`` at this place."""
        count = len(vectors)
        here = torch.zeros_like(self.chosen, dtype=torch.bool)
        here[self.place] = True
        codes = torch.where(here[..., None], vectors[:, None, None], self.codes[self.chosen])
        structure = self.prediction.structure.expand(count, -1, -1, -1)
        prediction = self.prediction._replace(structure=structure)
        images = self.model.decode(prediction, codes, self.lr.expand(count, -1, -1, -1))
        return torch.stack([self.objective(image, self.hr)[0] for image in images.split(1)])

    @torch.no_grad()
    def all_losses(self) -> Tensor:
        """Returns the loss for each code ``(k,)``."""
        return torch.cat([self.losses(part) for part in self.codes.split(AT_ONCE)])

    def estimates(self, estimator: str, draws: int, noise: torch.Generator) -> Tensor:
        """Returns gradients of the loss with respect to the logits ``(draws, k)``."""
        logits = self.logits.expand(draws, -1).clone().requires_grad_()
        vectors, _ = select_codes(logits, self.codes, estimator=estimator, generator=noise)
        (gradient,) = torch.autograd.grad(self.losses(vectors).sum(), logits)
        return gradient

    def compare(self, draws: int, noise: torch.Generator) -> dict:
        """Compares estimates with the exact gradient.

        Returns ``confidence``, the probability of the most likely code; ``exact``, the norm of the
        exact gradient; and for each estimator ``cosine``, the cosine to the exact one (of the mean
        over draws for random estimators), ``single``, the same for one draw, ``norm``, its norm
        relative to the exact one, and ``improves``, whether the code that the estimate favors most
        lowers the loss (None if that code is chosen already).
        """
        losses, p = self.all_losses(), self.logits.softmax(dim=-1)
        exact = p * (losses - (p * losses).sum())
        chosen = int(self.chosen[self.place])
        found: dict = {"confidence": float(p.max()), "exact": float(exact.norm())}
        for estimator, is_random in ESTIMATORS.items():
            gradients = self.estimates(estimator, draws if is_random else 1, noise)
            mean = gradients.mean(dim=0)
            favored = int(mean.argmin())
            found[estimator] = {
                "cosine": float(F.cosine_similarity(mean, exact, dim=0)),
                "single": float(F.cosine_similarity(gradients, exact[None], dim=1).mean()),
                "norm": float(mean.norm() / exact.norm().clamp_min(1e-30)),
                "improves": None if favored == chosen else bool(losses[favored] < losses[chosen]),
            }
        return found
