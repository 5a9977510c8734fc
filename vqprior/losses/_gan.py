"""GAN objectives: losses of generator and discriminator on logits."""

import dataclasses
from typing import Protocol, final

from torch import Tensor
from torch.nn import functional as F


class GANObjective(Protocol):
    """Interface of a GAN objective: two losses on logits, which are large for real samples.

    Both methods return a float32 scalar, averaged over all logits and computed in float32.
    """

    def generator(self, fake_logits: Tensor) -> Tensor:
        """Returns the generator's loss."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Returns the discriminator's loss; the two shapes may differ."""


@final
@dataclasses.dataclass(frozen=True)
class HingeGAN:
    """Hinge GAN objective: the discriminator learns only from logits within a margin of 1.

    The generator minimizes ``-mean(fake)``, the discriminator
    ``(mean(relu(1 - real)) + mean(relu(1 + fake))) / 2``.

    Shape:
        - logits: any
        - returns: ``()``

    References:
        Lim and Ye, *Geometric GAN*, 2017, section 3; halved as in the code of VQGAN.
        <https://arxiv.org/abs/1705.02894>

    Examples:
        >>> import torch
        >>> from vqprior.losses import HingeGAN
        >>> HingeGAN().discriminator(torch.tensor([0.0, 3.0]), torch.tensor([-2.0]))
        tensor(0.2500)
    """

    def generator(self, fake_logits: Tensor) -> Tensor:
        """Returns ``-mean(fake)``."""
        return -fake_logits.float().mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Returns ``(mean(relu(1 - real)) + mean(relu(1 + fake))) / 2``."""
        real = F.relu(1 - real_logits.float()).mean()
        return 0.5 * (real + F.relu(1 + fake_logits.float()).mean())


@final
@dataclasses.dataclass(frozen=True)
class NonSaturatingGAN:
    """Non-saturating GAN objective: the generator's gradient does not vanish for poor samples.

    The generator minimizes ``mean(softplus(-fake))``, the discriminator
    ``(mean(softplus(-real)) + mean(softplus(fake))) / 2``, half the binary cross-entropy.

    Shape:
        - logits: any
        - returns: ``()``

    References:
        Goodfellow et al., *Generative Adversarial Networks*, NeurIPS 2014, equation 1, and the
        end of section 3 for the generator; halved as in the code of VQGAN.
        <https://arxiv.org/abs/1406.2661>

    Examples:
        >>> import torch
        >>> from vqprior.losses import NonSaturatingGAN
        >>> NonSaturatingGAN().generator(torch.zeros(5))
        tensor(0.6931)
    """

    def generator(self, fake_logits: Tensor) -> Tensor:
        """Returns ``mean(softplus(-fake))``."""
        return F.softplus(-fake_logits.float()).mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Returns ``(mean(softplus(-real)) + mean(softplus(fake))) / 2``."""
        real = F.softplus(-real_logits.float()).mean()
        return 0.5 * (real + F.softplus(fake_logits.float()).mean())


@final
@dataclasses.dataclass(frozen=True)
class LeastSquaresGAN:
    """Least-squares GAN objective with targets 1 for real and 0 for fake.

    The generator minimizes ``mean((fake - 1)^2) / 2``, the discriminator
    ``(mean((real - 1)^2) + mean(fake^2)) / 2``.

    Shape:
        - logits: any
        - returns: ``()``

    References:
        Mao et al., *Least Squares Generative Adversarial Networks*, ICCV 2017, equation 9.
        <https://arxiv.org/abs/1611.04076>

    Examples:
        >>> import torch
        >>> from vqprior.losses import LeastSquaresGAN
        >>> LeastSquaresGAN().discriminator(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor(2.5000)
    """

    def generator(self, fake_logits: Tensor) -> Tensor:
        """Returns ``mean((fake - 1)^2) / 2``."""
        return 0.5 * (fake_logits.float() - 1).square().mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Returns ``(mean((real - 1)^2) + mean(fake^2)) / 2``."""
        real = (real_logits.float() - 1).square().mean()
        return 0.5 * (real + fake_logits.float().square().mean())
