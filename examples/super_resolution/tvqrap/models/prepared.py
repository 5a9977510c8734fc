"""Prepares a model for inference: precision, memory format, compilation."""

import sys

import torch
from torch import Tensor, nn

from tvqrap.cli import UsageError, is_out_of_memory

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Prepared(nn.Module):
    """Wraps a model for inference; it is used like the model itself.

    The network runs in channels-last memory, in which convolutions are faster. Its results equal
    the model's up to the rounding of ``precision``.

    Args:
        model: An ``Upscaler`` in evaluation mode, on its device. It is changed: its memory format
            and, for bfloat16, the precision of its weights.
        precision: Of the network's convolutions and products: ``"float32"`` or ``"bfloat16"``.
        compiled: Whether to compile the network, at the first call and for each new shape.

    Raises:
        UsageError: On the first call, if the network cannot be compiled on this machine.
    """

    def __init__(
        self, model: nn.Module, *, precision: str = "float32", compiled: bool = False
    ) -> None:
        super().__init__()
        self.tiling = model.tiling
        self.dtype = PRECISIONS[precision]
        model = model.to(memory_format=torch.channels_last)
        for layer in model.modules():
            # Otherwise autocast would round the weights at every call.
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(self.dtype)
        self.network = torch.compile(model) if compiled else model

    def forward(self, lr: Tensor) -> Tensor:
        """Maps ``(b, 3, h, w)`` to ``(b, 3, scale * h, scale * w)``."""
        lr = lr.contiguous(memory_format=torch.channels_last)
        rounds = self.dtype != torch.float32
        try:
            with torch.autocast(lr.device.type, self.dtype if rounds else None, enabled=rounds):
                return self.network(lr)
        except RuntimeError as error:
            if not _is_compilers(error) or is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"--compile: the network cannot be compiled here: {reason}") from error


def _is_compilers(error: RuntimeError) -> bool:
    """Whether the error means that torch's compiler backend is missing or failed."""
    dynamo = sys.modules.get("torch._dynamo")  # imported only if something is compiled
    return dynamo is not None and isinstance(error, dynamo.exc.BackendCompilerFailed)
