"""Codebooks in the layout of taming-transformers."""

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
    """Reads the plain quantizer of taming-transformers (VQGAN), and of what follows its layout.

    CodeFormer is one: pass its ``"params_ema"`` with ``prefix="quantize."``. Layout and indices
    are the same; for feature maps, put the result in ``ChannelsFirst``.

    The code that trained these models has its one weight, 0.25, on the codebook term, and the
    commitment term at 1: those are the defaults here. What was trained with ``legacy=False`` has
    them the other way around.

    Args:
        state_dict: What the file holds, a dictionary of tensors.
        commitment_weight: That of ``VectorQuantizer``.
        codebook_weight: That of ``VectorQuantizer``.
        prefix: What comes before the names of the quantizer: ``"quantize."`` in a whole model.

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
    )
