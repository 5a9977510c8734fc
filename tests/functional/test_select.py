"""`select_codes`: each estimator against its published formula, differentiated by autograd."""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.contracts.observers import LargestTensor, LargeTensors, NoHostSync
from vqprior.functional import _select, _softmax_gradient, select_codes

ESTIMATORS = ["straight_through", "soft", "gumbel", "reinmax"]
HARD = ["straight_through", "gumbel", "reinmax"]
SAMPLED = ["gumbel", "reinmax"]
TEMPERATURES = [0.5, 1.0, 3.0]


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def case(dtype=torch.float64, k=6, d=3, leading=(4, 5)):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(*leading, k, generator=generator, dtype=dtype)
    codes = torch.randn(k, d, generator=generator, dtype=dtype)
    weight = torch.randn(*leading, d, generator=generator, dtype=dtype)
    return logits.requires_grad_(), codes.requires_grad_(), weight


def gradients(vectors, logits, codes, weight):
    return torch.autograd.grad((weight * vectors).sum(), [logits, codes])


def straight_through_by_definition(logits, codes, indices, temperature):
    p = (logits / temperature).softmax(-1)
    one_hot = F.one_hot(indices, logits.shape[-1]).to(p.dtype)
    return (one_hot + p - p.detach()) @ codes


def reinmax_by_definition(logits, codes, indices, temperature):
    """Algorithm 2 of Liu et al., 2023, line by line."""
    one_hot = F.one_hot(indices, logits.shape[-1]).to(logits.dtype)
    pi0 = logits.softmax(-1)
    pi1 = (one_hot + (logits / temperature).softmax(-1)) / 2
    pi1 = ((pi1.log() - logits).detach() + logits).softmax(-1)
    pi2 = 2 * pi1 - pi0 / 2
    return (pi2 - pi2.detach() + one_hot) @ codes


def perturbed_by(seed, logits):
    """The logits plus the Gumbel noise that a generator with this seed gives."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(logits.shape, dtype=logits.dtype, generator=generator)
    return logits - (-uniform.log()).log()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_straight_through_matches_one_hot_plus_softmax(temperature):
    logits, codes, weight = case()
    vectors, indices = select_codes(logits, codes, temperature=temperature)
    exactly(indices, logits.argmax(-1))
    expected = straight_through_by_definition(logits, codes, indices, temperature)
    assert_close(vectors, expected)
    assert_close(
        gradients(vectors, logits, codes, weight), gradients(expected, logits, codes, weight)
    )


def test_straight_through_gradient_in_closed_form():
    """``p * (<g, codes> - sum_j p_j <g, codes_j>) / temperature``, as the docstring says."""
    logits, codes, weight = case()
    vectors, _ = select_codes(logits, codes, temperature=2.0)
    p, wanted = (logits / 2.0).softmax(-1), weight @ codes.T
    expected = p * (wanted - (p * wanted).sum(-1, keepdim=True)) / 2.0
    assert_close(gradients(vectors, logits, codes, weight)[0], expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gumbel_matches_the_softmax_of_the_perturbed_logits(temperature):
    logits, codes, weight = case()
    vectors, indices = select_codes(
        logits,
        codes,
        estimator="gumbel",
        temperature=temperature,
        generator=torch.Generator().manual_seed(5),
    )
    noisy = perturbed_by(5, logits)
    exactly(indices, noisy.argmax(-1))
    expected = straight_through_by_definition(noisy, codes, indices, temperature)
    assert_close(
        gradients(vectors, logits, codes, weight), gradients(expected, logits, codes, weight)
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_reinmax_matches_the_published_algorithm(temperature):
    logits, codes, weight = case()
    vectors, indices = select_codes(logits, codes, estimator="reinmax", temperature=temperature)
    expected = reinmax_by_definition(logits, codes, indices, temperature)
    assert_close(vectors, expected)
    assert_close(
        gradients(vectors, logits, codes, weight), gradients(expected, logits, codes, weight)
    )


def test_reinmax_is_exact_to_second_order():
    """For a quadratic function of two codes the expected ReinMax gradient is the true one."""
    logits = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    codes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def loss(vector):
        return (3 * vector.square() - 2 * vector).sum()

    p = logits.softmax(-1)
    (true,) = torch.autograd.grad(sum(p[i] * loss(codes[i]) for i in range(2)), logits)
    estimate = torch.zeros_like(true)
    for index in range(2):
        seed = next(s for s in range(99) if perturbed_by(s, logits).argmax() == index)
        vector, chosen = select_codes(
            logits, codes, estimator="reinmax", generator=torch.Generator().manual_seed(seed)
        )
        assert chosen == index
        estimate += p[index].detach() * torch.autograd.grad(loss(vector), logits)[0]
    assert_close(estimate, true)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_is_the_mean_code_and_smooth(temperature):
    logits, codes, _ = case(leading=(3,))
    vectors, indices = select_codes(logits, codes, estimator="soft", temperature=temperature)
    assert_close(vectors, (logits / temperature).softmax(-1) @ codes)
    exactly(indices, logits.argmax(-1))

    def soft(logits, codes):
        return select_codes(logits, codes, estimator="soft", temperature=temperature)[0]

    assert torch.autograd.gradcheck(soft, (logits, codes))


@pytest.mark.parametrize("estimator", HARD)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_hard_vectors_are_rows_bit_for_bit(estimator, dtype):
    logits, codes, _ = case(dtype=torch.float32)
    codes = (1000 + codes).detach().to(dtype)
    vectors, indices = select_codes(logits, codes, estimator=estimator)
    exactly(vectors, codes[indices])
    assert (vectors.dtype, indices.dtype) == (dtype, torch.int64)


@pytest.mark.parametrize("estimator", SAMPLED)
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_samples_follow_the_softmax_whatever_the_temperature(estimator, temperature):
    logits, n = torch.tensor([1.0, -1.0, 0.5, 2.0, -3.0]), 40_000
    _, indices = select_codes(
        logits.expand(n, -1), torch.randn(5, 2), estimator=estimator, temperature=temperature
    )
    p = logits.softmax(-1)
    frequencies = torch.bincount(indices, minlength=5) / n
    # Four standard errors of a binomial share: one false alarm in 3000 seeds, and this is one.
    assert ((frequencies - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_codes_receive_the_gradient_of_the_lookup(estimator):
    logits, codes, weight = case()
    vectors, indices = select_codes(logits, codes, estimator=estimator)
    p = logits.softmax(-1) if estimator == "soft" else F.one_hot(indices, 6).double()
    expected = torch.einsum("abk,abd->kd", p, weight)
    assert_close(gradients(vectors, logits, codes, weight)[1], expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_frozen_codes_stay_frozen_and_still_guide_the_logits(estimator):
    logits, codes, weight = case()
    vectors, _ = select_codes(logits, codes.detach(), estimator=estimator)
    (weight * vectors).sum().backward()
    assert codes.grad is None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_gradients_nothing_is_recorded(estimator):
    logits, codes, _ = case()
    vectors, _ = select_codes(logits.detach(), codes.detach(), estimator=estimator)
    assert not vectors.requires_grad


@pytest.mark.parametrize("estimator", SAMPLED)
def test_a_generator_decides_alone(estimator):
    logits, codes, _ = case(leading=(200,))
    rng = torch.get_rng_state()
    picks = [
        select_codes(
            logits, codes, estimator=estimator, generator=torch.Generator().manual_seed(seed)
        )[1]
        for seed in (3, 3, 4)
    ]
    assert torch.equal(torch.get_rng_state(), rng)
    exactly(picks[0], picks[1])
    assert (picks[0] != picks[2]).any()


@pytest.mark.parametrize("estimator", ["straight_through", "soft"])
def test_deterministic_estimators_draw_nothing(estimator):
    logits, codes, _ = case()
    rng = torch.get_rng_state()
    select_codes(logits, codes, estimator=estimator)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_forbidden_codes_are_never_chosen_and_get_no_gradient(estimator):
    logits, codes, weight = case()
    allowed = torch.tensor([True, False, True, True, False, True])
    forbidding = logits.masked_fill(~allowed, -torch.inf)
    vectors, indices = select_codes(forbidding, codes, estimator=estimator)
    assert allowed[indices].all()
    gradient = gradients(vectors, logits, codes, weight)[0]
    assert gradient.isfinite().all()
    assert not gradient[..., ~allowed].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_extreme_logits_keep_gradients_finite(estimator, scale):
    logits, codes, weight = case(dtype=torch.float32)
    vectors, _ = select_codes(scale * logits, codes, estimator=estimator)
    assert all(g.isfinite().all() for g in gradients(vectors, logits, codes, weight))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_differentiated_in_float32(estimator, low):
    logits, codes, weight = (t.detach().to(low) for t in case(dtype=torch.float32))
    options = {"estimator": estimator, "temperature": 2.0}
    wide = [t.float().requires_grad_() for t in (logits, codes)]
    narrow = [t.requires_grad_() for t in (logits, codes)]
    torch.manual_seed(0)
    expected = gradients(select_codes(*wide, **options)[0], *wide, weight.float())
    torch.manual_seed(0)
    actual = gradients(select_codes(*narrow, **options)[0], *narrow, weight)
    # Each entry is the float32 result, rounded once; `soft` leaves the codes' sum to autograd.
    tolerance = {"rtol": 4 * torch.finfo(low).eps, "atol": 4 * torch.finfo(low).eps}
    assert_close(actual, tuple(e.to(low) for e in expected), **tolerance)
    assert [g.dtype for g in actual] == [low, low]


def test_code_gradients_are_summed_in_float32():
    """In bfloat16 the sum of 1000 ones sticks at 256."""
    logits = torch.zeros(1000, 2)
    codes = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    select_codes(logits, codes)[0].sum().backward()
    exactly(codes.grad.float(), torch.tensor([[1000.0], [0.0]]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_changes_nothing(estimator):
    logits, codes, weight = case(dtype=torch.float32)
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            vectors, _ = select_codes(logits, codes, estimator=estimator)
        results.append((vectors, *gradients(vectors, logits, codes, weight)))
    exactly(results[1], results[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("entries", [1, 14, 40])
def test_block_sizes_do_not_change_the_result(monkeypatch, estimator, entries):
    results = []
    for limit in (1 << 20, entries):
        monkeypatch.setattr(_softmax_gradient, "_MAX_BLOCK_ENTRIES", limit)
        monkeypatch.setattr(_softmax_gradient, "_MIN_BLOCK_ROWS", 1)
        torch.manual_seed(0)
        logits, codes, weight = case(leading=(3, 5))
        vectors, _ = select_codes(logits, codes, estimator=estimator, temperature=0.7)
        results.append((vectors, *gradients(vectors, logits, codes, weight)))
    assert_close(results[1], results[0])


def test_a_gpu_gets_few_blocks():
    """Each costs the launch of all its operators there."""
    of_cpu, of_gpu = (
        _softmax_gradient.row_blocks(16384, 1024, torch.device(kind)) for kind in ("cpu", "cuda")
    )
    assert of_gpu == [slice(0, 16384)]
    assert len(of_cpu) == 16
    many = _softmax_gradient.row_blocks(1 << 20, 8192, torch.device("cuda"))
    assert len(many) == 512  # and no more memory than that
    assert many[-1] == slice((1 << 20) - 2048, 1 << 20)


@pytest.mark.parametrize("estimator", ["straight_through", "soft", "reinmax"])
def test_the_gradient_can_be_differentiated_again(estimator):
    """A penalty on gradients, say. The choice itself is constant."""
    logits, codes, weight = case(leading=(4,))
    codes = codes.detach()

    def gradient(logits):
        torch.manual_seed(0)
        vectors, _ = select_codes(logits, codes, estimator=estimator)
        return torch.autograd.grad((weight * vectors).sum(), logits, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, logits)


@pytest.mark.parametrize("estimator", ["straight_through", "soft"])
def test_function_transforms_see_through_it(estimator):
    logits, codes, weight = case()
    vectors, _ = select_codes(logits, codes, estimator=estimator)
    expected = gradients(vectors, logits, codes, weight)

    def loss(logits, codes):
        return (weight * select_codes(logits, codes, estimator=estimator)[0]).sum()

    assert_close(torch.func.grad(loss, argnums=(0, 1))(logits, codes), expected)


@pytest.mark.full
@pytest.mark.parametrize("of", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("estimator", ["soft", "reinmax"])
def test_the_operators_are_registered_correctly(estimator, of):
    logits, codes, weight = (t.detach() for t in case(dtype=torch.float32))
    torch.library.opcheck(torch.ops.vqprior.mean_code.default, (logits, codes, 0.7))
    arguments = (weight, logits, codes, logits.argmax(-1), 0.7, estimator, *of)
    torch.library.opcheck(_select.select_gradients_op, arguments)


@pytest.mark.parametrize("estimator", ["straight_through", "soft", "reinmax"])
def test_beyond_the_gradient_of_the_logits_memory_is_one_block(monkeypatch, estimator):
    monkeypatch.setattr(_softmax_gradient, "_MAX_BLOCK_ENTRIES", 1 << 10)
    logits, codes, weight = case(dtype=torch.float32, k=50, d=4, leading=(3000,))
    vectors, _ = select_codes(logits, codes, estimator=estimator)
    with LargeTensors(3000 * 50 // 4) as large:
        gradients(vectors, logits, codes, weight)
    assert len(large.storages) == 1


@pytest.mark.parametrize("estimator", HARD)
def test_no_one_hot_matrix_per_feature_and_no_host_sync(estimator):
    logits, codes, weight = case(dtype=torch.float32, k=50, d=20, leading=(300,))
    with LargestTensor() as largest, NoHostSync():
        gradients(select_codes(logits, codes, estimator=estimator)[0], logits, codes, weight)
    assert largest.numel <= 300 * 50  # the size of the logits themselves


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("leading", [(), (7,), (2, 0, 3)])
def test_leading_dimensions_are_free(estimator, leading):
    logits, codes, weight = case(leading=leading)
    vectors, indices = select_codes(logits, codes, estimator=estimator)
    assert (vectors.shape, indices.shape) == ((*leading, 3), leading)
    assert [g.shape for g in gradients(vectors, logits, codes, weight)] == [
        logits.shape,
        codes.shape,
    ]


@pytest.mark.full
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles_in_one_graph(estimator):
    torch.compiler.reset()
    logits, codes, weight = case()

    def call(logits, codes):
        return select_codes(logits, codes, estimator=estimator)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        vectors, indices = function(logits, codes)
        results.append((indices, *gradients(vectors, logits, codes, weight)))
    assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("logits", "codes", "options", "error", "message"),
    [
        (
            torch.zeros(2, 3).long(),
            torch.zeros(3, 4),
            {},
            TypeError,
            "`logits` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(3, 4).long(),
            {},
            TypeError,
            "`codes` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(4),
            {},
            ValueError,
            "`codes` must have shape (k, d) with k and d at least 1, got (4,).",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(5, 4),
            {},
            ValueError,
            "`logits` must have shape (..., 5), one entry for each code, got (2, 3).",
        ),
        (
            torch.zeros(()),
            torch.zeros(5, 4),
            {},
            ValueError,
            "`logits` must have shape (..., 5), one entry for each code, got ().",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(3, 4),
            {"estimator": "hard"},
            ValueError,
            "`estimator` must be one of 'gumbel', 'reinmax', 'soft', 'straight_through', got "
            "'hard'.",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(3, 4),
            {"temperature": 0.0},
            ValueError,
            "`temperature` must be greater than 0, got 0.0.",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(3, 4),
            {"temperature": float("nan")},
            ValueError,
            "`temperature` must be greater than 0, got nan.",
        ),
    ],
)
def test_wrong_arguments(logits, codes, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        select_codes(logits, codes, **options)


@pytest.mark.parametrize("estimator", ["straight_through", "soft", "gumbel", "reinmax"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_code_of_no_probability_harms_no_gradient(estimator, value):
    logits, codes = torch.randn(20, 8), torch.randn(8, 3)
    logits[:, 5] = -torch.inf
    expected, broken = codes.clone(), codes.clone()
    expected[5], broken[5] = 0.0, value
    found = []
    for table in (expected, broken):
        leaf = logits.clone().requires_grad_()
        vectors, _ = select_codes(
            leaf, table, estimator=estimator, generator=torch.Generator().manual_seed(0)
        )
        vectors.square().sum().backward()
        found.append((vectors.detach(), leaf.grad))
    assert_close(found[1], found[0], rtol=0, atol=0)
