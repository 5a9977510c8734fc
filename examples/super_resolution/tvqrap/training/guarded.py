"""What an update of weights needs on a fast device: nothing here is read back from it."""

import copy
from itertools import chain

import torch
from torch import Tensor, nn

LIMIT = 4.0  # times the usual length, beyond which a gradient is cut
MEMORY = 0.02  # how fast the usual length follows


class GuardedAdam:
    """Adam that leaves out steps whose gradient is not finite, and shortens far too long ones.

    Both are decided on the device, by what fused Adam offers to loss scaling.

    Args:
        parameters: What learns.
        betas: Of Adam.
    """

    def __init__(self, parameters: list[nn.Parameter], betas: tuple[float, float]) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.Adam(parameters, lr=0.0, betas=betas, fused=True)
        self.usual = torch.zeros((), device=parameters[0].device)

    def step(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Moves the parameters; returns the gradient's length and 1 where it is not finite."""
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
    """The moving average of a module's weights and buffers, which at first forgets faster.

    Args:
        module: What is averaged; its tensors must stay where they are.
        decay: Share that is kept in a step.
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
        """Follows the module."""
        self.count += 1
        kept = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self._old, self._new, 1 - kept)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
