"""Adversarial loss of a generator and its discriminator."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, final

from torch import Tensor, nn
from torch.func import functional_call

from vqprior.losses._gan import GANObjective, HingeGAN

_HINGE = HingeGAN()


@final
class AdversarialLoss(nn.Module):
    """Adversarial loss for the generator and the discriminator.

    Call it for the generator's loss. The call does not affect the discriminator: its parameters
    get no gradient, and its buffers (such as running statistics of batch normalization) do not
    change. Train it with ``discriminator_loss``, whose gradient reaches only the discriminator.

    The discriminator is a submodule; give its parameters to a separate optimizer. In distributed
    training, pass it wrapped in ``DistributedDataParallel``: ``discriminator_loss`` then averages
    gradients over ranks, and the generator's loss bypasses the wrapper.

    Args:
        discriminator: Module that maps images to logits, large for real images.
        objective: Losses of both networks, such as ``HingeGAN()``.

    Shape:
        - ``reconstruction``, ``target``: any that the discriminator accepts
        - returns: ``()``, float32

    References:
        Goodfellow et al., *Generative Adversarial Networks*, NeurIPS 2014, algorithm 1.
        <https://arxiv.org/abs/1406.2661>

    Examples:
        >>> import torch
        >>> from vqprior.losses import AdversarialLoss
        >>> from vqprior.nn import PatchDiscriminator
        >>> adversarial = AdversarialLoss(PatchDiscriminator(width=8))
        >>> fake = torch.rand(2, 3, 32, 32, requires_grad=True)
        >>> adversarial(fake).backward()
        >>> fake.grad is None, adversarial.discriminator.layers[0].weight.grad is None
        (False, True)
        >>> adversarial.discriminator_loss(fake, torch.rand(2, 3, 32, 32)).backward()
        >>> adversarial.discriminator.layers[0].weight.grad is None
        False
    """

    def __init__(self, discriminator: nn.Module, objective: GANObjective = _HINGE) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.objective = objective

    def extra_repr(self) -> str:
        """Shows the objective in ``repr``."""
        return f"objective={self.objective!r}"

    def forward(self, reconstruction: Tensor) -> Tensor:
        """Returns the generator's loss, with a gradient to ``reconstruction`` only."""
        discriminator = self.discriminator
        if isinstance(discriminator, nn.parallel.DistributedDataParallel):
            # The wrapper would overwrite the buffers with those of rank 0.
            discriminator = discriminator.module
        state = {name: p.detach() for name, p in discriminator.named_parameters()}
        state.update((name, buffer.clone()) for name, buffer in discriminator.named_buffers())
        return self.objective.generator(functional_call(discriminator, state, (reconstruction,)))

    def discriminator_loss(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Returns the discriminator's loss, with a gradient to its parameters only."""
        with self._unsynchronized():
            real_logits: Tensor = self.discriminator(target.detach())
        fake_logits: Tensor = self.discriminator(reconstruction.detach())
        return self.objective.discriminator(real_logits, fake_logits)

    def _unsynchronized(self) -> AbstractContextManager[None]:
        """Keeps the wrapper from writing buffers between two calls of one backward pass.

        After a call in ``no_sync`` the next one takes buffers as they are; as the last call it
        prepares the average of the gradients, which are those of both.
        """
        if isinstance(self.discriminator, nn.parallel.DistributedDataParallel):
            return self.discriminator.no_sync()
        return nullcontext()

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any; callers deserve the real type.

        def __call__(self, reconstruction: Tensor) -> Tensor: ...
