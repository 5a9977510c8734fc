"""Quantizers of vector-quantize-pytorch without a codebook: FSQ and LFQ."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from vqprior._checks import check_at_least
from vqprior._interfaces import Quantizer
from vqprior.interop._reading import Layer, Reader, reject, to_linear
from vqprior.quantizers._bsq import BSQ
from vqprior.quantizers._fsq import FSQ
from vqprior.quantizers._grouped import GroupedQuantizer
from vqprior.quantizers._lfq import LFQ
from vqprior.quantizers._projected import ProjectedQuantizer


def from_vqp_fsq(
    state_dict: Mapping[str, Tensor],
    levels: Sequence[int],
    *,
    residual: bool,
    symmetric: bool = False,
    num_codebooks: int = 1,
    prefix: str = "",
) -> Quantizer:
    """Reads an ``FSQ`` of vector-quantize-pytorch.

    Returns an ``FSQ``, wrapped in ``GroupedQuantizer`` for several codebooks and in
    ``ProjectedQuantizer`` if the checkpoint has projections. The projections are its only tensors,
    so ``state_dict`` may be empty. Indices are the same.

    Warning:
        A ``ResidualFSQ``, as in X-Codec2, saves tensors of the same names and shapes, but bounds
        its features otherwise. The state dict does not show it, nor the options
        ``bound_hard_clamp`` and ``noise_dropout``, which are not supported.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        levels: Number of levels of each feature.
        residual: Whether a ``ResidualFSQ`` saved the state dict, with any number of stages. It
            must be False: those are not supported.
        symmetric: As in ``FSQ``; ``preserve_symmetry`` in that package.
        num_codebooks: Number of codebooks, at least 1.
        prefix: Prefix of the quantizer's keys in ``state_dict``.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, or an argument is out
            of range.

    Shape:
        - ``project_in.weight``: ``(num_codebooks * len(levels), d)``, or absent

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_vqp_fsq
        >>> from_vqp_fsq({}, levels=[8, 5, 5, 5], residual=False).codebook_size
        1000
        >>> state = {"project_in.weight": torch.ones(3, 16)}
        >>> state |= {"project_out.weight": torch.ones(16, 3)}
        >>> fsq = from_vqp_fsq(state, levels=[5, 5, 5], residual=False)
        >>> fsq(torch.randn(2, 16)).quantized.shape
        torch.Size([2, 16])
    """
    if residual is not False:
        raise ValueError(
            f"`residual` must be False, got {residual}. The stages of a ResidualFSQ of "
            "vector-quantize-pytorch, as in X-Codec2, are not supported."
        )
    check_at_least("num_codebooks", num_codebooks, 1)
    projections = None
    if any(key.startswith(prefix) for key in state_dict):
        reader = Reader(state_dict, prefix, "FSQ of vector-quantize-pytorch")
        projections = _projections(reader, num_codebooks * len(levels))
        reader.finish()
    return _assembled(FSQ(levels, symmetric=symmetric), num_codebooks, projections)


def from_vqp_lfq(
    state_dict: Mapping[str, Tensor],
    *,
    spherical: bool = False,
    num_codebooks: int = 1,
    prefix: str = "",
) -> Quantizer:
    """Reads an ``LFQ`` of vector-quantize-pytorch; indices are the same.

    In that package the first feature is the highest bit of an index, in ``LFQ`` the lowest, so a
    ``ProjectedQuantizer`` reverses the features before and after quantization. Loss weights are
    the defaults of that package: 0 on the commitment and 0.1 on the entropies, which are computed
    over groups of at most 9 bits.

    Warning:
        The options ``codebook_scale`` and ``soft_clamp_input_value`` are not supported. The state
        dict does not show them; nor does that of a stage of ``ResidualLFQ``, which has a scale.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        spherical: As in that package: the codes have length 1. The state dict does not show it.
        num_codebooks: Number of codebooks, at least 1.
        prefix: Prefix of the quantizer's keys in ``state_dict``.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, or ``num_codebooks`` is
            below 1.

    Shape:
        - ``mask``: ``(bits,)``
        - ``project_in.weight``: ``(num_codebooks * bits, d)``, or absent

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_vqp_lfq
        >>> lfq = from_vqp_lfq({"mask": torch.tensor([4, 2, 1])})
        >>> lfq.encode(torch.tensor([0.5, -2.0, -0.1]))
        tensor(4)
        >>> lfq.decode(torch.tensor(4))
        tensor([ 1., -1., -1.])
    """
    check_at_least("num_codebooks", num_codebooks, 1)
    reader = Reader(state_dict, prefix, "LFQ of vector-quantize-pytorch")
    mask = reader.take_any("mask", None)
    bits = len(mask)
    powers = [2**bit for bit in reversed(range(bits))]
    if mask.tolist() != powers:
        way_out = "Bits must go from the highest to the lowest."
        raise reject(f"{prefix}mask", f"hold {powers}", mask.tolist(), way_out)
    projections = _projections(reader, num_codebooks * bits)
    reader.finish()
    weight = 0.1 / num_codebooks  # terms are summed over groups here, averaged there
    inner = (BSQ if spherical else LFQ)(
        bits,
        commitment_weight=0.0,
        sample_entropy_weight=weight,
        batch_entropy_weight=weight,
        temperature=0.01,
    )
    return _assembled(ProjectedQuantizer(inner, Reversed(), Reversed()), num_codebooks, projections)


@final
class Reversed(nn.Module):
    """Reverses the order of the features."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` ``(..., d)`` with the last feature first."""
        return torch.flip(x, dims=(-1,))


def _projections(reader: Reader, inner: int) -> tuple[Layer, Layer] | None:
    if not reader.has("project_in.weight") and not reader.has("project_out.weight"):
        return None
    down = reader.linear("project_in", out_features=inner)
    return down, reader.linear("project_out", inner, down[0].shape[1])


def _assembled(
    quantizer: Quantizer, num_codebooks: int, projections: tuple[Layer, Layer] | None
) -> Quantizer:
    inner = GroupedQuantizer([quantizer] * num_codebooks) if num_codebooks > 1 else quantizer
    if projections is None:
        return inner
    down, up = projections
    return ProjectedQuantizer(inner, to_linear(*down), to_linear(*up))
