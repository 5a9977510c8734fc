"""Lookup-free quantization: the sign of each feature."""

from typing import final

import torch
from torch import Tensor

from vqprior.quantizers._shared._binary import BinaryQuantizer


@final
class LFQ(BinaryQuantizer):
    """Quantizes each feature to its sign, one bit per feature, without a codebook.

    The ``2**num_bits`` codes are never listed. Bit ``i`` of an index is the sign of feature
    ``i``; zero counts as negative. The batch entropy, which keeps codes in use, is computed over
    groups of bits: it is exact within a group and an upper bound over all bits. In training mode
    under ``torch.distributed``, it is that of the joint batch: the call runs a collective.

    Args:
        num_bits: Number of features and of bits, between 1 and 62.
        commitment_weight: Weight of the mean of ``(x - sg[code])^2``, at least 0.
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
        Yu et al., *Language Model Beats Diffusion: Tokenizer is Key to Visual Generation*, ICLR
        2024, section 3.1. <https://arxiv.org/abs/2310.05737>. Deviations: the batch entropy is
        computed over groups; the first feature is the lowest bit of an index.

    Examples:
        >>> import torch
        >>> from vqprior import LFQ
        >>> lfq = LFQ(num_bits=3)
        >>> out = lfq(torch.tensor([[0.5, -2.0, 0.1]]))
        >>> out.quantized, out.indices
        (tensor([[ 1., -1.,  1.]]), tensor([5]))
        >>> sorted(out.terms), LFQ(num_bits=62).bits_per_token
        (['commitment', 'entropy'], 62.0)
    """

    def __init__(
        self,
        num_bits: int,
        *,
        commitment_weight: float = 0.25,
        sample_entropy_weight: float = 0.1,
        batch_entropy_weight: float = 0.1,
        temperature: float = 0.01,
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
        """1: the features of a code are -1 and 1."""
        return 1.0

    def _prepare(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))
