"""The laws over random quantizers: classes x nestings x layouts x dtypes x masks x options.

The other files of this folder check each law in detail on listed quantizers; this one checks random
combinations. For law 7, which needs several ranks, see ``tests/distributed``.
"""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.contracts.factories import state
from tests.contracts.layouts import (
    arrange,
    before_quantization,
    decode,
    exactly,
    feature_axis,
    features_last,
    has,
    map_size,
)
from tests.contracts.observers import NoHostSync
from tests.contracts.traits import draws_in_training, estimates_straight_through
from tests.contracts.trees import build, random_mask, tokens_of, trees
from vqprior import (
    CodebookEMA,
    CodebookRevival,
    ProjectedQuantizer,
    SelfUpdating,
    TransformedCodebook,
)

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
masks = st.sampled_from(["none", "some", "all", "nothing"])
seeds = st.integers(0, 2**16)
batches = st.integers(0, 3)
many = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
few = settings(many, max_examples=5)


def make(tree, seed, *, training=False):
    torch.manual_seed(seed)
    return build(tree).train(training)


def inputs(quantizer, batch, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(*tokens_of(quantizer, batch), quantizer.dim, generator=generator)
    return arrange(quantizer, x.to(dtype))


def close_or_exact(quantizer, actual, expected):
    """Lookups must be exact; the matrix product of a projection may sum in any order."""
    if has(quantizer, ProjectedQuantizer):
        assert_close(actual, expected)
    else:
        exactly(actual, expected)


@many
@given(tree=trees(), dtype=dtypes, cast=st.booleans(), mask=masks, batch=batches, seed=seeds)
def test_law_1_decode_returns_what_forward_returned(tree, dtype, cast, mask, batch, seed):
    quantizer = make(tree, seed)
    quantizer = quantizer.to(dtype) if cast else quantizer
    x = inputs(quantizer, batch, seed, dtype)
    mask = random_mask(tokens_of(quantizer, batch), mask, seed)
    out = quantizer(x, mask)
    assert (out.quantized.dtype, out.quantized.shape) == (dtype, x.shape)
    assert (out.loss.dtype, out.loss.shape, out.indices.dtype) == (torch.float32, (), torch.int64)
    assert len(out.selections) == len(quantizer.codebooks)
    close_or_exact(quantizer, decode(quantizer, out.indices, dtype), out.quantized)
    exactly(quantizer.encode(x, mask), out.indices)
    exactly(out.loss, sum(out.terms.values(), torch.zeros(())))


@many
@given(tree=trees(), training=st.booleans(), batch=batches, seed=seeds)
def test_law_2_calls_change_nothing(tree, training, batch, seed):
    quantizer = make(tree, seed, training=training)
    x = inputs(quantizer, batch, seed)
    before, rng = state(quantizer), torch.get_rng_state()
    given = x.clone()
    indices = quantizer.encode(x)
    quantizer.decode(indices)
    exactly(state(quantizer), before)
    assert torch.equal(torch.get_rng_state(), rng)
    if not (training and has(quantizer, SelfUpdating)):
        quantizer(x)
        exactly(state(quantizer), before)
    if not training:
        assert torch.equal(torch.get_rng_state(), rng)
    exactly(x, given)


@many
@given(tree=trees(), mask=masks, batch=batches, seed=seeds)
def test_law_3_gradients(tree, mask, batch, seed):
    quantizer = make(tree, seed)
    x = inputs(quantizer, batch, seed).requires_grad_()
    mask = random_mask(tokens_of(quantizer, batch), mask, seed)
    out = quantizer(x, mask)
    weight = torch.randn(x.shape)
    (out.loss + (weight * out.quantized).sum()).backward(retain_graph=True)
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in quantizer.parameters() if p.grad is not None)
    if mask is not None:
        assert not features_last(quantizer, x.grad)[~mask].any()
    if estimates_straight_through(quantizer):
        (actual,) = torch.autograd.grad((weight * out.quantized).sum(), x)
        what = before_quantization(quantizer, x)
        valid = torch.ones(()) if mask is None else mask.unsqueeze(-1)
        what = arrange(quantizer, features_last(quantizer, what) * valid)
        (expected,) = torch.autograd.grad((weight * what).sum(), x)
        assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # products of projections


@many
@given(
    tree=trees(),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e38, 0.0]),
    training=st.booleans(),
    seed=seeds,
)
def test_law_4_what_masked_tokens_hold_does_not_matter(tree, value, training, seed):
    results = []
    for spoil in (False, True):
        quantizer = make(tree, seed, training=training)
        mask = random_mask(tokens_of(quantizer, 3), "some", seed)
        x = features_last(quantizer, inputs(quantizer, 3, seed)).clone()
        x[~mask] = value if spoil else x[~mask]
        x = arrange(quantizer, x).requires_grad_()
        torch.manual_seed(seed)
        out = quantizer(x, mask)
        (out.loss + features_last(quantizer, out.quantized)[mask].square().sum()).backward()
        gradients = [p.grad for p in quantizer.parameters() if p.grad is not None]
        seen = [vars(selection) for selection in out.selections]
        quantized = features_last(quantizer, out.quantized)[mask]
        results.append((out.loss, out.terms, out.indices, quantized, x.grad, gradients, seen))
    exactly(results[1], results[0])


@many
@given(tree=trees(), training=st.booleans(), seed=seeds)
def test_law_4_an_all_true_mask_is_no_mask_and_nothing_counts_as_nothing(tree, training, seed):
    results = []
    for kind in ("none", "all"):
        quantizer = make(tree, seed, training=training)
        x = inputs(quantizer, 2, seed)
        torch.manual_seed(seed)
        out = quantizer(x, random_mask(tokens_of(quantizer, 2), kind, seed))
        results.append((out.quantized, out.indices, out.terms))
    exactly(results[1], results[0])
    quantizer = make(tree, seed, training=training)
    before = state(quantizer)
    x = inputs(quantizer, 2, seed).requires_grad_()
    out = quantizer(x, random_mask(tokens_of(quantizer, 2), "nothing", seed))
    exactly(out.loss, torch.zeros(()))
    assert (out.indices == -1).all()
    (out.loss + out.quantized.sum()).backward()
    assert not x.grad.any()
    exactly(state(quantizer), before)


@many
@given(tree=trees(), low=st.sampled_from([torch.float16, torch.bfloat16]), seed=seeds)
def test_law_5_autocast_changes_nothing(tree, low, seed):
    quantizer = make(tree, seed)
    x = inputs(quantizer, 3, seed)
    expected = quantizer(x)
    with torch.autocast("cpu", dtype=low):
        out = quantizer(x)
    exactly(out.indices, expected.indices)
    exactly(out.quantized, expected.quantized)
    exactly(out.loss, expected.loss)


@many
@given(tree=trees(), mask=masks, training=st.booleans(), seed=seeds)
def test_law_6_nothing_waits_for_the_device(tree, mask, training, seed):
    quantizer = make(tree, seed, training=training)
    x = inputs(quantizer, 2, seed).requires_grad_()
    mask = random_mask(tokens_of(quantizer, 2), mask, seed)
    with NoHostSync():
        out = quantizer(x, mask)
        (out.loss + out.quantized.sum()).backward()
        quantizer.decode(quantizer.encode(x, mask))


@few
@given(tree=trees(depth=1), training=st.booleans(), seed=seeds)
def test_law_6_compiles_in_one_graph(tree, training, seed):
    torch.compiler.reset()
    results = []
    for compiles in (False, True):
        quantizer = make(tree, seed, training=training)
        x = inputs(quantizer, 2, seed).requires_grad_()
        mask = random_mask(tokens_of(quantizer, 2), "some", seed)
        call = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
        torch.manual_seed(seed)
        out = (call if compiles else quantizer)(x, mask)
        (out.loss + out.quantized.square().sum()).backward()
        results.append((out.quantized, out.indices, out.terms, x.grad))
    assert_close(results[1], results[0])


@many
@given(tree=trees(), ema=st.booleans(), seed=seeds)
def test_law_8_a_state_continues_and_copies_are_whole(tree, ema, seed):
    def train(quantizer, rules, steps):
        for step in steps:
            torch.manual_seed(step)
            x = inputs(quantizer, 2, step)
            out = quantizer.train()(x)
            for rule in rules:
                rule.step(out)

    def rules_of(quantizer):
        if (
            not quantizer.codebooks
            or has(quantizer, TransformedCodebook)
            or has(quantizer, SelfUpdating)
        ):
            return torch.nn.ModuleList()
        revival = CodebookRevival(quantizer, patience=1.0, threshold=0.5)
        return torch.nn.ModuleList([CodebookEMA(quantizer)] * ema + [revival])

    first = make(tree, seed)
    first_rules = rules_of(first)
    train(first, first_rules, range(2))
    file = io.BytesIO()
    torch.save((first.state_dict(), first_rules.state_dict()), file)
    file.seek(0)
    second = make(tree, seed + 1)
    second_rules = rules_of(second)
    saved, saved_rules = torch.load(file, weights_only=True)
    second.load_state_dict(saved)
    second_rules.load_state_dict(saved_rules)
    third, third_rules = copy.deepcopy((second, second_rules))
    for quantizer, rules in [
        (first, first_rules), (second, second_rules), (third, third_rules),
    ]:  # fmt: skip
        train(quantizer, rules, range(2, 4))
    for quantizer, rules in [(second, second_rules), (third, third_rules)]:
        exactly(state(quantizer), state(first))
        exactly(state(rules), state(first_rules))
    assert_clone = pickle.loads(pickle.dumps(first)).eval()
    x = inputs(first, 2, seed)
    exactly(assert_clone(x).quantized, first.eval()(x).quantized)


@many
@given(tree=trees(), seed=seeds)
def test_law_9_wrong_input_raises(tree, seed):
    quantizer = make(tree, seed)
    x = inputs(quantizer, 2, seed)
    wider = torch.cat([x, x], dim=feature_axis(quantizer))
    with pytest.raises(ValueError, match=r"^`(x|texture)` must have shape \("):
        quantizer(wider)
    with pytest.raises(
        TypeError, match=r"^`(x|texture)` must be a floating-point tensor, got torch"
    ):
        quantizer(x.long())
    with pytest.raises(TypeError, match=r"^`mask` must be a boolean tensor"):
        quantizer(x, torch.ones(tokens_of(quantizer, 2)))
    with pytest.raises(ValueError, match=r"^`mask` must have shape"):
        quantizer(x, torch.ones(7, 7, 7, 7) > 0)
    with pytest.raises(TypeError, match=r"^`indices` must be an integer tensor"):
        quantizer.decode(x)
    with pytest.raises(TypeError, match=r"^`indices` must be an integer tensor"):
        quantizer.quantize_as(x, x)


@many
@given(tree=trees(), mask=masks, seed=seeds)
def test_assign_of_the_own_choice_is_forward(tree, mask, seed):
    quantizer = make(tree, seed)
    x = inputs(quantizer, 2, seed).requires_grad_()
    mask = random_mask(tokens_of(quantizer, 2), mask, seed)
    out = quantizer(x, mask)
    again = quantizer.quantize_as(x, out.indices)
    if mask is not None and map_size(quantizer) and not mask.all():
        return  # indices do not tell which positions a coarse index averaged
    exactly(again.indices, out.indices)
    exactly(again.quantized, out.quantized)
    exactly(again.terms, out.terms)
    ours, theirs = (
        torch.autograd.grad((each.quantized.sum() + each.loss), x)[0] for each in (again, out)
    )
    exactly(ours, theirs)


def test_the_trees_cover_every_class_and_option():
    """Checks that the strategy draws every class and option."""
    seen = set()

    @many
    @given(tree=trees())
    def collect(tree):
        def walk(node):
            if isinstance(node, tuple):
                seen.update(word for word in node if isinstance(word, str))
                for part in node:
                    walk(part)

        walk(tree)
        draws_in_training(build(tree))

    collect()
    from tests.contracts.trees import BUILDERS, ESTIMATORS

    assert seen >= {*BUILDERS, *ESTIMATORS, "euclidean", "cosine", "dot", "normalized", "simvq"}
