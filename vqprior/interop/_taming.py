"""The quantizer of taming-transformers."""

from collections.abc import Mapping

from torch import Tensor

from vqprior.codebooks._embedding import EmbeddingCodebook
from vqprior.interop._reading import Reader
from vqprior.quantizers._plain import VectorQuantizer


def from_taming(
    state_dict: Mapping[str, Tensor],
    *,
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.25,
    prefix: str = "",
) -> VectorQuantizer:
    """Reads the quantizer of taming-transformers (VQGAN), or of a model with the same layout.

    For CodeFormer, pass its ``"params_ema"`` with ``prefix="quantize."``. Indices are the same.
    For feature maps, wrap the result in ``ChannelsFirst``.

    The default weights are those of the released code: 1 on the commitment term and 0.25 on the
    codebook term. Swap them for a model that was trained with ``legacy=False``.

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

    References:
        Esser, Rombach and Ommer, *Taming Transformers for High-Resolution Image Synthesis*,
        CVPR 2021. <https://arxiv.org/abs/2012.09841>

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_taming
        >>> model = {"quantize.embedding.weight": torch.randn(1024, 256), "other": torch.ones(1)}
        >>> vq = from_taming(model, prefix="quantize.")
        >>> vq.codebook_size, vq.dim, vq.commitment_weight, vq.codebook_weight
        (1024, 256, 1.0, 0.25)
    """
    reader = Reader(state_dict, prefix, "VectorQuantizer of taming-transformers")
    codes = reader.take("embedding.weight", None, None)
    reader.finish()
    return VectorQuantizer(
        codes.shape[1],
        codes.shape[0],
        codebook=EmbeddingCodebook.from_codes(codes),
        commitment_weight=commitment_weight,
        codebook_weight=codebook_weight,
        unused_weight=0.0,
    )
