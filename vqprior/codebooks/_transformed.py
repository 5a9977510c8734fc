"""Codes that a module computes from other codes."""

from typing import final

import torch
from torch import Tensor, nn

from vqprior._checks import check_module, check_shape
from vqprior._interfaces import Codebook


@final
class TransformedCodebook(Codebook):
    """Passes all codes of a codebook through a module: one step of it moves every code.

    With a frozen table and a linear module this is SimVQ, which keeps codes in use that nothing
    has chosen yet. The module runs outside of ``torch.autocast``. Learns by gradient only: rules
    cannot set codes that are computed.

    Args:
        codebook: Where the codes come from; ``requires_grad_(False)`` freezes it.
        module: Any module ``(k, d') -> (k, d)``.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If ``module`` returns another number of codes or no matrix.

    Shape:
        - ``codes()``: ``(k, d)``

    References:
        Zhu et al., *Addressing Representation Collapse in Vector Quantized Models with One Linear
        Layer*, ICCV 2025, section 3.2. <https://arxiv.org/abs/2411.02038>

    Examples:
        >>> from torch import nn
        >>> from vqprior import EmbeddingCodebook, TransformedCodebook, VectorQuantizer
        >>> frozen = EmbeddingCodebook(512, 64).requires_grad_(False)
        >>> codebook = TransformedCodebook(frozen, nn.Linear(64, 64))
        >>> simvq = VectorQuantizer(64, 512, codebook=codebook)
        >>> simvq.codebook.codes().shape
        torch.Size([512, 64])
    """

    can_be_set = False

    def __init__(self, codebook: Codebook, module: nn.Module) -> None:
        super().__init__()
        check_module("module", module)
        self.codebook = codebook
        self.module = module
        vectors = self.codes()
        self._dim = vectors.shape[-1]
        check_shape("module(codes)", vectors, (codebook.num_codes, self._dim))

    @property
    def num_codes(self) -> int:
        """That of the codebook underneath."""
        return self.codebook.num_codes

    @property
    def dim(self) -> int:
        """Number of features ``d`` that the module returns."""
        return self._dim

    def codes(self) -> Tensor:
        """Returns the transformed codes ``(k, d)``, with the gradient to module and codes."""
        codes = self.codebook.codes()
        # Codes in half precision would be other codes.
        with torch.autocast(codes.device.type, enabled=False):
            vectors: Tensor = self.module(codes)
        return vectors

    def set_codes_(self, codes: Tensor, where: Tensor) -> None:
        """Raises: the codes are computed.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "`codebook` must hold codes that can be set, got TransformedCodebook, which computes "
            "them. Train it by gradient, without rules; start it by setting what is underneath."
        )
