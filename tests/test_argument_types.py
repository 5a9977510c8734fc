"""Law 9 beyond quantizers: arguments of another type, in every function that takes them."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from vqprior import (
    FSQ,
    CodebookEMA,
    CodebookRevival,
    GroupedQuantizer,
    IndexPredictor,
    MultiScaleQuantizer,
    ResidualQuantizer,
    TextureQuantizer,
    VectorQuantizer,
    default_rules,
    initialize_codebooks_,
)
from vqprior import functional as F
from vqprior.metrics import CodebookUsage

VQ, X, LINEAR = VectorQuantizer(4, 8), torch.zeros(3, 4), nn.Linear(4, 4)
RULED = VectorQuantizer(4, 8)  # rules do not keep their quantizer alive
TEXTURE, NUMPY, LIST = TextureQuantizer(VQ), np.zeros((3, 4)), [0, 1, 2]
U16 = torch.zeros(3, dtype=torch.uint16)

CASES = {
    "`quantizer` must be a QuantizerBase, got Linear. For example a `VectorQuantizer`.": [
        lambda: CodebookEMA(LINEAR),
        lambda: CodebookRevival(LINEAR),
        lambda: default_rules(LINEAR),
        lambda: initialize_codebooks_(LINEAR, X),
    ],
    "`out` must be a QuantizerOutput, got Tensor. Pass what": [
        lambda: CodebookEMA(RULED).step(X),
        lambda: CodebookRevival(VQ).step(X),
        lambda: default_rules(RULED).step(X),
        lambda: F.commitment_loss(X),
        lambda: F.codebook_loss(X),
        lambda: F.symmetric_vq_loss(X),
        lambda: F.gram_loss(X),
    ],
    "`selection` must be a Selection, got Tensor. Pass one": [lambda: F.unused_code_loss(X, X)],
    "`x` must be a tensor, got ndarray. Convert arrays": [
        lambda: F.straight_through(NUMPY, X),
        lambda: F.rotation_trick(NUMPY, X),
        lambda: F.nearest_indices(NUMPY, X),
        lambda: F.kmeans(NUMPY, 2),
        lambda: F.code_sums_and_counts(NUMPY, torch.zeros(3, dtype=torch.int64), 8),
        lambda: VQ.logits(NUMPY),
        lambda: VQ.nearest_indices(NUMPY, 1),
    ],
    "`codes` must be a tensor, got NoneType. Convert arrays": [
        lambda: F.straight_through(X, None),
        lambda: F.nearest_indices(X, None),
    ],
    "`structure` must be a tensor, got NoneType. Convert arrays": [
        lambda: TEXTURE(X, None),
        lambda: TEXTURE.decode(torch.zeros(3, dtype=torch.int64), None),
    ],
    "`indices` must be a tensor, got list. Convert arrays": [
        lambda: F.split_indices(LIST, (2, 4)),
        lambda: F.pack_indices(LIST, 8),
        lambda: F.index_bits(LIST, 8),
        lambda: F.index_cross_entropy(X, LIST),
        lambda: CodebookUsage(8).update(LIST),
    ],
    "`indices` must be a signed or 8-bit integer tensor, got torch.uint16. Convert it": [
        lambda: F.split_indices(U16, (2, 4)),
        lambda: F.pack_indices(U16, 8),
        lambda: F.index_bits(U16, 8),
        lambda: F.index_cross_entropy(X, U16),
        lambda: CodebookUsage(8).update(U16),
    ],
    "`difference` must be a tensor, got ndarray.": [lambda: F.masked_mean_square(NUMPY, X > 0)],
    "`codebook_size` must be an integer, got (8, 16, 32).": [
        lambda: IndexPredictor(8, (8, 16, 32)),
        lambda: VectorQuantizer(8, (8, 16, 32)),
        lambda: CodebookUsage((8, 16, 32)),
    ],
    "`dim` must be an integer, got 8.0.": [lambda: VectorQuantizer(8.0, 4)],
    "`top_k` must be an integer, got (2, 4).": [lambda: F.sample_indices(X, top_k=(2, 4))],
    "`top_p` must be a number, got (0.2, 0.4).": [lambda: F.sample_indices(X, top_p=(0.2, 0.4))],
    "`temperature` must be a number, got Tensor.": [lambda: F.sample_indices(X, temperature=X)],
    "`commitment_weight` must be a number, got None.": [
        lambda: VectorQuantizer(8, 4, commitment_weight=None)
    ],
    "`quantizers` must be a sequence, got int. Put it in a list.": [
        lambda: ResidualQuantizer(3),
        lambda: GroupedQuantizer(3),
    ],
    "`scales` must be a sequence, got 4. Pass sizes": [lambda: MultiScaleQuantizer(VQ, 4)],
    "`scales` must be an integer, got 1.0.": [lambda: MultiScaleQuantizer(VQ, (1.0, 2.0))],
    "`levels` must be a sequence, got Tensor. For example": [lambda: FSQ(torch.tensor([8, 5]))],
    "`levels` must be an integer, got 8.0.": [lambda: FSQ([8.0])],
}


@pytest.mark.parametrize("message", CASES)
def test_an_argument_of_another_type_is_named(message):
    for call in CASES[message]:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
            call()


def test_numbers_of_other_libraries_are_numbers():
    quantizer = VectorQuantizer(np.int64(4), np.int32(8), commitment_weight=np.float32(0.5))
    assert quantizer(X).indices.shape == (3,)
    F.sample_indices(X, temperature=torch.tensor(0.5), top_k=np.int64(2), top_p=np.float64(0.5))
