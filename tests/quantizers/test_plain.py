"""`VectorQuantizer`: nearest codes, weighted terms, logits."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior import EmbeddingCodebook, IndexEstimator, VectorQuantizer
from vqprior.functional import (
    IndexBackpropagation,
    codebook_loss,
    commitment_loss,
    unused_code_loss,
)


def made_of(rows, **options):
    table = EmbeddingCodebook.from_codes(torch.tensor(rows))
    return VectorQuantizer(table.dim, table.num_codes, codebook=table, **options)


def test_replaces_each_vector_by_its_nearest_code():
    quantizer = made_of([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
    out = quantizer(torch.tensor([[0.9, 0.8], [3.0, 0.1], [-5.0, 0.0]]))
    assert out.indices.tolist() == [1, 2, 0]
    assert_close(out.quantized, torch.tensor([[1.0, 1.0], [4.0, 0.0], [0.0, 0.0]]))


def test_each_metric_has_its_own_nearest_code():
    """For the token (2, 0): nearest, most parallel, and largest product differ."""
    rows = [[2.0, 1.0], [0.1, 0.0], [9.0, 8.0]]
    for metric, index in [("euclidean", 0), ("cosine", 1), ("dot", 2)]:
        out = made_of(rows, metric=metric)(torch.tensor([[2.0, 0.0]]))
        assert out.indices.tolist() == [index]
        assert_close(out.quantized, torch.tensor([rows[index]]))  # the code as it is


def test_terms_are_the_weighted_losses():
    quantizer = VectorQuantizer(4, 16, commitment_weight=2.0, codebook_weight=0.5)
    out = quantizer(torch.randn(30, 4))
    assert_close(out.terms["commitment"], 2.0 * commitment_loss(out), rtol=0, atol=0)
    assert_close(out.terms["codebook"], 0.5 * codebook_loss(out), rtol=0, atol=0)
    unused = unused_code_loss(out.selections[0], quantizer.codebook.codes())
    assert_close(out.terms["unused"], 0.01 * 0.5 * unused, rtol=0, atol=0)
    assert_close(out.loss, sum(out.terms.values()), rtol=0, atol=0)


def test_default_weights_are_those_of_the_paper():
    out = VectorQuantizer(4, 16)(torch.randn(30, 4))
    assert_close(out.terms["codebook"], 4 * out.terms["commitment"])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"commitment_weight": 0.0}, ["codebook", "unused"]),
        ({"unused_weight": 0.0}, ["codebook", "commitment"]),
        ({"codebook_weight": 0.0}, ["commitment"]),
        ({"commitment_weight": 0.0, "codebook_weight": 0.0}, []),
    ],
)
def test_a_weight_of_0_removes_its_term(options, names):
    out = VectorQuantizer(4, 16, **options)(torch.randn(30, 4))
    assert sorted(out.terms) == names
    if not names:
        assert_close(out.loss, torch.zeros(()))


def test_the_estimator_defines_the_result():
    def scaled(x, codes):
        return codes.detach() + 3 * (x - x.detach())

    x = torch.randn(5, 4, requires_grad=True)
    out = VectorQuantizer(4, 16, estimator=scaled)(x)
    out.quantized.sum().backward()
    assert_close(x.grad, torch.full((5, 4), 3.0))


def test_an_estimator_that_fails_on_masked_tokens_is_shielded():
    """Masked tokens reach it as zeros and leave as zeros."""
    seen = []

    def watched(x, codes):
        seen.append((x, codes))
        return codes + 1

    mask = torch.tensor([True, False])
    x = torch.tensor([[1.0, 1.0], [torch.nan, 1.0]])
    out = VectorQuantizer(2, 4, estimator=watched)(x, mask)
    assert not seen[0][0][1].any()
    assert not out.quantized[1].any()


def test_a_codebook_can_be_shared():
    table = EmbeddingCodebook(16, 4)
    first, second = VectorQuantizer(4, 16, codebook=table), VectorQuantizer(4, 16, codebook=table)
    assert first.codebooks[0] is second.codebooks[0]
    assert dict(first.named_parameters()).keys() == {"codebook.weight"}


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logits_are_scores_up_to_a_constant(metric, temperature):
    quantizer = VectorQuantizer(4, 16, metric=metric)
    x, codes = torch.randn(3, 5, 4), quantizer.codebook.codes()
    scores = {
        "euclidean": -(x.unsqueeze(-2) - codes).square().sum(-1),
        "cosine": F.normalize(x, dim=-1) @ F.normalize(codes, dim=-1).T,
        "dot": x @ codes.T,
    }[metric]
    logits = quantizer.logits(x, temperature=temperature)
    assert logits.shape == (3, 5, 16)
    assert_close(logits.softmax(-1), (scores / temperature).softmax(-1))
    assert_close(logits.argmax(-1), quantizer.encode(x), rtol=0, atol=0)


def test_logits_have_the_gradient_of_scores_in_both():
    """Compared after a softmax, in which the constant of each token has no say."""
    quantizer = VectorQuantizer(3, 5).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    both = [x, quantizer.codebook.weight]
    scores = -(x.unsqueeze(-2) - quantizer.codebook.codes()).square().sum(-1)
    expected = torch.autograd.grad(scores.softmax(-1)[:, 0].sum(), both)
    assert_close(torch.autograd.grad(quantizer.logits(x).softmax(-1)[:, 0].sum(), both), expected)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_logits_are_float32_under_autocast_and_in_half(metric):
    quantizer = VectorQuantizer(4, 16, metric=metric)
    x = torch.randn(20, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer.logits(x)
    assert_close(inside, quantizer.logits(x), rtol=0, atol=0)
    assert quantizer.bfloat16().logits(x.bfloat16()).dtype == torch.float32


def test_logits_ignore_choices_made_elsewhere():
    quantizer, x = VectorQuantizer(4, 16), torch.randn(3, 4)
    given = torch.tensor([0, -1, 5])
    assert_close(quantizer.logits(x, indices=given), quantizer.logits(x), rtol=0, atol=0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_nearest_ranks_codes_as_logits_do(metric):
    quantizer, x = VectorQuantizer(4, 16, metric=metric), torch.randn(3, 5, 4, requires_grad=True)
    expected = quantizer.logits(x).argsort(dim=-1, descending=True)
    for count in (1, 3, 16):
        found = quantizer.nearest_indices(x, count)
        assert found.shape == (3, 5, count)
        assert_close(found, expected[..., :count], rtol=0, atol=0)
    assert_close(quantizer.nearest_indices(x, 2)[..., 0], quantizer.encode(x), rtol=0, atol=0)


def test_nearest_of_equal_codes_starts_with_the_lowest_index():
    quantizer = made_of([[5.0], [1.0], [1.0], [-1.0], [1.0]])
    found = quantizer.nearest_indices(torch.tensor([[0.5], [2.5]]), 4)
    assert found.tolist() == [[1, 2, 4, 3], [1, 2, 4, 0]]


@pytest.mark.parametrize("masked", [False, True])
def test_assign_of_what_was_chosen_is_the_result(masked):
    quantizer, x = VectorQuantizer(4, 16), torch.randn(3, 5, 4, requires_grad=True)
    out = quantizer(x, torch.rand(3, 5) > 0.4 if masked else None)
    again = quantizer.quantize_as(x, out.indices)
    for name in ("quantized", "indices", "terms"):
        assert_close(getattr(again, name), getattr(out, name), rtol=0, atol=0)
    assert_close(vars(again.selections[0]), vars(out.selections[0]), rtol=0, atol=0)
    both = [x, quantizer.codebook.weight]
    losses = [each.loss + each.quantized.square().sum() for each in (again, out)]
    assert_close(*(torch.autograd.grad(loss, both) for loss in losses), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_assign_takes_any_choice(dtype):
    quantizer = made_of([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
    x = torch.tensor([[9.0, 9.0], [0.0, 0.0], [torch.nan, 1.0]])
    out = quantizer.quantize_as(x, torch.tensor([0, 2, 1], dtype=dtype))
    assert out.indices.tolist() == [0, 2, -1]
    assert_close(out.quantized, torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 0.0]]))
    assert_close(out.terms["codebook"], torch.tensor((81.0 + 81 + 16 + 0) / 4))


def test_minus_one_masks_in_assign():
    quantizer, x = VectorQuantizer(4, 16), torch.randn(3, 4)
    out = quantizer.quantize_as(x, torch.tensor([3, -1, 7]))
    alone = quantizer.quantize_as(x[[0, 2]], torch.tensor([3, 7]))
    assert out.selections[0].mask.tolist() == [True, False, True]
    assert_close(out.terms, alone.terms)
    assert not out.quantized[1].any()


class Recorder(IndexEstimator):
    """Returns negated codes and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def select(self, x, codes, *, metric, indices=None, sample=False):
        self.calls.append((x, metric, indices, sample))
        chosen = torch.full(x.shape[:-1], 2) if indices is None else indices
        return -codes[chosen], chosen


def test_an_index_estimator_chooses_and_returns_the_vectors():
    estimator = Recorder()
    quantizer = VectorQuantizer(4, 16, metric="dot", estimator=estimator)
    x, mask = torch.randn(3, 4), torch.tensor([True, False, True])
    out = quantizer.train()(x, mask)
    codes = quantizer.codebook.codes()
    assert out.indices.tolist() == [2, -1, 2]
    assert_close(out.quantized, -codes[2] * mask[:, None], rtol=0, atol=0)
    # Rules and losses see the code that was chosen, not what the estimator made of it.
    assert_close(out.selections[0].codes, codes[2] * mask[:, None], rtol=0, atol=0)
    quantizer.eval()(x)
    quantizer.train().quantize_as(x, torch.tensor([5, -1, 6]))
    seen, metrics, given, samples = zip(*estimator.calls, strict=True)
    assert not seen[0][1].any()
    assert metrics == ("dot", "dot", "dot")
    assert given[:2] == (None, None)
    assert given[2].tolist() == [5, 0, 6]
    assert samples[:2] == (True, False)


def test_the_codebook_learns_through_an_index_estimator_without_a_codebook_term():
    quantizer = VectorQuantizer(4, 16, codebook_weight=0.0, estimator=IndexBackpropagation())
    quantizer(torch.randn(50, 4)).quantized.square().sum().backward()
    assert (quantizer.codebook.weight.grad != 0).all()


@pytest.mark.parametrize("num_nearest", [0, 17])
def test_wrong_numbers_of_nearest(num_nearest):
    with pytest.raises(ValueError, match=r"^`num_nearest` must be at (least 1|most the number)"):
        VectorQuantizer(4, 16).nearest_indices(torch.zeros(2, 4), num_nearest)


def test_wrong_assign_arguments():
    quantizer, x = VectorQuantizer(4, 16), torch.zeros(2, 3, 4)
    with pytest.raises(
        ValueError, match=r"^`indices` must have shape \(2, 3\), got \(2, 3, 1\)\.$"
    ):
        quantizer.quantize_as(x, torch.zeros(2, 3, 1, dtype=torch.int64))
    with pytest.raises(
        TypeError, match=r"^`indices` must be an integer tensor, got torch\.bool\.$"
    ):
        quantizer.quantize_as(x, torch.zeros(2, 3) > 0)
    with pytest.raises(ValueError, match=r"^`x` must have shape \(\.\.\., 4\), got \(2, 3\)\."):
        quantizer.quantize_as(x[..., 0], torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^`x` must have shape \(\.\.\., 4\), got \(2, 5\)\."):
        quantizer.nearest_indices(torch.zeros(2, 5), 1)


def test_repr_shows_options():
    assert repr(VectorQuantizer(4, 16)).splitlines()[1:3] == [
        "  metric='euclidean', commitment_weight=0.25, codebook_weight=1.0, unused_weight=0.01",
        "  (codebook): EmbeddingCodebook(16, 4, gain=8.0)",
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 16), {}, "`dim` must be at least 1, got 0."),
        ((4, 0), {}, "`codebook_size` must be at least 1, got 0."),
        ((4, 9), {"metric": "l"}, "`metric` must be one of 'cosine', 'dot', 'euclidean', got 'l'."),
        ((4, 9), {"commitment_weight": -1}, "`commitment_weight` must be at least 0.0, got -1."),
        ((4, 9), {"codebook_weight": -1.0}, "`codebook_weight` must be at least 0.0, got -1.0."),
        ((4, 9), {"unused_weight": -1.0}, "`unused_weight` must be at least 0.0, got -1.0."),
        (
            (4, 16),
            {"codebook": EmbeddingCodebook(8, 4)},
            "`codebook` must hold 16 codes of 4 features, got 8 of 4. Make `dim` and "
            "`codebook_size` those of the codebook.",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        VectorQuantizer(*arguments, **options)


def test_wrong_logits_arguments():
    quantizer = VectorQuantizer(4, 16)
    with pytest.raises(ValueError, match=r"^`temperature` must be greater than 0, got -1\.0\.$"):
        quantizer.logits(torch.randn(2, 4), temperature=-1.0)
    with pytest.raises(ValueError, match=r"^`x` must have shape \(\.\.\., 4\), got \(2, 5\)\."):
        quantizer.logits(torch.randn(2, 5))
    with pytest.raises(TypeError, match=r"^`x` must be a floating-point tensor, got torch\.int64"):
        quantizer.logits(torch.ones(2, 4).long())


def test_a_step_of_gradient_descent_moves_codes_toward_their_tokens():
    quantizer = made_of([[0.0], [10.0]], codebook_weight=1.0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    quantizer(torch.tensor([[1.0], [1.0], [13.0], [1.0]])).loss.backward()
    optimizer.step()
    # The mean of squares over four tokens: 0 + 0.5 * 2 * 3 / 4, 10 + 0.5 * 2 * 3 / 4.
    assert_close(quantizer.codebook.codes().detach(), torch.tensor([[0.75], [10.75]]))
    assert isinstance(quantizer.codebook.weight, nn.Parameter)
