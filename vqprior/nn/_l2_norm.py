"""L2 normalization as a module."""

from typing import final

from torch import Tensor, nn

from vqprior.functional._unit import to_unit_length


@final
class L2Norm(nn.Module):
    """Scales each vector to length 1; zero stays zero, with a gradient of zero.

    Shape:
        - input, output: ``(..., d)``

    Examples:
        >>> import torch
        >>> from vqprior.nn import L2Norm
        >>> L2Norm()(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Returns unit vectors ``(..., d)``."""
        return to_unit_length(x)
