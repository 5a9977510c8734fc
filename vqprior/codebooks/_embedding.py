"""The plain codebook: a matrix whose rows are the codes."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from vqprior import _distributed
from vqprior._checks import check_at_least, check_codes, check_positive, check_shape
from vqprior._interfaces import Codebook


def _of_unit_length(codes: Tensor) -> Tensor:
    return nn.init.normal_(codes, std=codes.shape[1] ** -0.5)


@final
class EmbeddingCodebook(Codebook):
    """A codebook whose codes are the rows of one parameter, times ``gain``.

    It learns by gradient with the user's optimizer, or by a rule such as ``CodebookEMA``.

    Args:
        num_codes: Number of codes.
        dim: Number of features of one code.
        init: Fills the ``(k, d)`` codes in place, as the functions of ``torch.nn.init`` do. The
            default draws from a normal distribution of standard deviation ``1 / sqrt(d)``, so
            that codes have a length of about 1.
        gain: Ratio of codes to ``weight``, greater than 0. Adam moves every parameter by about the
            learning rate, so codes move ``gain`` times as fast as other parameters (with plain
            SGD, ``gain ** 2`` times). A ``state_dict`` holds ``weight``: load it into a codebook
            of the same gain. Powers of 2 are exact.

    Raises:
        ValueError: If ``num_codes`` or ``dim`` is below 1, or ``gain`` is not greater than 0.

    Shape:
        - ``codes()``: ``(k, d)``

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017, section 3.1. <https://arxiv.org/abs/1711.00937>

    Examples:
        >>> import torch
        >>> from vqprior import EmbeddingCodebook
        >>> EmbeddingCodebook(512, 64).codes().shape
        torch.Size([512, 64])
        >>> EmbeddingCodebook.from_codes(torch.tensor([[0.0, 1.0], [2.0, 3.0]])).codes()
        Parameter containing:
        tensor([[0., 1.],
                [2., 3.]], requires_grad=True)
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        init: Callable[[Tensor], object] = _of_unit_length,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        check_at_least("num_codes", num_codes, 1)
        check_at_least("dim", dim, 1)
        check_positive("gain", gain)
        self.gain = gain
        self.weight = nn.Parameter(torch.empty(num_codes, dim))
        with torch.no_grad():
            init(self.weight)
            self.weight.div_(gain)

    @classmethod
    def from_codes(cls, codes: Tensor) -> Self:
        """Makes a codebook of a copy of ``codes`` ``(k, d)``, in their dtype."""
        check_codes("codes", codes)
        codebook = cls(*codes.shape, init=lambda weight: weight)  # draws nothing
        codebook.weight = nn.Parameter(codes.detach().clone())
        return codebook

    @property
    def num_codes(self) -> int:
        """Number of codes ``k``."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """Number of features ``d`` of one code."""
        return self.weight.shape[1]

    def extra_repr(self) -> str:
        """Shows the size in ``repr``."""
        gain = "" if self.gain == 1.0 else f", gain={self.gain}"
        return f"{self.num_codes}, {self.dim}{gain}"

    def codes(self) -> Tensor:
        """Returns ``gain * weight``, ``(k, d)``; the parameter itself if ``gain`` is 1."""
        return self.weight if self.gain == 1.0 else self.gain * self.weight

    def _table(self) -> tuple[Tensor, float]:
        """Returns the weight and the gain."""
        return self.weight, self.gain

    @torch.no_grad()
    def set_codes_(self, codes: Tensor, where: Tensor) -> None:
        """Overwrites with ``codes`` ``(k, d)`` where ``where`` ``(k,)`` is True.

        Raises:
            TypeError: If the parameter is sharded over ranks.
            ValueError: On a wrong shape.
        """
        _distributed.check_whole(self)
        check_shape("codes", codes, self.weight.shape)
        check_shape("where", where, self.weight.shape[:1])
        new = (codes if self.gain == 1.0 else codes / self.gain).to(self.weight.dtype)
        torch.where(where.unsqueeze(1), new, self.weight, out=self.weight)
