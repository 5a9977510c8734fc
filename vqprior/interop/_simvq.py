"""The quantizer of SimVQ: a linear layer over a frozen codebook."""

from collections.abc import Mapping

from torch import Tensor

from vqprior.codebooks._embedding import EmbeddingCodebook
from vqprior.codebooks._transformed import TransformedCodebook
from vqprior.interop._reading import Reader, to_linear
from vqprior.quantizers._plain import VectorQuantizer


def from_simvq(
    state_dict: Mapping[str, Tensor],
    *,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    prefix: str = "",
) -> VectorQuantizer:
    """Reads the quantizer of SimVQ, as saved by the code of its authors.

    The codebook stays frozen and the linear layer learns. The default weights are those of the
    released configurations (``legacy: false``).

    Args:
        state_dict: The tensors of the checkpoint, by name.
        commitment_weight: As in ``VectorQuantizer``.
        codebook_weight: As in ``VectorQuantizer``.
        prefix: Prefix of the quantizer's keys: ``"quantize."`` in the checkpoint of a whole model.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, or a weight is
            negative.

    Shape:
        - ``embedding.weight``: ``(k, d)``
        - ``embedding_proj.weight``: ``(d, d)``, ``embedding_proj.bias``: ``(d,)``

    References:
        Zhu et al., *Addressing Representation Collapse in Vector Quantized Models with One Linear
        Layer*, ICCV 2025, section 3.2. <https://arxiv.org/abs/2411.02038>

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_simvq
        >>> state = {"embedding.weight": torch.randn(16, 4)}
        >>> state |= {"embedding_proj.weight": torch.eye(4), "embedding_proj.bias": torch.ones(4)}
        >>> torch.equal(from_simvq(state).decode(torch.tensor(3)), state["embedding.weight"][3] + 1)
        True
    """
    reader = Reader(state_dict, prefix, "VectorQuantizer of SimVQ")
    codes = reader.take("embedding.weight", None, None)
    dim = codes.shape[1]
    weight = reader.take("embedding_proj.weight", dim, dim)
    bias = reader.take("embedding_proj.bias", dim)
    reader.finish()
    return transformed(codes, weight, bias, commitment_weight, codebook_weight)


def transformed(
    codes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
) -> VectorQuantizer:
    """Returns a quantizer whose codes are a linear layer of a frozen codebook."""
    frozen = EmbeddingCodebook.from_codes(codes).requires_grad_(requires_grad=False)
    return VectorQuantizer(
        weight.shape[0],
        codes.shape[0],
        codebook=TransformedCodebook(frozen, to_linear(weight, bias)),
        commitment_weight=commitment_weight,
        codebook_weight=codebook_weight,
    )
