"""The residual quantizer of EnCodec."""

from collections.abc import Mapping

from torch import Tensor

from vqprior.codebooks._embedding import EmbeddingCodebook
from vqprior.interop._reading import Reader, reject
from vqprior.quantizers._plain import VectorQuantizer
from vqprior.quantizers._residual import ResidualQuantizer


def from_encodec(state_dict: Mapping[str, Tensor], *, prefix: str = "") -> ResidualQuantizer:
    """Reads the residual quantizer of EnCodec or AudioCraft.

    Indices are ``(..., q)`` where the original has ``(q, b, n)``. For a lower bandwidth, set the
    indices of the last stages to -1. Statistics of the moving average are checked but not kept.
    With a ``CodebookEMA``, the loss is that of the original: the mean commitment over stages.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        prefix: Prefix of the quantizer's keys: ``"quantizer."`` in the checkpoint of a whole model.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, or a codebook was not
            initialized yet.

    Shape:
        - ``vq.layers.{i}._codebook.embed``: ``(k, d)``

    References:
        Defossez et al., *High Fidelity Neural Audio Compression*, TMLR 2023, section 3.2.
        <https://arxiv.org/abs/2210.13438>

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_encodec
        >>> stage = {"inited": torch.ones(1), "cluster_size": torch.ones(16)}
        >>> stage |= {"embed": torch.randn(16, 8), "embed_avg": torch.randn(16, 8)}
        >>> state = {f"vq.layers.{i}._codebook.{k}": v for i in range(4) for k, v in stage.items()}
        >>> rvq = from_encodec(state)
        >>> rvq.decode(torch.tensor([[0, 3, -1, -1]])).shape  # only the first two stages
        torch.Size([1, 8])
    """
    reader = Reader(state_dict, prefix, "ResidualVectorQuantizer of EnCodec")
    tables: list[Tensor] = []
    for number in range(max(reader.count("vq.layers."), 1)):
        name = f"vq.layers.{number}._codebook"
        codes = reader.take(f"{name}.embed", None, tables[0].shape[1] if tables else None)
        reader.take_any(f"{name}.embed_avg", *codes.shape)
        reader.take_any(f"{name}.cluster_size", codes.shape[0])
        if not bool(reader.take_any(f"{name}.inited", 1)):
            key = f"{prefix}{name}.inited"
            raise reject(key, "hold an initialized codebook", "0", "Run a training step first.")
        tables.append(codes)
    reader.finish()
    stages = [
        VectorQuantizer(
            codes.shape[1],
            codes.shape[0],
            codebook=EmbeddingCodebook.from_codes(codes),
            commitment_weight=1.0,
        )
        for codes in tables
    ]
    return ResidualQuantizer(stages)
