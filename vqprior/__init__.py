"""Composable building blocks for vector-quantized priors."""

from importlib.metadata import PackageNotFoundError, version

from vqprior import functional, losses, metrics, nn
from vqprior._interfaces import Codebook, CodeSpace, Quantizer, QuantizerOutput, Rule, Selection
from vqprior.codebooks._ema import CodebookEMA
from vqprior.codebooks._initialize import initialize_
from vqprior.codebooks._revival import CodebookRevival
from vqprior.codebooks._table import Table
from vqprior.predictors._index_predictor import IndexPredictor
from vqprior.quantizers._channel_first import ChannelFirst
from vqprior.quantizers._plain import VectorQuantizer
from vqprior.quantizers._self_updating import SelfUpdating
from vqprior.quantizers._texture import TextureQuantizer

__all__ = [
    "ChannelFirst",
    "CodeSpace",
    "Codebook",
    "CodebookEMA",
    "CodebookRevival",
    "IndexPredictor",
    "Quantizer",
    "QuantizerOutput",
    "Rule",
    "Selection",
    "SelfUpdating",
    "Table",
    "TextureQuantizer",
    "VectorQuantizer",
    "functional",
    "initialize_",
    "losses",
    "metrics",
    "nn",
]

try:
    __version__ = version("vqprior")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
