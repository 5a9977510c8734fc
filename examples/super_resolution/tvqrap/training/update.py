"""One training step of networks, codebook, weight average and discriminator.

It is split into ``compute`` and ``apply``, so that the processes can agree in between whether to
apply the gradient.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tvqrap.models.paper import to_signed
from tvqrap.training.data import Batch, Split
from tvqrap.training.ranks import Ranks, accumulating
from tvqrap.training.recipes import Recipe
from tvqrap.training.stages import Stage, Step, StepRandomness
from vqprior import QuantizerOutput
from vqprior.losses import AdversarialLoss
from vqprior.nn import PatchDiscriminator


class Critic:
    """A discriminator and its optimizer; it sees images in [0, 1], or ``signed`` in [-1, 1].

    It normalizes over the images of one process, so with an adversarial loss the number of
    processes has a small influence.
    """

    def __init__(self, ranks: Ranks, recipe: Recipe) -> None:
        self.discriminator = PatchDiscriminator(num_layers=2).to(ranks.device)
        self.parallel = ranks.parallel(self.discriminator)
        self.loss = AdversarialLoss(self.parallel)
        self.signed = recipe.signed
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=recipe.learning_rate, betas=recipe.critic_betas
        )

    def generator_loss(self, image: Tensor) -> Tensor:
        """Returns the generator's loss, with a gradient to the image only.

        The objective gets this method, not the module, so it holds no discriminator parameters.
        """
        return self.loss(self._seen(image))

    def discriminator_loss(self, image: Tensor, hr: Tensor) -> Tensor:
        """Returns the discriminator's loss for a generated and a real image."""
        return self.loss.discriminator_loss(self._seen(image.float()), self._seen(hr))

    def _seen(self, image: Tensor) -> Tensor:
        return to_signed(image) if self.signed else image


@dataclasses.dataclass
class Outcome:
    """The result of a joint batch on this process.

    Attributes:
        terms: The loss and its terms, means over the parts; detached.
        indices: Indices of each part.
        gradient_norm: Norm of the joint gradient, the same on all processes.
        is_finite: Whether the gradient and this process's loss are finite.
        quantizer_outputs: Result of each part, for rules; none where none learns.
        images: Generated and real images of each part, for the discriminator.
    """

    terms: dict[str, Tensor]
    indices: list[Tensor]
    gradient_norm: float
    is_finite: bool
    quantizer_outputs: list[QuantizerOutput]
    images: list[tuple[Tensor, Tensor]]


class Update:
    """Trains a stage on joint batches, split into any number of processes and parts.

    Args:
        stage: The stage, on the device of ``ranks``.
        recipe: The hyperparameters.
        ranks: This process.
        split: How a joint batch is divided.
        critic: The discriminator, if there is one.
        precision: ``"float32"``, or ``"bfloat16"`` for autocast; weights stay float32.
    """

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        ranks: Ranks,
        *,
        split: Split,
        critic: Critic | None = None,
        precision: str = "float32",
    ) -> None:
        self.stage = stage
        self.split = split
        self.ranks = ranks
        self.critic = critic
        self.precision = precision
        self.parallel = ranks.parallel(stage)
        self.parameters = [p for p in stage.trained.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=recipe.learning_rate, betas=recipe.betas
        )
        self.average = AveragedModel(
            stage.trained, avg_fn=moving_average(recipe.averaging), use_buffers=True
        )

    def compute(self, batches: Iterator[Batch], randomness: list[StepRandomness]) -> Outcome:
        """Computes the gradient of a joint batch.

        Args:
            batches: The parts of this process, with degraded low-resolution images; one is taken
                per item of ``randomness``.
            randomness: The randomness of each part.
        """
        self.stage.trained.train()
        self.optimizer.zero_grad(set_to_none=True)
        steps: list[Step] = []
        images = []
        for part in randomness:
            batch = next(batches)
            with self._synchronized(self.parallel, len(steps)):
                with self._autocast():
                    step = self.parallel(batch.hr, batch.lr, part)
                (step.loss / len(randomness)).backward()
            if self.critic is not None:
                images.append((step.image.detach(), batch.hr))
            steps.append(self._without_graph(step))
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters])
        terms = {
            name: torch.stack([step.terms[name] for step in steps]).mean()
            for name in steps[0].terms
        }
        return Outcome(
            terms=terms,
            indices=[step.indices for step in steps],
            gradient_norm=float(norm),
            is_finite=bool(norm.isfinite() & terms["loss"].isfinite()),
            quantizer_outputs=[
                step.quantizer_output for step in steps if step.quantizer_output is not None
            ],
            images=images,
        )

    def apply(self, outcome: Outcome) -> bool:
        """Updates the weights; returns False if the discriminator's gradient was not finite."""
        self.optimizer.step()
        self.stage.rules.step(*outcome.quantizer_outputs)
        self.average.update_parameters(self.stage.trained)
        return self.critic is None or self._teach(self.critic, outcome)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of the optimizers, which a checkpoint has replaced."""
        for part in self.state_parts().values():
            for group in part.param_groups if isinstance(part, torch.optim.Optimizer) else ():
                group["lr"] = learning_rate

    def state_parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Returns the modules and optimizers of a checkpoint, by name; for any process count."""
        parts = {
            "trained": self.stage.trained,
            "average": self.average,
            "optimizer": self.optimizer,
            "rules": self.stage.rules,
        }
        if self.critic is not None:
            parts["discriminator"] = self.critic.discriminator
            parts["critic_optimizer"] = self.critic.optimizer
        return parts

    def _teach(self, critic: Critic, outcome: Outcome) -> bool:
        critic.optimizer.zero_grad(set_to_none=True)
        losses = []
        for image, hr in outcome.images:
            with self._synchronized(critic.parallel, len(losses)):
                with self._autocast():
                    loss = critic.discriminator_loss(image, hr)
                (loss / len(outcome.images)).backward()
            losses.append(loss.detach())
        outcome.terms["discriminator"] = torch.stack(losses).mean()
        gradients = [p.grad for p in critic.discriminator.parameters()]
        if not nn.utils.get_total_norm(gradients).isfinite():
            return False
        critic.optimizer.step()
        return True

    def _synchronized(self, module: nn.Module, part: int) -> AbstractContextManager:
        """Returns a context in which only the last part averages gradients over processes."""
        return nullcontext() if part == self.split.accumulate - 1 else accumulating(module)

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, getattr(torch, self.precision))

    def _without_graph(self, step: Step) -> Step:
        """Drops everything that only the backward pass needed."""
        terms = {"loss": step.loss, **step.terms}
        out = step.quantizer_output if self.stage.rules else None
        return Step(
            step.loss.detach(),
            {name: term.detach().float() for name, term in terms.items()},
            step.indices,
            quantizer_output=None if out is None else out.detach(),
        )


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Returns an exponential moving average with a shorter memory at first."""

    def average(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        count = torch.as_tensor(count, device=old.device)
        return old.lerp(new, 1 - ((1 + count) / (10 + count)).clamp_max(decay))

    return average
