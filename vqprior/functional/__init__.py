"""Stateless functions: search, gradient estimators, losses and index arithmetic."""

from vqprior.functional._bit_entropy import bit_entropy_loss
from vqprior.functional._cross_entropy import distance_cross_entropy, index_cross_entropy
from vqprior.functional._entropy import entropy_loss, kl_to_uniform
from vqprior.functional._estimators import rotation_trick, straight_through
from vqprior.functional._gram import gram_loss, orthogonality_loss
from vqprior.functional._index_algebra import join_indices, split_indices
from vqprior.functional._index_backpropagation import IndexBackpropagation
from vqprior.functional._kmeans import kmeans
from vqprior.functional._losses import (
    codebook_loss,
    commitment_loss,
    masked_mean_square,
    symmetric_vq_loss,
)
from vqprior.functional._packing import index_bits, pack_indices, unpack_indices
from vqprior.functional._sampling import sample_indices
from vqprior.functional._search import nearest_indices
from vqprior.functional._select import select_codes
from vqprior.functional._statistics import code_sums_and_counts
from vqprior.functional._unused import unused_code_loss

__all__ = [
    "IndexBackpropagation",
    "bit_entropy_loss",
    "code_sums_and_counts",
    "codebook_loss",
    "commitment_loss",
    "distance_cross_entropy",
    "entropy_loss",
    "gram_loss",
    "index_bits",
    "index_cross_entropy",
    "join_indices",
    "kl_to_uniform",
    "kmeans",
    "masked_mean_square",
    "nearest_indices",
    "orthogonality_loss",
    "pack_indices",
    "rotation_trick",
    "sample_indices",
    "select_codes",
    "split_indices",
    "straight_through",
    "symmetric_vq_loss",
    "unpack_indices",
    "unused_code_loss",
]
