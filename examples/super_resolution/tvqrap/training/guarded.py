"""An optimizer and a weight average that never read from the device, so they never block."""

import copy
from itertools import chain

import torch
from torch import Tensor, nn

LIMIT = 4.0  # gradients are clipped to this multiple of the running norm
MEMORY = 0.02  # update rate of the running norm


class GuardedAdam:
    """Adam that skips steps whose gradient is not finite and clips gradients with a large norm.

    Both happen on the device, through the inputs that fused Adam has for loss scaling.

    Args:
        parameters: The parameters to train.
        betas: Betas of Adam.
    """

    def __init__(self, parameters: list[nn.Parameter], betas: tuple[float, float]) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.Adam(parameters, lr=0.0, betas=betas, fused=True)
        self.usual = torch.zeros((), device=parameters[0].device)

    def step(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Updates the parameters; returns the gradient norm, and 1 if it is not finite, else 0."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).square().sum().sqrt()
        bad = (~norm.isfinite()).float()
        norm = norm.nan_to_num(0.0, 0.0, 0.0)
        usual = torch.where(self.usual > 0, self.usual, norm)
        limit = LIMIT * usual.clamp_min(1e-12)
        self.usual = usual.lerp(torch.where(bad > 0, usual, norm.minimum(limit)), MEMORY)
        self.optimizer.grad_scale = (norm / limit).clamp_min(1.0)
        self.optimizer.found_inf = bad
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, bad


class WeightAverage:
    """A moving average of a module's weights and buffers, with a shorter memory at first.

    Args:
        module: The module to average; its tensors must not be replaced.
        decay: Largest decay per step.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(requires_grad=False).eval()
        self.decay = decay
        self.count = 0
        pairs = zip(_tensors(self.module), _tensors(module), strict=True)
        floating = [(old, new) for old, new in pairs if old.is_floating_point()]
        self._old, self._new = ([pair[side] for pair in floating] for side in (0, 1))

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average."""
        self.count += 1
        kept = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self._old, self._new, 1 - kept)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
