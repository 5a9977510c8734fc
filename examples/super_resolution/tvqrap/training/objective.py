"""The loss on images of train_all.py: pixels, perception, and a discriminator that joins late."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvqrap.training.update import Critic
from vqprior.losses import adaptive_weight

REFRESH = 8  # steps between two measurements of the adaptive weight


class LateAdversarialObjective(nn.Module):
    """L1, a perceptual loss, and later an adversarial one.

    As ``ReconstructionAwareLoss``, but the adaptive weight is measured once in a few steps and
    smoothed: it changes slowly, and measuring takes two more backward passes through the losses
    and, where the decoder is frozen, through the decoder.

    Args:
        perceptual: ``(reconstruction, target) -> scalar``.
        weight: Its weight.
        critic: The discriminator.
        reference: The parameter at which gradients are balanced.
        judged_from: The number of the first sample that the discriminator sees; those before have
            no codes, and are left as smooth as their structure.

    Attributes:
        adversarial: Share of the adversarial gradient in that of the other terms; 0 at first.
        trust: How far the discriminator is to be believed, 0 to 1, on the device. Whatever it says,
            the adaptive weight makes its gradient long.
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
        """Returns the loss and its terms, always of the same names."""
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
