"""Binary spherical quantization: signs on the unit sphere."""

from typing import final

import torch
from torch import Tensor

from vqprior.functional._unit import to_unit_length
from vqprior.quantizers._shared._binary import BinaryQuantizer


@final
class BSQ(BinaryQuantizer):
    """Projects each vector onto the unit sphere and keeps the signs, as codes of unit length.

    Codes are ``+-1 / sqrt(num_bits)``, so the distance to the nearest code is bounded, whatever
    the number of bits. The gradient of ``quantized`` is the identity at the projected vector.
    The rest is as in ``LFQ``: codes are never listed, bit ``i`` of an index is the sign of
    feature ``i``, the batch entropy is that of groups of bits and of all ranks.

    Args:
        num_bits: Number of features and of bits, between 1 and 62.
        commitment_weight: Weight of the mean of ``(u - sg[code])^2`` with ``u`` the projected
            vector, at least 0.
        sample_entropy_weight: Weight of the mean entropy of a token, at least 0.
        batch_entropy_weight: Weight of minus the entropy of the batch, at least 0.
        temperature: Of the softmax over minus the squared distances that the entropies are taken
            of, greater than 0.
        group_size: Most bits of a group, between 1 and 20. A group stores about
            ``2 ** (group_size / 2)`` numbers for each token.

    Raises:
        ValueError: If an argument is out of range.

    Shape:
        - input: ``(..., num_bits)``
        - output: ``quantized`` ``(..., num_bits)``, ``indices`` ``(...)``

    References:
        Zhao, Xiong and Krahenbuhl, *Image and Video Tokenization with Binary Spherical
        Quantization*, ICLR 2025, section 4. <https://arxiv.org/abs/2406.07548>. Deviation: the
        gradient is the identity, where the authors' code has ``1 / sqrt(num_bits)`` of it.

    Examples:
        >>> import torch
        >>> from vqprior import BSQ
        >>> bsq = BSQ(num_bits=4)
        >>> out = bsq(torch.tensor([[9.0, -1.0, 3.0, 0.1]]))
        >>> out.quantized, out.indices
        (tensor([[ 0.5000, -0.5000,  0.5000,  0.5000]]), tensor([13]))
    """

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
        """Codes have length 1."""
        return float(self.num_bits**-0.5)

    def _prepare(self, x: Tensor) -> Tensor:
        return to_unit_length(x.to(torch.promote_types(x.dtype, torch.float32)))
