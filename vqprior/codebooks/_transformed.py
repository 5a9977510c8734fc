"""Codes computed by a module from other codes."""

from typing import final

from torch import Tensor, nn

from vqprior._checks import check_module, check_shape
from vqprior._interfaces import Codebook
from vqprior._precision import without_autocast


@final
class TransformedCodebook(Codebook):
    """Passes all codes of a codebook through a module, so that one step moves every code.

    With a frozen codebook and a linear module this is SimVQ. The module usually needs a learning
    rate about 10 times that of the rest of the model, in a parameter group of its own. It runs
    outside of ``torch.autocast``. Rules cannot set computed codes and leave them to their
    gradient.

    Args:
        codebook: The codes to transform; ``requires_grad_(False)`` freezes them.
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
        """That of the underlying codebook."""
        return self.codebook.num_codes

    @property
    def dim(self) -> int:
        """Number of features ``d`` that the module returns."""
        return self._dim

    def codes(self) -> Tensor:
        """Returns the transformed codes ``(k, d)``, with the gradient to module and codes."""
        codes = self.codebook.codes()
        # Codes in half precision would be other codes.
        with without_autocast(codes.device.type):
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
