"""Models that the checks of wrapped models train, and how."""

import torch
from torch import nn

from tests.contracts.factories import state
from tests.distributed.ranks import seeded
from vqprior import (
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    ResidualQuantizer,
    SelfUpdating,
    TransformedCodebook,
    VectorQuantizer,
)
from vqprior.functional import IndexBackpropagation

# Averaging gradients over ranks rounds differently from averaging over tokens: in five steps,
# numbers of about 1 differ by a few times 2**-24 each.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Model(nn.Module):
    """An encoder, a quantizer and a decoder."""

    def __init__(self, quantizer):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = nn.Linear(5, 3), quantizer, nn.Linear(3, 5)

    def forward(self, x):
        out = self.quantizer(self.encoder(x))
        return self.decoder(out.quantized), out


def simvq():
    frozen = EmbeddingCodebook(8, 3).requires_grad_(requires_grad=False)
    return VectorQuantizer(3, 8, codebook=TransformedCodebook(frozen, nn.Linear(3, 3)))


def no_rules(quantizer):
    return []


def both_rules(quantizer):
    return [CodebookEMA(quantizer, decay=0.5), CodebookRevival(quantizer, patience=1.0)]


def self_updating():
    quantizer = VectorQuantizer(3, 8)
    return SelfUpdating(quantizer, *both_rules(quantizer))


def by_gradient(**options):
    # Each rank pulls the codes that it does not use itself: not what one process would do.
    return VectorQuantizer(3, 8, unused_weight=0.0, **options)


MODELS = {
    "gradient": (by_gradient, no_rules),
    "gradient_without_commitment": (lambda: by_gradient(commitment_weight=0.0), no_rules),
    "ema": (lambda: VectorQuantizer(3, 8), both_rules),
    "ema_without_commitment": (lambda: VectorQuantizer(3, 8, commitment_weight=0.0), both_rules),
    "self_updating": (self_updating, no_rules),
    "simvq": (simvq, no_rules),
    "simvq_without_commitment": (simvq, no_rules),
    "index_backpropagation": (
        lambda: VectorQuantizer(
            3, 8, estimator=IndexBackpropagation(), commitment_weight=0.0, codebook_weight=0.0
        ),
        no_rules,
    ),
    "residual": (lambda: ResidualQuantizer([by_gradient() for _ in range(3)]), no_rules),
    "residual_shared_ema": (lambda: ResidualQuantizer([VectorQuantizer(3, 8)] * 3), both_rules),
}


def data(world):
    """Batches with equally many tokens on every rank, so that the mean of means is the mean."""
    generator = torch.Generator().manual_seed(4)
    return [[torch.randn(8, 5, generator=generator) for _ in range(world)] for _ in range(5)]


def train(model, rules, steps, select):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for parts in steps:
        x = select(parts)
        y, out = model(x)
        optimizer.zero_grad()
        ((y - x).square().mean() + out.loss).backward()
        optimizer.step()
        for rule in rules:
            rule.step(out)


def trained_by_one_process(kind, world):
    make, rules_of = MODELS[kind]
    model = seeded(lambda: Model(make()))
    before = state(model)
    train(model, rules_of(model.quantizer), data(world), torch.cat)
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert {"encoder.weight", "decoder.weight"} < moved  # and parts of the quantizer
    return state(model)
