"""The rows of the study: the models, and how they are trained.

A row holds everything that its result depends on except the photos. Rows are dataclasses, compared
to find out which are finished.
"""

import dataclasses

PREDICTED = 256  # codes of the tokenizers whose codes are predicted
LONG, SHORT = 1500, 600  # steps of a code-level training, and of the phase after it
PATIENT = 3000  # steps of the phase after it, in the methods named "patient"


class Trained:
    """Base class of rows that are trained."""

    group: str  # the name without the seed
    seed: int
    needs: "tuple[Row, ...]" = ()  # rows whose weights it starts from

    @property
    def name(self) -> str:
        """The name of the row's files."""
        return f"{self.group}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class TokenizerRow(Trained):
    """A tokenizer to train."""

    prior: str  # a name in priors.PRIORS
    quantizer: str = "vq"  # a name in quantizers.QUANTIZERS
    codebook_size: int = PREDICTED
    stride: int = 32  # pixels per vector of an encoded structure along a side
    seed: int = 0  # of weights and crops
    steps: int = 3000

    @property
    def group(self) -> str:
        """The name without the seed."""
        kind = f"{self.prior}-{self.quantizer}-{self.codebook_size}"
        return f"{kind}-stride{self.stride}-steps{self.steps}"


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of the training of a predictor, with one loss.

    Targets of the cross-entropy on codes are the true ``"index"``, or the codes near it by
    ``"distance"``. ``estimator`` is one of ``select_codes``; or ``"continuous"``, whose predictor
    outputs vectors without codes, or ``"nearest"``, which takes the code nearest to the vector.
    """

    steps: int
    image: float = 0.0  # weight of the loss on the decoded image
    code: float = 0.0  # weight of the loss on codes
    targets: str = "index"
    estimator: str = "straight_through"
    temperature: float = 1.0
    learning_rate: float = 1e-4  # of Adam, falling to 0 along a cosine
    batch: int = 16
    perceptual: float = 0.2  # weight of the filter-bank loss in the loss on the image
    adversarial: float = 0.0  # weight of the adversarial loss in it
    end_to_end: bool = False  # also trains the tokenizer, on this loss and its own


# The method whose predictor is trained further, if any, and the phases.
Method = tuple[str | None, tuple[Phase, ...]]


def code_level(steps: int, **options: object) -> Phase:
    """Returns a phase on codes alone."""
    return Phase(steps, code=1.0, **({"learning_rate": 4e-4} | options))


def rap(steps: int = SHORT, **options: object) -> Phase:
    """Returns a phase on decoded images, by default with the paper's estimator."""
    return Phase(steps, image=1.0, **options)


def after_code_level(*phases: Phase) -> Method:
    """Returns a method that continues the code-level training with these phases."""
    return "code", phases


METHODS: dict[str, Method] = {
    "code-100": (None, (code_level(100),)),
    "code": (None, (code_level(LONG),)),
    "code-longer": after_code_level(code_level(SHORT, learning_rate=1e-4)),
    "code-distance": (None, (code_level(LONG, targets="distance"),)),
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
    "rap-keep-code-0.01-lr-4e-4": after_code_level(rap(code=0.01, learning_rate=4e-4)),
    "rap-keep-code-0.001": after_code_level(rap(code=0.001)),
    "rap-pixel-only": after_code_level(rap(perceptual=0.0)),
    "rap-adversarial": after_code_level(rap(adversarial=0.2)),
    "rap-distance": ("code-distance", (rap(),)),
    "code-patient": after_code_level(code_level(PATIENT, learning_rate=1e-4)),
    "rap-patient": after_code_level(rap(PATIENT)),
    "rap-patient-keep-code-0.01": after_code_level(rap(PATIENT, code=0.01)),
    "rap-patient-distance": ("code-distance", (rap(PATIENT),)),
    "rap-from-start": (None, (rap(LONG + SHORT, learning_rate=4e-4),)),
    "soft": after_code_level(rap(estimator="soft")),
    "soft-keep-code-0.01": after_code_level(rap(estimator="soft", code=0.01)),
    "soft-then-rap": after_code_level(rap(SHORT // 2, estimator="soft"), rap(SHORT // 2)),
    "gumbel": after_code_level(rap(estimator="gumbel")),
    "reinmax": after_code_level(rap(estimator="reinmax")),
    "reinmax-keep-code-0.01": after_code_level(rap(estimator="reinmax", code=0.01)),
    "end-to-end": after_code_level(rap(end_to_end=True)),
    "continuous": (None, (rap(LONG + SHORT, learning_rate=4e-4, estimator="continuous"),)),
    "nearest": (None, (rap(LONG + SHORT, learning_rate=4e-4, estimator="nearest"),)),
}


@dataclasses.dataclass(frozen=True)
class PredictorRow(Trained):
    """A predictor to train for a tokenizer."""

    tokenizer: TokenizerRow
    method: str  # a name in METHODS
    phases: tuple[Phase, ...]  # of the method, with scaled steps
    start: "PredictorRow | None" = None  # the row whose predictor it continues from

    @property
    def group(self) -> str:
        """The name without the seed: tokenizer and method."""
        return f"{self.tokenizer.group}-{self.method}"

    @property
    def seed(self) -> int:
        """The seed of the tokenizer."""
        return self.tokenizer.seed

    @property
    def needs(self) -> "tuple[Row, ...]":
        """Its tokenizer, and the predictor that it continues from."""
        return (self.tokenizer,) if self.start is None else (self.tokenizer, self.start)

    @property
    def steps_before(self) -> int:
        """Number of steps of the predictor that it continues from."""
        start = self.start
        return 0 if start is None else start.steps_before + sum(p.steps for p in start.phases)


@dataclasses.dataclass(frozen=True)
class GradientRow(Trained):
    """A predictor at which estimated gradients are compared with the exact one."""

    predictor: PredictorRow
    places: int
    sharpened: float = 1.0  # factor of its logits: a surer predictor with the same ranking
    draws: int = 32  # of a random estimator at each place

    @property
    def group(self) -> str:
        """The name without the seed: predictor and sharpening."""
        sharpened = "" if self.sharpened == 1 else f"-sharpened{self.sharpened:g}"
        return f"gradients-{self.predictor.group}{sharpened}"

    @property
    def seed(self) -> int:
        """The seed of the tokenizer."""
        return self.predictor.seed

    @property
    def needs(self) -> "tuple[Row, ...]":
        """The predictor."""
        return (self.predictor,)


@dataclasses.dataclass(frozen=True)
class BicubicRow:
    """Bicubic upscaling, which needs no training."""

    name: str = "bicubic"
    seed: int = 0
    group = "bicubic"
    needs = ()


Row = TokenizerRow | PredictorRow | GradientRow | BicubicRow


def family_of(row: Row) -> str:
    """Returns the family of a row: tokenizers, or predictors by what their loss is on."""
    if not isinstance(row, PredictorRow):
        return "tokenizers"
    last = row.phases[-1]
    if last.image == 0:
        return "codes alone"
    return "images and codes" if last.code > 0 else "images alone"
