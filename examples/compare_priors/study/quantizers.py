"""The quantizers of the study by name, with the initialization and learning of their codebooks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqprior import (
    BSQ,
    FSQ,
    LFQ,
    EmbeddingCodebook,
    GroupedQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    Quantizer,
    ResidualQuantizer,
    TransformedCodebook,
    VectorQuantizer,
    initialize_codebooks_,
)  # fmt: skip


class Choice(NamedTuple):
    """A quantizer of maps ``(b, rows, columns, dim)``."""

    make: Callable[[int, int], Quantizer]  # from dim and codebook size, which some ignore
    start: Callable[[Quantizer, Tensor], None] = lambda quantizer, x: None  # initializes from maps
    codebook: str = "gradient"  # how it learns: see ``TokenizerStage``


def start_codes(quantizer: Quantizer, x: Tensor) -> None:
    """Initializes by k-means with a fixed seed."""
    initialize_codebooks_(quantizer, x, generator=torch.Generator().manual_seed(0))


def learned(make: Callable[[int, int], Quantizer]) -> Choice:
    """Returns a learned codebook: k-means, moving average and revival of unused codes."""
    return Choice(make, start_codes, "rules")


def projected(make: Callable[[], Quantizer]) -> Choice:
    """Returns a quantizer of few features between two linear layers."""

    def between(dim: int, size: int) -> Quantizer:
        inner = make()
        return ProjectedQuantizer(inner, nn.Linear(dim, inner.dim), nn.Linear(inner.dim, dim))

    return Choice(between)


def simvq(dim: int, codebook_size: int) -> Quantizer:
    """Returns a frozen table behind a linear layer that is initialized as the identity."""
    linear = nn.Linear(dim, dim, bias=False)
    nn.init.eye_(linear.weight)
    table = EmbeddingCodebook(codebook_size, dim).requires_grad_(requires_grad=False)
    return VectorQuantizer(dim, codebook_size, codebook=TransformedCodebook(table, linear))


def start_simvq(quantizer: Quantizer, x: Tensor) -> None:
    """Initializes the table by k-means; it equals the codes while the layer is the identity."""
    (codebook,) = quantizer.codebooks
    start_codes(VectorQuantizer(quantizer.dim, codebook.num_codes, codebook=codebook.codebook), x)


def several(dim: int, size: int, count: int) -> list[Quantizer]:
    """Returns ``count`` small quantizers."""
    return [VectorQuantizer(dim, size) for _ in range(count)]


def scales(dim: int, size: int) -> Quantizer:
    """Returns one codebook at four scales of the 8 x 8 places of a crop: 85 indices."""
    return MultiScaleQuantizer(VectorQuantizer(dim, 512), scales=(1, 2, 4, 8))


# Except "vq", which takes any size, all have 12 bits per place; "multi-scale" has 11.95.
QUANTIZERS: dict[str, Choice] = {
    "vq": learned(VectorQuantizer),
    "residual-2": learned(lambda dim, size: ResidualQuantizer(several(dim, 64, 2))),
    "residual-4": learned(lambda dim, size: ResidualQuantizer(several(dim, 8, 4))),
    "grouped-2": learned(lambda dim, size: GroupedQuantizer(several(dim // 2, 64, 2))),
    "multi-scale": learned(scales),
    "fsq": projected(lambda: FSQ([8, 8, 8, 8])),
    "lfq": projected(lambda: LFQ(12)),
    "bsq": projected(lambda: BSQ(12)),
    "simvq": Choice(simvq, start_simvq),
}
