"""Codes of unit length."""

from typing import final

from torch import Tensor
from torch.nn import functional as F

from vqprior._interfaces import Codebook


@final
class Normalized(Codebook):
    """Scales all codes of a codebook to length 1.

    For codes on the sphere, as with ``metric="cosine"``; put ``nn.L2Norm`` in front of the
    quantizer (``Projected``) to compare unit vectors with unit codes. Rules set the codes
    underneath, also to unit length.

    Args:
        codebook: Where the directions come from.

    Shape:
        - ``vectors()``: ``(k, d)``

    References:
        Yu et al., *Vector-quantized Image Modeling with Improved VQGAN*, ICLR 2022, section 3.2.
        <https://arxiv.org/abs/2110.04627>

    Examples:
        >>> from vqprior import Normalized, Table
        >>> Normalized(Table(4, 3)).vectors().norm(dim=1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000], grad_fn=...)
    """

    def __init__(self, codebook: Codebook) -> None:
        super().__init__()
        self.codebook = codebook

    @property
    def num_codes(self) -> int:
        """That of the codebook underneath."""
        return self.codebook.num_codes

    @property
    def dim(self) -> int:
        """That of the codebook underneath."""
        return self.codebook.dim

    def vectors(self) -> Tensor:
        """Returns the unit codes ``(k, d)``, with the gradient to what is underneath."""
        return F.normalize(self.codebook.vectors(), dim=1)

    def assign_(self, vectors: Tensor, where: Tensor) -> None:
        """Overwrites the codes underneath by ``vectors`` at unit length."""
        self.codebook.assign_(F.normalize(vectors, dim=1), where)
