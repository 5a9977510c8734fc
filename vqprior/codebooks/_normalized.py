"""Codes of unit length."""

from typing import final

from torch import Tensor
from torch.nn import functional as F

from vqprior._interfaces import Codebook


@final
class NormalizedCodebook(Codebook):
    """Scales all codes of a codebook to length 1.

    Use it with ``metric="cosine"``. With ``nn.L2Norm`` in front of the quantizer, by
    ``ProjectedQuantizer``, unit vectors are compared with unit codes. Rules set the underlying
    codes, also to unit length.

    Args:
        codebook: The codebook whose codes are normalized.

    Shape:
        - ``codes()``: ``(k, d)``

    References:
        Yu et al., *Vector-quantized Image Modeling with Improved VQGAN*, ICLR 2022, section 3.2.
        <https://arxiv.org/abs/2110.04627>

    Examples:
        >>> from vqprior import NormalizedCodebook, EmbeddingCodebook
        >>> NormalizedCodebook(EmbeddingCodebook(4, 3)).codes().norm(dim=1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000], grad_fn=...)
    """

    def __init__(self, codebook: Codebook) -> None:
        super().__init__()
        self.codebook = codebook
        self.can_be_set = codebook.can_be_set

    @property
    def num_codes(self) -> int:
        """That of the underlying codebook."""
        return self.codebook.num_codes

    @property
    def dim(self) -> int:
        """That of the underlying codebook."""
        return self.codebook.dim

    def codes(self) -> Tensor:
        """Returns the unit codes ``(k, d)``, with a gradient to the underlying codes."""
        return F.normalize(self.codebook.codes(), dim=1)

    def set_codes_(self, codes: Tensor, where: Tensor) -> None:
        """Overwrites the underlying codes with ``codes`` at unit length."""
        self.codebook.set_codes_(F.normalize(codes, dim=1), where)
