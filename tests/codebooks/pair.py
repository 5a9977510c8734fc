"""A quantizer with two codebooks, or one used twice, for tests of rules."""

import dataclasses

import torch

from vqprior import Quantizer, VectorQuantizer


class Pair(Quantizer):
    """Quantizes two groups of features by two quantizers, or by the same one."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    dim = property(lambda self: self.first.dim + self.second.dim)
    codebook_sizes = property(lambda self: self.first.codebook_sizes + self.second.codebook_sizes)
    codebooks = property(lambda self: self.first.codebooks + self.second.codebooks)

    def forward(self, x, mask=None):
        a = self.first(x[..., : self.first.dim], mask)
        b = self.second(x[..., self.first.dim :], mask)
        return dataclasses.replace(
            a,
            quantized=torch.cat([a.quantized, b.quantized], dim=-1),
            indices=torch.stack([a.indices, b.indices], dim=-1),
            loss=a.loss + b.loss,
            selections=a.selections + b.selections,
        )

    def encode(self, x, mask=None):
        return self(x, mask).indices

    def decode(self, indices):
        halves = (self.first.decode(indices[..., 0]), self.second.decode(indices[..., 1]))
        return torch.cat(halves, dim=-1)

    def quantize_as(self, x, indices):
        raise NotImplementedError


def two_codebooks():
    return Pair(VectorQuantizer(2, 6), VectorQuantizer(3, 9))


def one_shared_codebook():
    quantizer = VectorQuantizer(2, 6)
    return Pair(quantizer, quantizer)
