"""`CodebookEMA` against a loop as in the paper, and its documented deviations."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior import (
    Codebook,
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    VectorQuantizer,
    initialize_codebooks_,
)


def make(vectors, **options):
    """A quantizer of given codes and its rule."""
    k, d = vectors.shape
    quantizer = VectorQuantizer(d, k, codebook=EmbeddingCodebook.from_codes(vectors))
    return quantizer, CodebookEMA(quantizer, **options)


class Textbook:
    """Van den Oord et al., appendix A.1, with Laplace smoothing, code by code in float64."""

    def __init__(self, codes, decay, eps):
        self.codes, self.decay, self.eps = codes.double().tolist(), decay, eps
        self.counts = [1.0 for _ in self.codes]
        self.mass = [list(code) for code in self.codes]

    def step(self, x):
        hits = [0 for _ in self.codes]
        sums = [[0.0] * len(code) for code in self.codes]
        for token in x.double().tolist():
            distances = [
                sum((t - c) ** 2 for t, c in zip(token, code, strict=True)) for code in self.codes
            ]
            nearest = distances.index(min(distances))
            hits[nearest] += 1
            sums[nearest] = [s + t for s, t in zip(sums[nearest], token, strict=True)]
        k = len(self.codes)
        self.counts = [
            self.decay * n + (1 - self.decay) * h for n, h in zip(self.counts, hits, strict=True)
        ]
        total = sum(self.counts)
        for j in range(k):
            smooth = (self.counts[j] + self.eps) / (total + k * self.eps) * total
            if hits[j]:
                self.mass[j] = [
                    self.decay * m + (1 - self.decay) * s
                    for m, s in zip(self.mass[j], sums[j], strict=True)
                ]
                self.codes[j] = [m / smooth for m in self.mass[j]]
            else:  # the documented deviation: the code and its mass stay
                self.mass[j] = [c * smooth for c in self.codes[j]]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("n", [6, 200])
def test_matches_the_textbook(decay, eps, n):
    start = torch.randn(8, 2)
    quantizer, ema = make(start, decay=decay, eps=eps)
    textbook = Textbook(start, decay, eps)
    for _ in range(12):
        x = torch.randn(n, 2)
        ema.step(quantizer(x))
        textbook.step(x)
        # A few float32 roundings per step; cancellation in a sum magnifies relative errors.
        expected = torch.tensor(textbook.codes)
        assert_close(quantizer.codebook.weight.detach(), expected, rtol=1e-4, atol=1e-5)
    assert_close(ema.counts_0, torch.tensor(textbook.counts))


def test_one_step_by_hand():
    quantizer, ema = make(torch.tensor([[0.0], [10.0]]), decay=0.75, eps=0.0)
    ema.step(quantizer(torch.tensor([[1.0], [2.0], [3.0]])))
    # count 0.75 * 1 + 0.25 * 3 = 1.5, mass 0.75 * 0 + 0.25 * 6 = 1.5; nothing chose 10.
    assert_close(quantizer.codebook.weight.detach(), torch.tensor([[1.0], [10.0]]))
    assert_close(ema.counts_0, torch.tensor([1.5, 0.75]))


def test_codes_settle_on_the_mean_of_what_chose_them():
    quantizer, ema = make(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), decay=0.9)
    left, right = torch.randn(30, 2) - 20, torch.randn(70, 2) + 20
    for _ in range(200):
        ema.step(quantizer(torch.cat([left, right])))
    expected = torch.stack([left.mean(dim=0), right.mean(dim=0)])
    # Smoothing shrinks a code by k eps / n = 2e-7 at most.
    assert_close(quantizer.codebook.weight.detach(), expected)


@pytest.mark.full
def test_codes_that_nothing_chooses_stay_for_3000_steps():
    """Their counts vanish, so dividing by them would move the codes far away."""
    start = torch.cat([torch.zeros(1, 2), 50 + torch.randn(7, 2)])
    quantizer, ema = make(start, decay=0.99)
    for _ in range(3000):
        ema.step(quantizer(torch.randn(16, 2)))
    assert_close(quantizer.codebook.weight.detach()[1:], start[1:], rtol=0, atol=0)
    assert ema.counts_0[1:].max() < 1e-12
    ema.step(quantizer(50 + torch.randn(16, 2)))  # and they learn again once chosen
    codes = quantizer.codebook.weight.detach()
    assert codes.isfinite().all()
    assert (codes[1:] - 50).abs().max() < 6


def test_rows_rewritten_from_outside_are_respected():
    quantizer, ema = make(torch.tensor([[0.0], [10.0], [20.0]]), decay=0.5, eps=0.0)
    for _ in range(5):
        ema.step(quantizer(torch.tensor([[1.0], [11.0]])))
    codes = quantizer.codebook.weight.detach().clone()
    where = torch.tensor([True, False, True])
    quantizer.codebook.set_codes_(torch.tensor([[4.0], [0.0], [30.0]]), where)
    ema.step(quantizer(torch.tensor([[5.0], [11.0]])))
    # Rewritten and chosen: count 1 again, half way to the token. Rewritten alone: as written.
    expected = torch.stack([torch.tensor([4.5]), (codes[1] + 11) / 2, torch.tensor([30.0])])
    assert_close(quantizer.codebook.weight.detach(), expected, rtol=1e-2, atol=0.0)
    assert_close(quantizer.codebook.weight.detach()[[0, 2]], expected[[0, 2]])
    assert_close(ema.counts_0[[0, 2]], torch.tensor([1.0, 0.5]))


def test_a_loaded_codebook_is_respected():
    quantizer, ema = make(torch.randn(4, 2))
    ema.step(quantizer(torch.randn(20, 2)))
    loaded = 100 + torch.randn(4, 2)
    quantizer.load_state_dict({"codebook.weight": loaded})
    ema.step(quantizer(torch.randn(0, 2)))
    assert_close(quantizer.codebook.weight.detach(), loaded, rtol=0, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_modules_keep_float32_statistics(low):
    """A step of 1 % of 1 % is below the resolution of float16 and bfloat16."""
    quantizer, ema = make(torch.full((1, 1), 64.0), decay=0.99)
    both = nn.ModuleList([quantizer, ema]).to(low)
    for _ in range(500):
        ema.step(quantizer(torch.full((1, 1), 65.0, dtype=low)))
    assert both[0].codebook.weight.dtype == low
    assert ema.codes_0.dtype == ema.counts_0.dtype == torch.float32
    assert_close(ema.codes_0, torch.full((1, 1), 65.0 - 0.99**500), rtol=1e-5, atol=0.0)


def test_double_precision_modules_are_not_taken_for_rewritten():
    start = torch.randn(4, 2, dtype=torch.float64) + 1 / 3
    quantizer, ema = make(start, decay=0.5)
    for _ in range(3):
        ema.step(quantizer(start[:1]))
    assert_close(ema.counts_0, torch.tensor([1.0, 0.125, 0.125, 0.125]))
    assert_close(quantizer.codebook.weight.detach()[1:], start[1:], rtol=0, atol=0)


def test_the_codebook_leaves_gradient_training():
    quantizer = VectorQuantizer(4, 8)
    assert "codebook" in quantizer(torch.randn(5, 4)).terms
    CodebookEMA(quantizer)
    assert not list(quantizer.parameters())
    assert list(quantizer.state_dict()) == ["codebook.weight"]
    assert sorted(quantizer(torch.randn(5, 4)).terms) == ["commitment"]


class Rebuilt(Codebook):
    """Written without rules in mind: each write makes a new parameter."""

    num_codes, dim = 8, 4

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 4))

    def codes(self):
        return self.table

    def set_codes_(self, codes, where):
        self.table = nn.Parameter(torch.where(where.unsqueeze(1), codes, self.table.detach()))


def load_parameters(codebook):
    codebook.load_state_dict({"table": nn.Parameter(torch.randn(8, 4))}, assign=True)


@pytest.mark.parametrize("change", [load_parameters, lambda codebook: None])
def test_a_codebook_that_makes_parameters_again_is_taken_over_again(change):
    quantizer = VectorQuantizer(4, 8, codebook=Rebuilt())
    ema = CodebookEMA(quantizer)
    change(quantizer.codebook)
    before = quantizer.codebook.codes().clone()
    ema.step(quantizer(torch.randn(50, 4)))
    assert not list(quantizer.parameters())
    assert (quantizer.codebook.codes() != before).any()


def write_back(quantizer, ema, out, masters):
    quantizer.codebook.weight.copy_(masters)


def two_averages(quantizer, ema, out, masters):
    masters.step(out)


@pytest.mark.parametrize("write", [write_back, two_averages])
def test_codes_that_are_always_rewritten_are_named(write):
    quantizer, ema = make(torch.randn(8, 2))
    masters = CodebookEMA(quantizer) if write is two_averages else torch.randn(8, 2)
    for _ in range(100):
        out = quantizer(torch.randn(80, 2))
        ema.step(out)
        assert ema.advice() is None or ema.restarts_0.mean() > 0.5
        write(quantizer, ema, out, masters)
    assert ema.advice() == (
        "Codebook 0: codes are rewritten between steps, so that their averages start again each "
        "time. Step one `CodebookEMA` per codebook, and keep everything else from writing to it."
    )


def test_codes_that_are_rewritten_now_and_then_are_not():
    quantizer, ema = make(torch.randn(64, 2))
    revival = CodebookRevival(quantizer, patience=2.0, threshold=0.9)  # a third moves at each end
    for step in range(100):
        x = torch.randn(100, 2)
        if step % 20 == 0:
            initialize_codebooks_(quantizer, x, method="sample")
        ema.step(out := quantizer(x))
        revival.step(out)
        assert ema.advice() is None
    assert ema.restarts_0.mean() > 0.1


def test_gradient_accumulation_is_several_steps():
    """Calls change nothing, so a result may be kept and stepped later."""
    start, x = torch.randn(6, 2), torch.randn(2, 30, 2)
    now, now_ema = make(start)
    later, later_ema = make(start)
    kept = later(x[0])
    for part in x[:1]:
        now_ema.step(now(part))
    later_ema.step(kept)
    assert_close(later.state_dict(), now.state_dict(), rtol=0, atol=0)


def test_wrong_arguments():
    quantizer = VectorQuantizer(4, 8)
    with pytest.raises(ValueError, match=r"^`decay` must be in \[0\.0, 1\.0\), got 1\.0\.$"):
        CodebookEMA(quantizer, decay=1.0)
    with pytest.raises(ValueError, match=r"^`eps` must be at least 0\.0, got -1\.0\.$"):
        CodebookEMA(quantizer, eps=-1.0)
    assert repr(CodebookEMA(quantizer)) == "CodebookEMA(decay=0.99, eps=1e-05)"
