"""Binary spherical quantization: one sign per feature of the normalized vector."""

from typing import final

import torch
from torch import Tensor

from vqprior.functional._unit import to_unit_length
from vqprior.quantizers._shared._binary import BinaryQuantizer


@final
class BSQ(BinaryQuantizer):
    """Normalizes each vector to unit length and quantizes each feature to its sign.

    The features of a code are ``+-1 / sqrt(num_bits)``, so codes have unit length and the
    quantization error is bounded for any number of bits. The gradient of ``quantized`` with
    respect to the normalized vector is the identity. As in ``LFQ``, codes are never listed, bit
    ``i`` of an index is the sign of feature ``i``, and the batch entropy is computed over groups
    of bits and over all ranks.

    Args:
        num_bits: Number of features and of bits, between 1 and 62.
        commitment_weight: Weight of the mean of ``(u - sg[code])^2``, where ``u`` is the
            normalized vector; at least 0.
        sample_entropy_weight: Weight of the mean entropy per token, at least 0.
        batch_entropy_weight: Weight of the negative entropy of the batch, at least 0.
        temperature: Temperature of the softmax over negative squared distances, from which the
            entropies are computed; greater than 0.
        group_size: Maximum number of bits in a group, between 1 and 20. A group stores about
            ``4 * 2 ** (group_size / 2)`` numbers for each token.

    Raises:
        ValueError: If an argument is out of range.

    Shape:
        - input: ``(..., num_bits)``
        - output: ``quantized`` ``(..., num_bits)``, ``indices`` ``(...)``

    References:
        Zhao, Xiong and Krahenbuhl, *Image and Video Tokenization with Binary Spherical
        Quantization*, ICLR 2025, section 4. <https://arxiv.org/abs/2406.07548>. Deviation: the
        gradient is the identity, scaled by ``1 / sqrt(num_bits)`` in
        the authors' code.

    Examples:
        >>> import torch
        >>> from vqprior import BSQ
        >>> bsq = BSQ(num_bits=4)
        >>> out = bsq(torch.tensor([[9.0, -1.0, 3.0, 0.1]]))
        >>> out.quantized, out.indices
        (tensor([[ 0.5000, -0.5000,  0.5000,  0.5000]]), tensor([13]))
    """

    _on_sphere = True

    def __init__(
        self,
        num_bits: int,
        *,
        commitment_weight: float = 0.0,
        sample_entropy_weight: float = 0.1,
        batch_entropy_weight: float = 0.1,
        temperature: float = 1.0,
        group_size: int = 9,
    ) -> None:
        super().__init__(
            num_bits,
            commitment_weight=commitment_weight,
            sample_entropy_weight=sample_entropy_weight,
            batch_entropy_weight=batch_entropy_weight,
            temperature=temperature,
            group_size=group_size,
        )

    @property
    def scale(self) -> float:
        """``1 / sqrt(num_bits)``, so that codes have length 1."""
        return float(self.num_bits**-0.5)

    def _prepare(self, x: Tensor) -> Tensor:
        return to_unit_length(x.to(torch.promote_types(x.dtype, torch.float32)))
