"""One bit for each feature, its sign: what quantizers that keep signs compute alike."""

from typing import Protocol

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_positive
from vqprior._interfaces import QuantizerOutput
from vqprior.functional import (
    bit_entropy_loss,
    join_indices,
    masked_mean_square,
    split_indices,
    straight_through,
)
from vqprior.quantizers._shared._inputs import validate_indices
from vqprior.quantizers._shared._outputs import make_output

_MAX_BITS = 62  # so that every index is an int64
_MAX_GROUP = 20


class Binary(Protocol):
    """The options of a quantizer that keeps signs; they may change between calls."""

    training: bool
    num_bits: int
    commitment_weight: float
    sample_entropy_weight: float
    batch_entropy_weight: float
    temperature: float
    group_size: int


def check_options(quantizer: Binary) -> None:
    """Raises ``ValueError`` at an option that is out of range."""
    check_at_least("num_bits", quantizer.num_bits, 1)
    if quantizer.num_bits > _MAX_BITS:
        raise ValueError(
            f"`num_bits` must be at most {_MAX_BITS}, got {quantizer.num_bits}. For more, put "
            "several in `GroupedQuantizer`."
        )
    check_at_least("commitment_weight", quantizer.commitment_weight, 0.0)
    check_at_least("sample_entropy_weight", quantizer.sample_entropy_weight, 0.0)
    check_at_least("batch_entropy_weight", quantizer.batch_entropy_weight, 0.0)
    check_positive("temperature", quantizer.temperature)
    check_at_least("group_size", quantizer.group_size, 1)
    if quantizer.group_size > _MAX_GROUP:
        raise ValueError(
            f"`group_size` must be at most {_MAX_GROUP}, got {quantizer.group_size}. A group of "
            "`g` bits has `2**g` codes."
        )


def options_repr(quantizer: Binary) -> str:
    """The options, as ``repr`` shows them."""
    return (
        f"{quantizer.num_bits}, commitment_weight={quantizer.commitment_weight}, "
        f"sample_entropy_weight={quantizer.sample_entropy_weight}, "
        f"batch_entropy_weight={quantizer.batch_entropy_weight}, "
        f"temperature={quantizer.temperature}, group_size={quantizer.group_size}"
    )


def signs_to_index(x: Tensor) -> Tensor:
    """The index ``(...)`` of the signs of ``(..., bits)``; bit ``i`` is that of feature ``i``."""
    return join_indices((x > 0).long(), (2,) * x.shape[-1])


def index_to_signs(indices: Tensor, num_bits: int) -> Tensor:
    """The inverse, in float32: plus and minus 1, and zeros for -1."""
    validate_indices(indices, (2**num_bits,))
    bits = split_indices(indices.long(), (2,) * num_bits)
    return torch.where(bits < 0, 0, 2 * bits - 1).to(torch.float32)


def make_binary_output(
    quantizer: Binary,
    prepared: Tensor,
    codes: Tensor,
    indices: Tensor,
    *,
    valid: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> QuantizerOutput:
    """The result for features ``prepared``, of which ``codes`` have the signs times ``scale``."""
    terms = {}
    if quantizer.commitment_weight > 0:
        distance = masked_mean_square(prepared - codes, valid)
        terms["commitment"] = quantizer.commitment_weight * distance
    if quantizer.sample_entropy_weight > 0 or quantizer.batch_entropy_weight > 0:
        terms["entropy"] = bit_entropy_loss(
            # The log-odds of a bit if a code's logit is minus its squared distance.
            4 * scale / quantizer.temperature * prepared,
            mask=valid,
            sample_weight=quantizer.sample_entropy_weight,
            batch_weight=quantizer.batch_entropy_weight,
            group_size=quantizer.group_size,
            across_ranks=quantizer.training,
        )
    quantized = straight_through(prepared.to(dtype), codes.to(dtype))
    return make_output(torch.where(valid.unsqueeze(-1), quantized, 0.0), indices, terms)
