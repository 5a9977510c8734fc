"""The loss on images of train_all.py: L1, perceptual, and an adversarial term that joins late."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvqrap.training.update import Critic
from vqprior.losses import adaptive_weight

REFRESH = 8  # steps between two updates of the adaptive weight


class LateAdversarialObjective(nn.Module):
    """L1, a perceptual loss, and an adversarial loss that can be switched on later.

    As ``ReconstructionAwareLoss``, but the adaptive weight is updated once every few steps and
    smoothed, because each update takes two more backward passes through the losses and, if the
    decoder is frozen, through the decoder.

    Args:
        perceptual: ``(reconstruction, target) -> scalar``.
        weight: Weight of the perceptual loss.
        critic: The discriminator.
        reference: The parameter at which gradients are balanced.
        judged_from: Index of the first sample that the discriminator sees; earlier samples have no
            codes and should stay smooth.

    Attributes:
        adversarial: Norm of the adversarial gradient relative to that of the other terms; 0 at
            first.
        trust: Factor of the adversarial term from 0 to 1, on the device; small while the
            discriminator is uninformative.
    """

    def __init__(
        self, perceptual: nn.Module, weight: float, critic: Critic | None, *,
        reference: nn.Parameter, judged_from: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.perceptual = perceptual
        self.weight = weight
        self.critic = critic
        self.judged_from = judged_from
        self.adversarial = 0.0
        self._reference = (reference,)  # in a tuple: not a parameter of this module
        self.register_buffer("balance", torch.zeros((), device=reference.device))
        self.trust = torch.ones((), device=reference.device)
        self._calls = 0

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its terms, which always have the same names."""
        image = image.float()
        terms = {
            "pixel": F.l1_loss(image, target),
            "perceptual": self.weight * self.perceptual(image, target),
        }
        loss = terms["pixel"] + terms["perceptual"]
        terms["adversarial"] = torch.zeros_like(loss)
        if self.critic is not None and self.adversarial > 0:
            value = self.critic.generator_loss(image[self.judged_from :])
            self._measure(loss, value)
            terms["adversarial"] = self.adversarial * self.trust * self.balance * value
        return loss + terms["adversarial"], terms

    def _measure(self, loss: Tensor, adversarial: Tensor) -> None:
        if self._calls % REFRESH == 0:
            (reference,) = self._reference
            measured = adaptive_weight(loss, adversarial, reference)
            self.balance = self.balance.lerp(measured, 0.3) if self._calls else measured
        self._calls += 1
