"""The multi-scale quantizer of VAR."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vqprior.codebooks._embedding import EmbeddingCodebook
from vqprior.interop._reading import Reader, check_stated
from vqprior.nn import ScaleRefinement
from vqprior.quantizers._multi_scale import MultiScaleQuantizer
from vqprior.quantizers._plain import VectorQuantizer

# Names of the convolutions: shared by neighboring scales, one per scale, one for all scales.
_FORMS = ("quant_resi.qresi_ls.", "quant_resi.")
_SHARED = "quant_resi.qresi"
_METRICS = {"euclidean": "VAR", "cosine": "`using_znorm=True`"}


def from_var(
    state_dict: Mapping[str, Tensor],
    *,
    metric: str,
    scales: Sequence[int | tuple[int, ...]] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    ratio: float = 0.5,
    prefix: str = "",
) -> MultiScaleQuantizer:
    """Reads the multi-scale quantizer of VAR, with the convolutions between its scales.

    Losses are those of the original, with a weight of 0.25 on the commitment. For feature maps,
    wrap the result in ``ChannelsFirst``.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        metric: ``"euclidean"`` for the released tokenizer; ``"cosine"`` for
            ``using_znorm=True``, the default of many projects that build on VAR. The state dict
            does not show it.
        scales: Side of each scale, smallest first; the default is that of the released
            tokenizer for 256 x 256 images.
        ratio: Weight of the convolutions, ``quant_resi`` in VAR.
        prefix: Prefix of the quantizer's keys: ``"quantize."`` in the checkpoint of a whole model.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, ``metric`` is unknown,
            or ``scales`` or ``ratio`` is out of range.

    Shape:
        - ``embedding.weight``: ``(k, d)``
        - ``ema_vocab_hit_SV``: ``(len(scales), k)``
        - ``quant_resi.qresi_ls.{i}.weight``: ``(d, d, 3, 3)``

    References:
        Tian et al., *Visual Autoregressive Modeling*, NeurIPS 2024, algorithms 1 and 2.
        <https://arxiv.org/abs/2404.02905>

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_var
        >>> state = {"embedding.weight": torch.randn(32, 4), "ema_vocab_hit_SV": torch.zeros(3, 32)}
        >>> for i in range(4):
        ...     state[f"quant_resi.qresi_ls.{i}.weight"] = torch.randn(4, 4, 3, 3)
        ...     state[f"quant_resi.qresi_ls.{i}.bias"] = torch.zeros(4)
        >>> var = from_var(state, metric="euclidean", scales=(1, 2, 4))
        >>> var.decode(torch.zeros(2, 21, dtype=torch.long)).shape
        torch.Size([2, 4, 4, 4])
    """
    check_stated("metric", metric, _METRICS)
    reader = Reader(state_dict, prefix, "VectorQuantizer2 of VAR")
    codes = reader.take("embedding.weight", None, None)
    size, dim = codes.shape
    reader.take_any("ema_vocab_hit_SV", len(scales), size)
    convolutions = _convolutions(reader, dim)
    reader.finish()
    quantizer = VectorQuantizer(
        dim,
        size,
        codebook=EmbeddingCodebook.from_codes(codes),
        metric=metric,
        commitment_weight=0.0,
        codebook_weight=0.0,
    )
    refine = _refinement(convolutions, ratio) if convolutions else None
    return MultiScaleQuantizer(
        quantizer, scales, refine=refine, commitment_weight=0.25, codebook_weight=1.0
    )


def _convolutions(reader: Reader, dim: int) -> list[tuple[Tensor, Tensor]]:
    names = [f"{before}{number}" for before in _FORMS for number in range(reader.count(before))]
    if reader.has(f"{_SHARED}.weight"):
        names.append(_SHARED)
    # With a ratio of 0 there are no convolutions.
    return [
        (reader.take(f"{name}.weight", dim, dim, 3, 3), reader.take(f"{name}.bias", dim))
        for name in names
    ]


def _refinement(convolutions: list[tuple[Tensor, Tensor]], ratio: float) -> ScaleRefinement:
    # On the meta device, so that no random numbers are drawn for weights that are replaced.
    with torch.device("meta"):
        refine = ScaleRefinement(convolutions[0][1].shape[0], len(convolutions), ratio=ratio)
    for module, (weight, bias) in zip(refine.convolutions, convolutions, strict=True):
        module.register_parameter("weight", nn.Parameter(weight.detach().clone()))
        module.register_parameter("bias", nn.Parameter(bias.detach().clone()))
    return refine
