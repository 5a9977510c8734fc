"""Composable building blocks for vector-quantized priors."""

from importlib.metadata import PackageNotFoundError, version

from vqprior import functional, interop, losses, metrics, nn, testing  # noqa: F401
from vqprior._default_rules import default_rules
from vqprior._interfaces import (
    Codebook,
    GradientEstimator,
    IndexEstimator,
    Quantizer,
    QuantizerBase,
)
from vqprior._results import QuantizerOutput, Selection
from vqprior._rules import UpdateRule
from vqprior.codebooks._chained import ChainedRules
from vqprior.codebooks._ema import CodebookEMA
from vqprior.codebooks._embedding import EmbeddingCodebook
from vqprior.codebooks._initialize import initialize_codebooks_
from vqprior.codebooks._normalized import NormalizedCodebook
from vqprior.codebooks._revival import CodebookRevival
from vqprior.codebooks._transformed import TransformedCodebook
from vqprior.predictors._index_predictor import IndexPredictor
from vqprior.quantizers._bsq import BSQ
from vqprior.quantizers._channels_first import ChannelsFirst
from vqprior.quantizers._fsq import FSQ
from vqprior.quantizers._grouped import GroupedQuantizer
from vqprior.quantizers._lfq import LFQ
from vqprior.quantizers._multi_scale import MultiScaleQuantizer
from vqprior.quantizers._plain import VectorQuantizer
from vqprior.quantizers._projected import ProjectedQuantizer
from vqprior.quantizers._random_projection import RandomProjectionQuantizer
from vqprior.quantizers._require_finite import RequireFinite
from vqprior.quantizers._residual import ResidualQuantizer
from vqprior.quantizers._self_updating import SelfUpdating
from vqprior.quantizers._shared._inputs import (
    valid_tokens,
    validate_assignment,
    validate_indices,
)
from vqprior.quantizers._shared._outputs import make_output
from vqprior.quantizers._shared._wrapper import QuantizerWrapper
from vqprior.quantizers._texture import TextureQuantizer

# Without `nn`, so that `from vqprior import *` does not replace `torch.nn`.
__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "ChainedRules",
    "ChannelsFirst",
    "Codebook",
    "CodebookEMA",
    "CodebookRevival",
    "EmbeddingCodebook",
    "GradientEstimator",
    "GroupedQuantizer",
    "IndexEstimator",
    "IndexPredictor",
    "MultiScaleQuantizer",
    "NormalizedCodebook",
    "ProjectedQuantizer",
    "Quantizer",
    "QuantizerBase",
    "QuantizerOutput",
    "QuantizerWrapper",
    "RandomProjectionQuantizer",
    "RequireFinite",
    "ResidualQuantizer",
    "Selection",
    "SelfUpdating",
    "TextureQuantizer",
    "TransformedCodebook",
    "UpdateRule",
    "VectorQuantizer",
    "default_rules",
    "functional",
    "initialize_codebooks_",
    "interop",
    "losses",
    "make_output",
    "metrics",
    "testing",
    "valid_tokens",
    "validate_assignment",
    "validate_indices",
]

try:
    __version__ = version("vqprior")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
