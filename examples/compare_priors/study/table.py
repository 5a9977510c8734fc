"""The table of the study: every model that is trained, and for which question.

A row names everything that it depends on but the photos. Rows are small dataclasses, so that
whatever is finished can be told by comparing them.
"""

import dataclasses
from collections.abc import Callable

CODEBOOK_SIZES = (64, 256, 1024, 8192)
BITS_12 = 4096  # codes that 12 bits can name
STRIDES = (8, 16, 32)  # of an encoded structure
PREDICTED = 256  # codes of the tokenizers whose codes are predicted
PATIENT = 3000  # steps of the tokenizer of the question `prediction`
LONG, SHORT = 1500, 600  # steps of a code-level training, and of what follows it


class Trained:
    """What a row says of itself, from what it has in common with others and from its seed."""

    group: str
    seed: int

    @property
    def name(self) -> str:
        """Names the files of the row."""
        return f"{self.group}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class TokenizerRow(Trained):
    """A tokenizer to train.

    Attributes:
        prior: A name in ``priors.PRIORS``.
        quantizer: A name in ``quantizers.QUANTIZERS``.
        codebook_size: Number of codes.
        stride: Pixels for each vector of an encoded structure, along a side.
        seed: Starts weights and crops.
        steps: How long.
    """

    prior: str
    quantizer: str = "vq"
    codebook_size: int = PREDICTED
    stride: int = 32
    seed: int = 0
    steps: int = 1200

    @property
    def group(self) -> str:
        """What rows have in common that differ in their seed alone."""
        kind = f"{self.prior}-{self.quantizer}-{self.codebook_size}"
        return f"{kind}-stride{self.stride}-steps{self.steps}"


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some steps of the training of a predictor, with one loss.

    Attributes:
        steps: How many.
        picture: Weight of the loss on the decoded picture.
        code: Weight of the loss on codes.
        targets: Whether that one is the cross-entropy to the true ``"index"``, or to the codes
            near it by ``"distance"``.
        estimator: How the gradient passes the choice: a name of ``select_codes``, or
            ``"continuous"`` for a predictor of vectors, which chooses no code, or
            ``"nearest"`` for one that chooses the code nearest to its vector.
        temperature: Of the choice.
        learning_rate: Of Adam, falling to 0 along a cosine.
        batch: Crops in a step.
        perceptual: Weight of the filter-bank loss in the loss on the picture.
        adversarial: Weight of the adversarial loss in it.
        end_to_end: Whether the tokenizer learns, too, from the same loss and from its own.
    """

    steps: int
    picture: float = 0.0
    code: float = 0.0
    targets: str = "index"
    estimator: str = "straight_through"
    temperature: float = 1.0
    learning_rate: float = 1e-4
    batch: int = 16
    perceptual: float = 0.2
    adversarial: float = 0.0
    end_to_end: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """How a predictor is trained: from where, and through which phases."""

    start: str | None
    phases: tuple[Phase, ...]


def code_level(steps: int, **options: object) -> Phase:
    """A phase on codes alone."""
    return Phase(steps, code=1.0, **({"learning_rate": 4e-4} | options))


def rap(steps: int = SHORT, **options: object) -> Phase:
    """A phase on decoded pictures; the paper's estimator unless options say otherwise."""
    return Phase(steps, picture=1.0, **options)


def after_code_level(*phases: Phase) -> Method:
    """Phases that follow the same code-level training."""
    return Method("code", phases)


METHODS: dict[str, Method] = {
    "code-100": Method(None, (code_level(100),)),
    "code": Method(None, (code_level(LONG),)),
    "code-longer": after_code_level(code_level(SHORT, learning_rate=1e-4)),
    "code-distance": Method(None, (code_level(LONG, targets="distance"),)),
    "rap": after_code_level(rap()),
    "rap-lr-2e-5": after_code_level(rap(learning_rate=2e-5)),
    "rap-lr-4e-4": after_code_level(rap(learning_rate=4e-4)),
    "rap-batch-4": after_code_level(rap(batch=4)),
    "rap-batch-64": after_code_level(rap(batch=64)),
    "rap-temperature-0.5": after_code_level(rap(temperature=0.5)),
    "rap-temperature-2": after_code_level(rap(temperature=2.0)),
    "rap-temperature-4": after_code_level(rap(temperature=4.0)),
    "rap-keep-code-0.01": after_code_level(rap(code=0.01)),
    "rap-keep-code-0.1": after_code_level(rap(code=0.1)),
    "rap-pixel-only": after_code_level(rap(perceptual=0.0)),
    "rap-adversarial": after_code_level(rap(adversarial=0.2)),
    "rap-distance": Method("code-distance", (rap(),)),
    "rap-from-start": Method(None, (rap(LONG + SHORT, learning_rate=4e-4),)),
    "soft": after_code_level(rap(estimator="soft")),
    "soft-then-rap": after_code_level(rap(SHORT // 2, estimator="soft"), rap(SHORT // 2)),
    "gumbel": after_code_level(rap(estimator="gumbel")),
    "reinmax": after_code_level(rap(estimator="reinmax")),
    "end-to-end": after_code_level(rap(end_to_end=True)),
    "continuous": Method(None, (rap(LONG + SHORT, learning_rate=4e-4, estimator="continuous"),)),
    "nearest": Method(None, (rap(LONG + SHORT, learning_rate=4e-4, estimator="nearest"),)),
}


@dataclasses.dataclass(frozen=True)
class PredictorRow(Trained):
    """A predictor to train for a tokenizer.

    Attributes:
        tokenizer: What gives the codes.
        method: A name in ``METHODS``.
        phases: Its phases, as long as they are here.
        start: The row whose predictor it starts from.
    """

    tokenizer: TokenizerRow
    method: str
    phases: tuple[Phase, ...]
    start: "PredictorRow | None" = None

    @property
    def group(self) -> str:
        """What rows have in common that differ in their seed alone."""
        return f"{self.tokenizer.group}-{self.method}"

    @property
    def seed(self) -> int:
        """That of the tokenizer."""
        return self.tokenizer.seed


@dataclasses.dataclass(frozen=True)
class GradientRow(Trained):
    """A predictor at which estimated gradients are compared with the exact one.

    Attributes:
        predictor: The predictor.
        places: At how many places.
        draws: How often a random estimate is drawn at each.
    """

    predictor: PredictorRow
    places: int
    draws: int = 32

    @property
    def group(self) -> str:
        """What rows have in common that differ in their seed alone."""
        return f"gradients-{self.predictor.group}"

    @property
    def seed(self) -> int:
        """That of the tokenizer."""
        return self.predictor.seed


@dataclasses.dataclass(frozen=True)
class BicubicRow:
    """Bicubic enlargement, which nothing is trained for."""

    name: str = "bicubic"
    seed: int = 0

    @property
    def group(self) -> str:
        """Its name."""
        return self.name


Row = TokenizerRow | PredictorRow | GradientRow | BicubicRow


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much of the study there is.

    Attributes:
        seeds: How often each row is trained.
        scale: Factor of all numbers of steps.
        codebook_sizes: Of the question ``sizes``.
        quantizers: Of the question ``equal-bits``.
        methods: Of the question ``prediction``, beside those that they start from.
        strides: Of the question ``stride``.
        places: Of each row of the question ``gradients``.
    """

    seeds: int = 3
    scale: float = 1.0
    codebook_sizes: tuple[int, ...] = CODEBOOK_SIZES
    quantizers: tuple[str, ...] = (
        "vq", "residual-2", "residual-4", "grouped-2", "multi-scale", "fsq", "lfq", "bsq", "simvq",
    )  # fmt: skip
    methods: tuple[str, ...] = tuple(METHODS)
    strides: tuple[int, ...] = STRIDES
    places: int = 48

    def tokenizer(self, prior: str, seed: int, **options: object) -> TokenizerRow:
        """A tokenizer, trained for its share of the steps."""
        row = TokenizerRow(prior, seed=seed, **options)
        return dataclasses.replace(row, steps=self.steps(row.steps))

    def predictor(self, tokenizer: TokenizerRow, name: str) -> PredictorRow:
        """A predictor, trained for its share of the steps."""
        method = METHODS[name]
        phases = tuple(
            dataclasses.replace(phase, steps=self.steps(phase.steps)) for phase in method.phases
        )
        start = None if method.start is None else self.predictor(tokenizer, method.start)
        return PredictorRow(tokenizer, name, phases, start)

    def steps(self, count: int) -> int:
        """At least one."""
        return max(1, round(self.scale * count))


QUICK = Extent(
    seeds=1,
    scale=0.15,
    codebook_sizes=(64, 1024),
    quantizers=("vq", "residual-2", "fsq"),
    methods=("code", "code-longer", "rap", "soft", "reinmax", "continuous"),
    strides=(8, 32),
    places=6,
)


def sizes(extent: Extent, seed: int) -> list[Row]:
    """How good is a codebook of how many codes?"""
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
    alone, tokenizer = (
        extent.tokenizer(prior, seed, steps=PATIENT) for prior in ("structure-lr", "texture-lr")
    )
    limits = [BicubicRow(), alone, tokenizer]
    return limits + [extent.predictor(tokenizer, method) for method in extent.methods]


def gradients(extent: Extent, seed: int) -> list[Row]:
    """How near are estimated gradients to the exact one, at unsure and at sure predictors?"""
    tokenizer = extent.tokenizer("texture-lr", seed, steps=PATIENT)
    methods = [method for method in ("code-100", "code", "rap") if method in extent.methods]
    return [GradientRow(extent.predictor(tokenizer, method), extent.places) for method in methods]


def stride(extent: Extent, seed: int) -> list[Row]:
    """How coarse should an encoded structure be, and does the plain prior do worse?"""
    tokenizers = [extent.tokenizer("texture", seed, stride=stride) for stride in extent.strides]
    tokenizers += [extent.tokenizer("plain", seed), extent.tokenizer("texture-lr", seed)]
    return [
        extent.predictor(tokenizer, method)
        for tokenizer in tokenizers
        for method in ("code", "rap")
    ]


EXPERIMENTS: dict[str, Callable[[Extent, int], list[Row]]] = {
    "sizes": sizes,
    "equal-bits": equal_bits,
    "prediction": prediction,
    "gradients": gradients,
    "stride": stride,
}


def rows_of(experiment: str, extent: Extent) -> list[Row]:
    """Returns the rows of a question, one seed after the other."""
    make = EXPERIMENTS[experiment]
    return [row for seed in range(extent.seeds) for row in make(extent, seed)]
