"""A model made ready to upscale: precision, memory format, compilation."""

import sys

import torch
from torch import Tensor, nn

from tvqrap.cli import UsageError, is_out_of_memory

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Prepared(nn.Module):
    """A model as this program runs it, which can be used just as the model itself.

    What the network gets is in channels-last memory, which convolutions are faster with. What it
    gives is the model's up to the rounding of ``precision``; whatever is done with that afterwards
    does not concern the network, and so is not rounded.

    Args:
        model: an ``Upscaler`` in evaluation mode, on the device where it will run; its memory
            format changes, and in bfloat16 the precision of its weights.
        precision: of the network's convolutions and products: ``"float32"`` or ``"bfloat16"``.
        compiled: whether to compile the network, when it is first called and for each new shape.

    Raises:
        UsageError: on the first call, if the network is to be compiled and cannot be here.
    """

    def __init__(
        self, model: nn.Module, *, precision: str = "float32", compiled: bool = False
    ) -> None:
        super().__init__()
        self.tiling = model.tiling
        self.dtype = PRECISIONS[precision]
        model = model.to(memory_format=torch.channels_last)
        for layer in model.modules():
            # Autocast would round these at every call.
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
    """Whether torch says that what it compiles with is missing, or failed."""
    dynamo = sys.modules.get("torch._dynamo")  # which is not imported where nothing is compiled
    return dynamo is not None and isinstance(error, dynamo.exc.BackendCompilerFailed)
