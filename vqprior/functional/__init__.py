"""Stateless maths: tensors in, tensors out, no parameters and no buffers."""

from vqprior.functional._estimators import straight_through
from vqprior.functional._kmeans import kmeans
from vqprior.functional._losses import (
    code_cross_entropy,
    codebook_loss,
    commitment_loss,
    masked_mean_square,
)
from vqprior.functional._search import nearest_codes
from vqprior.functional._select import select_codes
from vqprior.functional._statistics import code_statistics

__all__ = [
    "code_cross_entropy",
    "code_statistics",
    "codebook_loss",
    "commitment_loss",
    "kmeans",
    "masked_mean_square",
    "nearest_codes",
    "select_codes",
    "straight_through",
]
