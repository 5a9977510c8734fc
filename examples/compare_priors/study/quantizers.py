"""The quantizers of the study by name, and how each codebook starts and learns."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from study.networks import DIM
from study.windows import Windows
from vqprior import (
    BSQ,
    FSQ,
    LFQ,
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    GroupedQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    Quantizer,
    ResidualQuantizer,
    TransformedCodebook,
    UpdateRule,
    VectorQuantizer,
    initialize_codebooks_,
)

WINDOW = 8  # codes along a side that a multi-scale quantizer sees at once


@dataclasses.dataclass(frozen=True)
class Choice:
    """A quantizer of maps ``(b, rows, columns, DIM)``.

    Attributes:
        make: From a number of codes to a quantizer; one whose number is fixed ignores it.
        start: Sets its codebooks from maps ``(b, rows, columns, DIM)``.
        make_rules: The rules by which its codebooks learn; without any, by gradient.
    """

    make: Callable[[int], Quantizer]
    start: Callable[[Quantizer, Tensor], None] = lambda quantizer, x: None
    make_rules: Callable[[Quantizer], list[UpdateRule]] = lambda quantizer: []


def start_codes(quantizer: Quantizer, x: Tensor) -> None:
    """K-means, from the same random choice every time."""
    initialize_codebooks_(quantizer, x, generator=torch.Generator().manual_seed(0))


def average_and_revive(quantizer: Quantizer) -> list[UpdateRule]:
    """Moving averages, and revival of codes that are not used."""
    return [CodebookEMA(quantizer), CodebookRevival(quantizer)]


def learned(make: Callable[[int], Quantizer]) -> Choice:
    """A quantizer with tables of codes: a start by k-means, moving averages and revival."""
    return Choice(make, start_codes, average_and_revive)


def simvq(codebook_size: int) -> Quantizer:
    """A frozen table behind a linear layer that starts as the identity."""
    linear = nn.Linear(DIM, DIM, bias=False)
    nn.init.eye_(linear.weight)
    table = EmbeddingCodebook(codebook_size, DIM).requires_grad_(requires_grad=False)
    return VectorQuantizer(DIM, codebook_size, codebook=TransformedCodebook(table, linear))


def start_simvq(quantizer: Quantizer, x: Tensor) -> None:
    """K-means on the table, which is what the codes are while the layer is the identity."""
    (codebook,) = quantizer.codebooks
    start_codes(VectorQuantizer(DIM, codebook.num_codes, codebook=codebook.codebook), x)


def projected(quantizer: Quantizer) -> Quantizer:
    """A quantizer of few features, between two linear layers."""
    return ProjectedQuantizer(
        quantizer, nn.Linear(DIM, quantizer.dim), nn.Linear(quantizer.dim, DIM)
    )


def stages(count: int, codebook_size: int) -> Quantizer:
    """Residual quantization."""
    return ResidualQuantizer([VectorQuantizer(DIM, codebook_size) for _ in range(count)])


def groups(count: int, codebook_size: int) -> Quantizer:
    """Grouped quantization."""
    return GroupedQuantizer([VectorQuantizer(DIM // count, codebook_size) for _ in range(count)])


def scales(codebook_size: int) -> Quantizer:
    """One codebook at the four scales of a window: 85 indices for 64 places."""
    quantizer = VectorQuantizer(DIM, codebook_size)
    return Windows(MultiScaleQuantizer(quantizer, scales=(1, 2, 4, WINDOW)), WINDOW)


# Beside "vq", all have 12 bits for each position, but "multi-scale" with 11.95.
QUANTIZERS: dict[str, Choice] = {
    "vq": learned(lambda size: VectorQuantizer(DIM, size)),
    "residual-2": learned(lambda size: stages(2, 64)),
    "residual-4": learned(lambda size: stages(4, 8)),
    "grouped-2": learned(lambda size: groups(2, 64)),
    "multi-scale": learned(lambda size: scales(512)),
    "fsq": Choice(lambda size: projected(FSQ([8, 8, 8, 8]))),
    "lfq": Choice(lambda size: projected(LFQ(12))),
    "bsq": Choice(lambda size: projected(BSQ(12))),
    "simvq": Choice(simvq, start_simvq),
}
