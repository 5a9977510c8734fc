"""The residual quantizer of the Descript Audio Codec."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from vqprior.codebooks._embedding import EmbeddingCodebook
from vqprior.interop._reading import Reader, to_linear
from vqprior.quantizers._plain import VectorQuantizer
from vqprior.quantizers._projected import ProjectedQuantizer
from vqprior.quantizers._residual import ResidualQuantizer

# The names of length and direction in the two forms of torch's weight norm.
_WEIGHT_NORM_FORMS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


def from_dac(
    state_dict: Mapping[str, Tensor], *, strides: int | Sequence[int], prefix: str = ""
) -> ResidualQuantizer:
    """Reads the residual quantizer of the Descript Audio Codec.

    Each stage searches by cosine in a projection of the features; codes are not normalized. The
    weight norm of the projections, in either form of torch, is folded into the weights; plain
    weights are read too. Indices are ``(..., q)`` where the original has ``(b, q, n)``.

    Warning:
        SNAC saves tensors of the same names and shapes, but its stages average over frames
        (``vq_strides`` of its configuration). The state dict does not show it.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        strides: Frames per index of each stage, or of all: 1 for the Descript Audio Codec. Other
            strides, which SNAC has, are not supported.
        prefix: Prefix of the quantizer's keys: ``"quantizer."`` in the checkpoint of a whole model.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, or a stride is not 1.

    Shape:
        - ``quantizers.{i}.codebook.weight``: ``(k, e)``
        - ``quantizers.{i}.in_proj.weight_v``: ``(e, d, 1)``
        - ``quantizers.{i}.out_proj.weight_v``: ``(d, e, 1)``

    References:
        Kumar et al., *High-Fidelity Audio Compression with Improved RVQGAN*, NeurIPS 2023,
        section 3.2. <https://arxiv.org/abs/2306.06546>

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_dac
        >>> state = {
        ...     "quantizers.0.codebook.weight": torch.randn(16, 2),
        ...     "quantizers.0.in_proj.weight_g": torch.ones(2, 1, 1),
        ...     "quantizers.0.in_proj.weight_v": torch.randn(2, 8, 1),
        ...     "quantizers.0.in_proj.bias": torch.zeros(2),
        ...     "quantizers.0.out_proj.weight_g": torch.ones(8, 1, 1),
        ...     "quantizers.0.out_proj.weight_v": torch.randn(8, 2, 1),
        ...     "quantizers.0.out_proj.bias": torch.zeros(8),
        ... }
        >>> from_dac(state, strides=1)(torch.randn(5, 8)).quantized.shape
        torch.Size([5, 8])
    """
    if set(strides if isinstance(strides, Sequence) else [strides]) != {1}:
        raise ValueError(
            f"`strides` must be 1 for every stage, got {strides}. Stages with strides, as those of "
            "SNAC, are not supported."
        )
    reader = Reader(state_dict, prefix, "ResidualVectorQuantize of the Descript Audio Codec")
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for number in range(max(reader.count("quantizers."), 1)):
        name = f"quantizers.{number}"
        codes = reader.take(f"{name}.codebook.weight", None, None)
        dim = parts[0][1].shape[1] if parts else None
        down = _projection(reader, f"{name}.in_proj", dim, codes.shape[1])
        up = _projection(reader, f"{name}.out_proj", codes.shape[1], down[0].shape[1])
        parts.append((codes, *down, *up))
    reader.finish()
    return ResidualQuantizer([_stage(*part, weight=len(parts)) for part in parts])


def _projection(
    reader: Reader, name: str, in_features: int | None, out_features: int
) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of a convolution of width 1, as those of a linear layer."""
    bias = reader.take(f"{name}.bias", out_features)
    for length_name, direction_name in _WEIGHT_NORM_FORMS:
        if reader.has(f"{name}.{length_name}") or reader.has(f"{name}.{direction_name}"):
            length = reader.take(f"{name}.{length_name}", out_features, 1, 1)
            direction = reader.take(f"{name}.{direction_name}", out_features, in_features, 1)
            weight = length * direction / direction.norm(dim=(1, 2), keepdim=True)
            return weight.squeeze(-1), bias
    return reader.take(f"{name}.weight", out_features, in_features, 1).squeeze(-1), bias


def _stage(
    codes: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, *, weight: float
) -> ProjectedQuantizer:
    # The original sums losses over stages; `weight` makes up for the mean.
    inner = VectorQuantizer(
        codes.shape[1],
        codes.shape[0],
        codebook=EmbeddingCodebook.from_codes(codes),
        metric="cosine",
        commitment_weight=0.25 * weight,
        codebook_weight=1.0 * weight,
        unused_weight=0.0,
    )
    return ProjectedQuantizer(inner, to_linear(down, down_bias), to_linear(up, up_bias))
