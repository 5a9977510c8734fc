"""Composable building blocks for vector-quantized priors."""

from importlib.metadata import PackageNotFoundError, version

from vqprior import functional, interop, losses, metrics, nn
from vqprior._interfaces import (
    Codebook,
    CodeSpace,
    IndexEstimator,
    Quantizer,
    QuantizerOutput,
    Rule,
    Selection,
)
from vqprior.codebooks._ema import CodebookEMA
from vqprior.codebooks._initialize import initialize_
from vqprior.codebooks._normalized import Normalized
from vqprior.codebooks._revival import CodebookRevival
from vqprior.codebooks._table import Table
from vqprior.codebooks._transformed import Transformed
from vqprior.predictors._index_predictor import IndexPredictor
from vqprior.quantizers._bsq import BSQ
from vqprior.quantizers._channel_first import ChannelFirst
from vqprior.quantizers._fsq import FSQ
from vqprior.quantizers._grouped import Grouped
from vqprior.quantizers._lfq import LFQ
from vqprior.quantizers._multi_scale import MultiScale
from vqprior.quantizers._plain import VectorQuantizer
from vqprior.quantizers._projected import Projected
from vqprior.quantizers._random_projection import RandomProjectionQuantizer
from vqprior.quantizers._require_finite import RequireFinite
from vqprior.quantizers._residual import Residual
from vqprior.quantizers._self_updating import SelfUpdating
from vqprior.quantizers._texture import TextureQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "ChannelFirst",
    "CodeSpace",
    "Codebook",
    "CodebookEMA",
    "CodebookRevival",
    "Grouped",
    "IndexEstimator",
    "IndexPredictor",
    "MultiScale",
    "Normalized",
    "Projected",
    "Quantizer",
    "QuantizerOutput",
    "RandomProjectionQuantizer",
    "RequireFinite",
    "Residual",
    "Rule",
    "Selection",
    "SelfUpdating",
    "Table",
    "TextureQuantizer",
    "Transformed",
    "VectorQuantizer",
    "functional",
    "initialize_",
    "interop",
    "losses",
    "metrics",
    "nn",
]

try:
    __version__ = version("vqprior")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
