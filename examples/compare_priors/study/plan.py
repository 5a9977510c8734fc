"""The rows of each question, and the extent of the study."""

import dataclasses
from collections.abc import Callable, Iterable

from study.table import METHODS, BicubicRow, GradientRow, PredictorRow, Row, TokenizerRow

BITS_12 = 4096  # codes of 12 bits
SHARPENED = (4.0, 16.0)  # factors of logits


@dataclasses.dataclass(frozen=True)
class Extent:
    """The extent of the study."""

    seeds: int = 3  # trainings per row
    scale: float = 1.0  # factor of all numbers of steps
    codebook_sizes: tuple[int, ...] = (64, 256, 1024, 8192)  # of the question `sizes`
    quantizers: tuple[str, ...] = (  # of the question `equal-bits`
        "vq", "residual-2", "residual-4", "grouped-2", "multi-scale", "fsq", "lfq", "bsq", "simvq",
    )  # fmt: skip
    methods: tuple[str, ...] = tuple(METHODS)  # of `prediction`, beside those they start from
    strides: tuple[int, ...] = (8, 16, 32)  # of the question `stride`
    places: int = 48  # of each row of the question `gradients`

    def tokenizer(self, prior: str, seed: int, **options: object) -> TokenizerRow:
        """Returns the row of a tokenizer, with scaled steps."""
        row = TokenizerRow(prior, seed=seed, **options)
        return dataclasses.replace(row, steps=self.steps(row.steps))

    def predictor(self, tokenizer: TokenizerRow, name: str) -> PredictorRow:
        """Returns the row of a predictor, with scaled steps."""
        start, phases = METHODS[name]
        phases = tuple(dataclasses.replace(p, steps=self.steps(p.steps)) for p in phases)
        start = None if start is None else self.predictor(tokenizer, start)
        return PredictorRow(tokenizer, name, phases, start)

    def steps(self, count: int) -> int:
        """Returns ``count`` scaled, at least 1."""
        return max(1, round(self.scale * count))


QUICK = Extent(
    seeds=1, scale=0.03, codebook_sizes=(64, 1024), quantizers=("vq", "residual-2", "fsq"),
    methods=("code", "code-longer", "rap", "soft", "reinmax", "continuous"), strides=(8, 32),
    places=6,
)  # fmt: skip


def sizes(extent: Extent, seed: int) -> list[Row]:
    """How does quality depend on the size of the codebook?"""
    alone = [extent.tokenizer(prior, seed) for prior in ("structure", "structure-lr")]
    return alone + [
        extent.tokenizer(prior, seed, codebook_size=size)
        for size in extent.codebook_sizes
        for prior in ("plain", "skip", "texture", "texture-lr")
    ]


def equal_bits(extent: Extent, seed: int) -> list[Row]:
    """How good are other quantizers, with and without structure, at 12 bits a place?"""
    return [
        extent.tokenizer(prior, seed, quantizer=quantizer, codebook_size=BITS_12)
        for quantizer in extent.quantizers
        for prior in ("plain", "texture")
    ]


def prediction(extent: Extent, seed: int) -> list[Row]:
    """When does reconstruction-aware prediction help?"""
    alone, tokenizer = (extent.tokenizer(prior, seed) for prior in ("structure-lr", "texture-lr"))
    limits = [BicubicRow(), alone, tokenizer]
    return limits + [extent.predictor(tokenizer, method) for method in extent.methods]


def gradients(extent: Extent, seed: int) -> list[Row]:
    """How close are estimated gradients to the exact one, for unsure and sure predictors?"""
    tokenizer = extent.tokenizer("texture-lr", seed)
    methods = [method for method in ("code-100", "code", "rap") if method in extent.methods]
    rows = [GradientRow(extent.predictor(tokenizer, method), extent.places) for method in methods]
    sure = [row for row in rows if row.predictor.method == "code"]
    return rows + [dataclasses.replace(row, sharpened=f) for row in sure for f in SHARPENED]


def stride(extent: Extent, seed: int) -> list[Row]:
    """How coarse should an encoded structure be, and does the plain prior do worse?"""
    tokenizers = [extent.tokenizer("texture", seed, stride=stride) for stride in extent.strides]
    tokenizers += [extent.tokenizer("plain", seed), extent.tokenizer("texture-lr", seed)]
    return [extent.predictor(one, method) for one in tokenizers for method in ("code", "rap")]


EXPERIMENTS: dict[str, Callable[[Extent, int], list[Row]]] = {
    "sizes": sizes, "equal-bits": equal_bits, "prediction": prediction, "gradients": gradients,
    "stride": stride,
}  # fmt: skip


def planned(extent: Extent, only: Iterable[str] = tuple(EXPERIMENTS)) -> list[Row]:
    """Returns the rows of some questions, each once, ordered by seed."""
    rows = (
        row
        for seed in range(extent.seeds)
        for name in only
        for row in EXPERIMENTS[name](extent, seed)
    )
    return list(dict.fromkeys(rows))
