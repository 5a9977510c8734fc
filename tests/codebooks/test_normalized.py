"""`NormalizedCodebook`: unit codes, and the rules that learn them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior import (
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    NormalizedCodebook,
    ProjectedQuantizer,
    VectorQuantizer,
    initialize_codebooks_,
)
from vqprior.nn import L2Norm


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def make(start, *, unit_inputs=False):
    codebook = NormalizedCodebook(EmbeddingCodebook.from_codes(start))
    inner = VectorQuantizer(start.shape[1], len(start), metric="cosine", codebook=codebook)
    return ProjectedQuantizer(inner, L2Norm(), nn.Identity()) if unit_inputs else inner


def test_codes_have_length_1_and_keep_their_direction():
    table = EmbeddingCodebook.from_codes(torch.tensor([[3.0, 4.0], [0.0, -0.5]]))
    codebook = NormalizedCodebook(table)
    assert_close(codebook.codes().detach(), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    assert (codebook.num_codes, codebook.dim) == (2, 2)
    assert list(codebook.state_dict()) == ["codebook.weight"]


def test_the_gradient_passes_the_projection():
    table, weight = EmbeddingCodebook(5, 3).double(), torch.randn(5, 3, dtype=torch.float64)
    (actual,) = torch.autograd.grad(
        (weight * NormalizedCodebook(table).codes()).sum(), table.weight
    )
    for row, wanted, got in zip(table.weight.detach(), weight, actual, strict=True):
        u = row / row.norm()
        assert_close(got, (wanted - u * (u @ wanted)) / row.norm())


def test_assigned_codes_are_of_unit_length_underneath_too():
    codebook = NormalizedCodebook(EmbeddingCodebook(3, 2))
    before = codebook.codebook.weight.detach().clone()
    where = torch.tensor([True, False, True])
    codebook.set_codes_(torch.tensor([[3.0, 4.0], [9.0, 9.0], [0.0, -7.0]]), where)
    assert_close(codebook.codebook.weight.detach()[[0, 2]], torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    exactly(codebook.codebook.weight[1], before[1])


def test_the_nearest_and_the_most_parallel_are_the_same_code():
    codebook, x = NormalizedCodebook(EmbeddingCodebook(16, 4)), torch.randn(100, 4)
    euclidean = VectorQuantizer(4, 16, codebook=codebook)
    cosine = VectorQuantizer(4, 16, codebook=codebook, metric="cosine")
    unit = F.normalize(x, dim=1)
    exactly(euclidean.encode(unit), cosine.encode(x))


class CosineTextbook:
    """Count and mass are averaged as for `CodebookEMA`; a code is the normalized mean."""

    def __init__(self, codes, decay, eps):
        self.codes = F.normalize(codes.double(), dim=1)
        self.means, self.decay, self.eps = self.codes.clone(), decay, eps
        self.counts = torch.ones(len(codes), dtype=torch.float64)

    def smooth(self):
        total = self.counts.sum()
        return (self.counts + self.eps) / (total + len(self.counts) * self.eps) * total

    def step(self, x):
        chosen = (F.normalize(x.double(), dim=1) @ self.codes.T).argmax(dim=1)
        mass = self.means * self.smooth()[:, None]
        hits = torch.stack([(chosen == j).sum() for j in range(len(self.codes))])
        sums = torch.stack([x.double()[chosen == j].sum(dim=0) for j in range(len(self.codes))])
        self.counts = self.decay * self.counts + (1 - self.decay) * hits
        mass = self.decay * mass + (1 - self.decay) * sums
        for j in hits.nonzero().flatten().tolist():  # others stay where they are
            self.means[j] = mass[j] / self.smooth()[j]
            self.codes[j] = self.means[j] / self.means[j].norm()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("unit_inputs", [False, True])
def test_the_moving_average_is_that_of_the_textbook(decay, eps, unit_inputs):
    start = torch.randn(8, 3)
    quantizer = make(start, unit_inputs=unit_inputs)
    ema = CodebookEMA(quantizer, decay=decay, eps=eps)
    textbook = CosineTextbook(start, decay, eps)
    for _ in range(12):
        x = 3 * torch.randn(60, 3)
        ema.step(quantizer(x))
        textbook.step(F.normalize(x, dim=1) if unit_inputs else x)
        # A few float32 roundings per step; cancellation in a sum magnifies relative errors.
        codes = quantizer.codebooks[0].codes().detach().double()
        assert_close(codes, textbook.codes, rtol=1e-4, atol=1e-5)
        assert_close(ema.codes_0.double(), textbook.means, rtol=1e-4, atol=1e-5)
    assert_close(ema.counts_0.double(), textbook.counts, rtol=1e-6, atol=1e-6)


def test_one_step_by_hand():
    """The mean of unit code and token; only the codebook normalizes it."""
    quantizer = make(torch.tensor([[5.0, 0.0], [0.0, -1.0]]))
    ema = CodebookEMA(quantizer, decay=0.5, eps=0.0)
    ema.step(quantizer(torch.tensor([[2.0, 3.0]])))
    assert_close(ema.codes_0, torch.tensor([[1.5, 1.5], [0.0, -1.0]]))
    half = 0.5**0.5
    assert_close(quantizer.codebook.codes().detach(), torch.tensor([[half, half], [0.0, -1.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_unchosen_rows_are_not_taken_for_rewritten(dtype):
    """Normalizing twice may change the last bit, which must not count as a rewrite."""
    start = torch.cat([torch.tensor([[1.0] + [0.0] * 6]), -1 - torch.rand(63, 7)])
    quantizer = make(start.to(dtype))
    ema = CodebookEMA(quantizer, decay=0.5)
    x = torch.tensor([[1.0] + [0.1] * 6], dtype=dtype)
    for _ in range(4):
        ema.step(quantizer(x))
    assert_close(ema.counts_0, torch.tensor([1.0] + [0.5**4] * 63))


def test_chosen_rows_are_not_taken_for_rewritten():
    quantizer = make(torch.randn(16, 5))
    ema = CodebookEMA(quantizer, decay=0.5)
    counts = torch.ones(16)
    for _ in range(6):
        out = quantizer(torch.randn(100, 5))
        ema.step(out)
        counts = (counts + out.indices.bincount(minlength=16)) / 2
    assert_close(ema.counts_0, counts)


def test_rewritten_rows_start_again():
    quantizer = make(torch.eye(3))
    ema = CodebookEMA(quantizer, decay=0.5, eps=0.0)
    for _ in range(3):
        ema.step(quantizer(torch.eye(3)[:2].repeat(4, 1)))
    where = torch.tensor([True, False, False])
    quantizer.codebook.set_codes_(torch.tensor([[0.0, 0.0, -9.0]]).expand(3, 3), where)
    ema.step(quantizer(torch.tensor([[0.0, 3.0, 0.0]])))
    exactly(quantizer.codebook.codes()[0].detach(), torch.tensor([0.0, 0.0, -1.0]))
    assert_close(ema.counts_0[0], torch.tensor(0.5))


def test_revival_moves_dead_codes_onto_directions_of_tokens():
    start = torch.cat(
        [torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[-1.0, 0.0, 0.0]]).repeat(7, 1)]
    )
    quantizer = make(start)
    revival = CodebookRevival(quantizer, patience=4.0)
    x = torch.tensor([9.0, 0.0, 0.0]) + torch.randn(64, 3)
    out = quantizer(x)
    assert (out.indices == 0).all()
    revival.step(out)
    codes, unit = quantizer.codebook.codes().detach(), F.normalize(x, dim=1)
    exactly(codes[0], start[0])
    for code in codes[1:]:
        assert (code - unit).norm(dim=1).min() < 1e-6  # normalized twice
    assert quantizer(x).indices.unique().numel() > 4


def test_revival_and_averages_bring_a_collapsed_codebook_back():
    quantizer = make(
        torch.tensor([1.0, 0.0, 0.0, 0.0]) + 0.01 * torch.randn(32, 4), unit_inputs=True
    )
    rules = [CodebookEMA(quantizer, decay=0.9), CodebookRevival(quantizer, patience=8.0)]
    used = []
    for _ in range(60):
        out = quantizer(torch.randn(256, 4) - torch.tensor([3.0, 0.0, 0.0, 0.0]))
        used.append(out.indices.unique().numel())
        for rule in rules:
            rule.step(out)
    assert used[0] < 16
    assert min(used[-5:]) > 28
    assert_close(quantizer.codebooks[0].codes().norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("method", ["sample", "kmeans"])
def test_initialization_sets_directions(method):
    quantizer, x = make(torch.randn(8, 3)), 5 + torch.randn(200, 3)
    initialize_codebooks_(quantizer, x, method=method)
    codes = quantizer.codebook.codes().detach()
    assert_close(codes.norm(dim=1), torch.ones(8))
    cosines = codes @ F.normalize(x, dim=1).T
    assert cosines.amax(dim=1).min() > 0.95
