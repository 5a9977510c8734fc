"""`IndexBackpropagation`: `select_codes` on all logits, a block at a time."""

import pytest
import torch
from torch.testing import assert_close

from vqprior import CodebookRevival, EmbeddingCodebook, VectorQuantizer
from vqprior.functional import IndexBackpropagation, _softmax_gradient, select_codes
from vqprior.functional._random import counter_gumbel
from vqprior.functional._scores import score_codes

METRICS = ["euclidean", "cosine", "dot"]
every_metric = pytest.mark.parametrize("metric", METRICS)
every_estimator = pytest.mark.parametrize("estimator", ["straight_through", "gumbel", "reinmax"])


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def make(k=7, d=3, metric="euclidean", **options):
    estimator = IndexBackpropagation(**options)
    weights = {"commitment_weight": 0.0, "codebook_weight": 0.0}
    table = EmbeddingCodebook(k, d)  # gradients of its weight are those of the codes
    return VectorQuantizer(d, k, codebook=table, metric=metric, estimator=estimator, **weights)


@pytest.fixture(params=[1 << 20, 21, 1], ids=["one-block", "blocks-of-3", "blocks-of-1"])
def block(request, monkeypatch):
    monkeypatch.setattr(_softmax_gradient, "_MAX_BLOCK_ENTRIES", request.param)
    monkeypatch.setattr(_softmax_gradient, "_MIN_BLOCK_ROWS", 1)


def autograd_of_a_softmax(logits, codes, estimator, indices, temperature):
    """The gradient of the mean code under the softmax, as autograd has it; the value is moot."""
    p = (logits / temperature).softmax(dim=-1)
    if estimator == "reinmax":  # algorithm 2 of the paper: Heun's method on the logits
        one_hot = torch.nn.functional.one_hot(indices, codes.shape[0]).to(p)
        middle = ((one_hot + p.detach()) / 2).log()
        shifted = (middle - logits.detach() + logits).softmax(dim=-1)
        p = 2 * shifted - logits.softmax(dim=-1) / 2
    return p @ codes.detach() + codes[indices]


@every_metric
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.usefixtures("block")
def test_equals_select_codes_on_all_logits(metric, temperature, training):
    quantizer = make(metric=metric, temperature=temperature).double().train(training)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    codes, weight = quantizer.codebook.weight, torch.randn(2, 5, 3, dtype=torch.float64)
    vectors, indices = select_codes(quantizer.logits(x), codes, temperature=temperature)
    expected = torch.autograd.grad((weight * vectors).sum(), [x, codes])
    out = quantizer(x)
    exactly(out.quantized, vectors)
    exactly(out.indices, indices)
    assert_close(torch.autograd.grad((weight * out.quantized).sum(), [x, codes]), expected)


@every_metric
@every_estimator
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.usefixtures("block")
def test_indices_given_have_the_gradient_of_autograd(metric, estimator, temperature):
    """With a choice made elsewhere there is no noise to compare."""
    quantizer = make(metric=metric, estimator=estimator, temperature=temperature).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    codes, weight = quantizer.codebook.weight, torch.randn(2, 5, 3, dtype=torch.float64)
    given = torch.randint(7, (2, 5))
    mean = autograd_of_a_softmax(quantizer.logits(x), codes, estimator, given, temperature)
    expected = torch.autograd.grad((weight * mean).sum(), [x, codes])
    out = quantizer.train().quantize_as(x, given)
    exactly(out.indices, given)
    exactly(out.quantized, codes[given])
    assert_close(torch.autograd.grad((weight * out.quantized).sum(), [x, codes]), expected)


@every_metric
@pytest.mark.parametrize("estimator", ["gumbel", "reinmax"])
@pytest.mark.usefixtures("block")
def test_the_backward_pass_has_the_noise_of_the_forward(metric, estimator):
    """The draw is repeated from its seed, and autograd goes through the perturbed logits."""
    quantizer = make(metric=metric, estimator=estimator, temperature=0.7).double().train()
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    codes, weight = quantizer.codebook.weight, torch.randn(9, 3, dtype=torch.float64)
    torch.manual_seed(5)
    seed = torch.randint(2**62, ())
    noise = counter_gumbel(torch.arange(9 * 7).reshape(9, 7) + seed, torch.float64)
    logits = quantizer.logits(x)
    indices = (logits + noise).argmax(dim=-1)
    used = logits + noise if estimator == "gumbel" else logits
    mean = autograd_of_a_softmax(used, codes, estimator, indices, 0.7)
    expected = torch.autograd.grad((weight * mean).sum(), [x, codes])
    torch.manual_seed(5)
    out = quantizer(x)
    exactly(out.indices, indices)
    exactly(out.quantized, codes[indices])
    assert_close(torch.autograd.grad((weight * out.quantized).sum(), [x, codes]), expected)


@every_metric
@pytest.mark.parametrize("estimator", ["gumbel", "reinmax"])
def test_samples_follow_the_softmax_of_the_scores(metric, estimator):
    """Of the scores as they are: the temperature is that of the gradient."""
    quantizer = make(metric=metric, estimator=estimator, temperature=9.0).train()
    n, x = 20_000, torch.randn(3)
    expected = quantizer.logits(x).softmax(dim=-1)
    indices = quantizer(x.expand(n, 3)).indices
    frequencies = indices.bincount(minlength=7) / n
    assert ((frequencies - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()
    assert (expected > 0.02).sum() > 2  # something to be drawn


@pytest.mark.parametrize("estimator", ["gumbel", "reinmax"])
def test_draws_follow_the_global_generator_in_training_alone(estimator):
    quantizer, x = make(estimator=estimator).train(), torch.randn(200, 3)
    torch.manual_seed(1)
    first = quantizer(x).indices
    assert (quantizer(x).indices != first).any()
    torch.manual_seed(1)
    exactly(quantizer(x).indices, first)
    state = torch.get_rng_state()
    exactly(quantizer.eval()(x).indices, quantizer.encode(x))
    quantizer.train().encode(x)
    quantizer.train().quantize_as(x, first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_straight_through_draws_nothing(training):
    quantizer, x = make().train(training), torch.randn(200, 3)
    state = torch.get_rng_state()
    exactly(quantizer(x).indices, quantizer.encode(x))
    assert torch.equal(torch.get_rng_state(), state)


@every_metric
@every_estimator
def test_gradients_reach_all_codes(metric, estimator):
    quantizer = make(k=32, metric=metric, estimator=estimator).train()
    quantizer(torch.randn(50, 3)).quantized.square().sum().backward()
    assert (quantizer.codebook.weight.grad != 0).all()


@every_metric
def test_gradients_match_finite_differences_of_the_mean_code(metric):
    """The backward pass is that of the soft mean: differences of it, without autograd."""
    quantizer = make(metric=metric, temperature=0.8).double()
    codes = quantizer.codebook.weight
    x, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def mean(inputs):
        logits = score_codes(inputs, codes.detach(), metric)
        return (weight * ((logits / 0.8).softmax(dim=-1) @ codes.detach())).sum()

    x.requires_grad_()
    (actual,) = torch.autograd.grad((weight * quantizer(x).quantized).sum(), x)
    step = 1e-6
    numeric = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(4):
            for j in range(3):
                moved = torch.zeros_like(x)
                moved[i, j] = step
                numeric[i, j] = (mean(x + moved) - mean(x - moved)) / (2 * step)
    assert_close(actual, numeric, rtol=1e-6, atol=1e-8)


@every_metric
@every_estimator
def test_masked_tokens_change_no_gradient(metric, estimator):
    quantizer = make(metric=metric, estimator=estimator).eval()
    x, mask = torch.randn(8, 3), torch.arange(8) % 3 != 1
    codes = quantizer.codebook.weight
    (alone,) = torch.autograd.grad(quantizer(x[mask]).quantized.square().sum(), codes)
    x[~mask] = torch.nan
    x.requires_grad_()
    out = quantizer(x, mask)
    of_x, of_codes = torch.autograd.grad(out.quantized.square().sum(), [x, codes])
    assert_close(of_codes, alone)
    assert not of_x[~mask].any()
    assert not out.quantized[~mask].any()


def test_codes_that_share_an_offset_have_the_gradient_of_codes_that_do_not():
    """Distances do not change, and centered products do not cancel in float32."""
    near = make(k=9)
    x, weight = torch.randn(20, 3), torch.randn(20, 3)
    far = make(k=9)
    far.codebook.weight.data = near.codebook.weight.data + 4096
    shifted = (x + 4096).requires_grad_()
    x = (shifted.detach() - 4096).requires_grad_()
    near.codebook.weight.data = far.codebook.weight.data - 4096
    gradients = [
        torch.autograd.grad((weight * q(inputs).quantized).sum(), [inputs, q.codebook.weight])
        for q, inputs in ((near, x), (far, shifted))
    ]
    # The mean of codes near 4096 is rounded to 2**-11 at worst.
    assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel", "reinmax"])
def test_a_rule_may_move_the_codebook_before_the_backward_pass(estimator):
    quantizer = make(k=16, estimator=estimator).train()
    quantizer.codebook.weight.data[8:] += 100
    x = torch.randn(40, 3, requires_grad=True)
    gradients = []
    for step in (False, True):
        torch.manual_seed(2)
        out = quantizer(x)
        if step:
            CodebookRevival(quantizer, patience=1.0).step(out)
        gradients.append(torch.autograd.grad(out.quantized.square().sum(), x)[0])
    assert (quantizer.codebook.weight[8:].abs() < 50).all()
    exactly(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_differentiated_in_float32(dtype):
    quantizer = make(k=16).to(dtype)
    wide = make(k=16)
    wide.load_state_dict(quantizer.float().state_dict())
    quantizer.to(dtype)
    x, weight = torch.randn(20, 3).to(dtype), torch.randn(20, 3).to(dtype)
    low, high = x.clone().requires_grad_(), x.float().requires_grad_()
    out, expected = quantizer(low), wide(high)
    exactly(out.indices, expected.indices)
    exactly(out.quantized, expected.quantized.to(dtype))
    (of_low,) = torch.autograd.grad((weight * out.quantized).sum(), low)
    (of_high,) = torch.autograd.grad((weight.float() * expected.quantized).sum(), high)
    assert_close(of_low, of_high.to(dtype))


def test_autocast_changes_no_gradient():
    quantizer, x = make(k=16), torch.randn(20, 3, requires_grad=True)
    expected = torch.autograd.grad(quantizer(x).quantized.square().sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(x)
        actual = torch.autograd.grad(out.quantized.square().sum(), x)
    exactly(actual, expected)


def test_zero_vectors_have_finite_gradients_under_the_cosine():
    quantizer = make(metric="cosine")
    x = torch.zeros(4, 3, requires_grad=True)
    quantizer(x).quantized.square().sum().backward()
    exactly(x.grad, torch.zeros(4, 3))  # the direction of nothing does not move
    assert quantizer.codebook.weight.grad.isfinite().all()


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
@every_estimator
def test_leading_dimensions(leading, estimator):
    quantizer = make(estimator=estimator).train()
    x = torch.randn(*leading, 3, requires_grad=True)
    out = quantizer(x)
    assert (out.quantized.shape, out.indices.shape) == (x.shape, leading)
    out.quantized.sum().backward()
    assert x.grad.shape == x.shape


def test_the_terms_are_those_of_the_chosen_codes():
    table = EmbeddingCodebook(16, 3)
    plain = VectorQuantizer(3, 16, codebook=table)
    through = VectorQuantizer(3, 16, codebook=table, estimator=IndexBackpropagation())
    x = torch.randn(20, 3)
    exactly(through(x).terms, plain(x).terms)
    exactly(vars(through(x).selections[0]), vars(plain(x).selections[0]))


def test_wrong_arguments():
    message = r"^`estimator` must be one of 'gumbel', 'reinmax', 'straight_through', got 'soft'\.$"
    with pytest.raises(ValueError, match=message):
        IndexBackpropagation("soft")
    with pytest.raises(ValueError, match=r"^`temperature` must be greater than 0, got 0\.0\.$"):
        IndexBackpropagation(temperature=0.0)
