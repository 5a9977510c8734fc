"""What all wrappers of one quantizer share."""

from vqprior._interfaces import Codebook, CodeSpace, Quantizer
from vqprior._tokens import check_quantizer


class Wrapper(CodeSpace):
    """What all wrappers share: sizes and codebooks are those of the wrapped quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        check_quantizer("quantizer", quantizer)
        self.quantizer = quantizer

    @property
    def dim(self) -> int:
        """That of the wrapped quantizer."""
        return self.quantizer.dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Those of the wrapped quantizer."""
        return self.quantizer.codebook_sizes

    @property
    def bits_per_token(self) -> float:
        """That of the wrapped quantizer."""
        return self.quantizer.bits_per_token

    @property
    def tokenwise(self) -> bool:
        """That of the wrapped quantizer."""
        return self.quantizer.tokenwise

    @property
    def features_last(self) -> bool:
        """That of the wrapped quantizer."""
        return self.quantizer.features_last

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Those of the wrapped quantizer."""
        return self.quantizer.codebooks
