"""What eager calls on the CPU may do: read values, which are on the host already."""

import numpy as np
import torch
from torch import Tensor

from vqprior.functional._kernels._operators import is_traced


def is_on_host(*tensors: Tensor) -> bool:
    """Whether the values of these tensors can be read without waiting for a device."""
    return all(tensor.is_cpu for tensor in tensors) and not is_traced(*tensors)


def count_true(mask: Tensor) -> int:
    """Counts the entries that are True; ``mask`` must be on the host."""
    return int(np.count_nonzero(mask.numpy()))


def where_valid(valid: Tensor, values: Tensor, other: float) -> Tensor:
    """Returns ``values`` with ``other`` for tokens that are not valid.

    ``valid`` ``(...)`` and ``values`` ``(...)`` or ``(..., d)``. The result is ``values`` itself
    where all are known to be valid.
    """
    if is_on_host(valid, values) and valid.numpy().all():
        return values
    return torch.where(valid if values.ndim == valid.ndim else valid.unsqueeze(-1), values, other)
