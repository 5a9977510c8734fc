"""The quantizer of taming-transformers."""

from collections.abc import Mapping

from torch import Tensor, nn

from vqprior._interfaces import Quantizer
from vqprior.codebooks._embedding import EmbeddingCodebook
from vqprior.codebooks._normalized import NormalizedCodebook
from vqprior.interop._reading import Reader, check_stated
from vqprior.nn import L2Norm
from vqprior.quantizers._plain import VectorQuantizer
from vqprior.quantizers._projected import ProjectedQuantizer

_METRICS = {
    "euclidean": "taming-transformers, CodeFormer, Chameleon",
    "cosine": "GLM-Image, TiTok",
    "dot": "IBQ, Emu3.5, Apertus",
}


def from_taming(
    state_dict: Mapping[str, Tensor],
    *,
    metric: str,
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.25,
    prefix: str = "",
) -> Quantizer:
    """Reads the quantizer of taming-transformers (VQGAN), or of a model with the same layout.

    Indices are the same. For feature maps, wrap the result in ``ChannelsFirst``. For CodeFormer,
    pass its ``"params_ema"`` with ``prefix="quantize."``.

    Warning:
        Other projects save tensors of the same names and shapes but search them otherwise. The
        state dict does not show it: with the wrong ``metric``, many indices are wrong.

    The default weights are those of the released code: 1 on the commitment term and 0.25 on the
    codebook term. Swap them for a model that was trained with ``legacy=False``.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        metric: ``"euclidean"`` for taming-transformers, CodeFormer and Chameleon; ``"cosine"``
            for GLM-Image and for TiTok with ``use_l2_norm``, whose codes have length 1;
            ``"dot"`` for IBQ, Emu3.5 and Apertus, which train with ``IndexBackpropagation()`` as
            ``estimator``.
        commitment_weight: As in ``VectorQuantizer``.
        codebook_weight: As in ``VectorQuantizer``.
        prefix: Prefix of the quantizer's keys: ``"quantize."`` in the checkpoint of a whole model.

    Returns:
        A ``VectorQuantizer`` in the dtype of the checkpoint, for ``metric="cosine"`` wrapped in a
        ``ProjectedQuantizer`` that normalizes the features.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, ``metric`` is unknown, or
            a weight is negative.

    Shape:
        - ``embedding.weight``: ``(k, d)``

    References:
        Esser, Rombach and Ommer, *Taming Transformers for High-Resolution Image Synthesis*,
        CVPR 2021. <https://arxiv.org/abs/2012.09841>

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_taming
        >>> model = {"quantize.embedding.weight": torch.randn(1024, 256), "other": torch.ones(1)}
        >>> vq = from_taming(model, metric="euclidean", prefix="quantize.")
        >>> vq.codebook_size, vq.dim, vq.commitment_weight, vq.codebook_weight
        (1024, 256, 1.0, 0.25)
    """
    check_stated("metric", metric, _METRICS)
    reader = Reader(state_dict, prefix, "VectorQuantizer of taming-transformers")
    codes = reader.take("embedding.weight", None, None)
    reader.finish()
    codebook = EmbeddingCodebook.from_codes(codes)
    quantizer = VectorQuantizer(
        codes.shape[1],
        codes.shape[0],
        codebook=NormalizedCodebook(codebook) if metric == "cosine" else codebook,
        metric=metric,
        commitment_weight=commitment_weight,
        codebook_weight=codebook_weight,
        unused_weight=0.0,
    )
    if metric != "cosine":
        return quantizer
    return ProjectedQuantizer(quantizer, L2Norm(), nn.Identity())
