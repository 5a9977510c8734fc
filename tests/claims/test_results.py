"""Claims on what a call returns: 5, 8, 9, 13, 18, 25."""

import re
from importlib.metadata import requires
from importlib.resources import files

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from tests.claims.cast import (
    MAP,
    RULES,
    every_quantizer,
    filled,
    gradients,
    has_codes_to_score,
    maps,
    quantizers_where,
    residual,
    rules_can_write,
    seeded,
    some_tokens,
)
from tests.contracts.factories import (
    arrange,
    features_last,
    has,
    state,
    vq,
)
from vqprior import FSQ, MultiScaleQuantizer, QuantizerOutput, ResidualQuantizer, SelfUpdating
from vqprior.functional import distance_cross_entropy, index_cross_entropy
from vqprior.metrics import CodebookUsage


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


MASKS = {"all": lambda: None, "some": some_tokens, "none": lambda: torch.zeros(MAP) > 0}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


@every_quantizer
@every_mask
def test_claim_05_decoding_the_indices_gives_what_forward_gave(make, mask):
    """vector-quantize-pytorch decodes to another shape or other values with projections, heads,
    maps, masks or transformed codes. Here decoding is what forward returned, bit for bit, in
    eval and in training."""
    quantizer = make()
    x = maps(quantizer)
    for training in (False, True):
        out = quantizer.train(training)(x, mask())
        assert out.quantized.shape == x.shape
        if mask() is not None and not has(quantizer, MultiScaleQuantizer):
            exactly((out.indices == -1).reshape(*MAP, -1).all(dim=-1), ~mask())
        if not (training and has(quantizer, SelfUpdating)):  # which has moved its codes since
            exactly(quantizer.eval().decode(out.indices).detach(), out.quantized.detach())


def test_claim_05_indices_of_large_codebooks_survive_the_round_trip():
    """vector-quantize-pytorch computes the indices of FSQ in float32: most indices of a large
    code space do not survive. Here index arithmetic is int64."""
    for levels in ([1000, 1000, 100], [8] * 9, [4] * 31):
        quantizer = FSQ(levels)
        indices = torch.randint(0, quantizer.codebook_size, (1000,))
        exactly(quantizer.quantize_as(torch.zeros(1000, len(levels)), indices).indices, indices)
        wide = quantizer.decode(indices).double()
        half = torch.tensor(levels) // 2
        weights = torch.tensor([1, *levels[:-1]]).cumprod(0)
        digits = (wide * half).round().long() + half
        exactly((digits * weights).sum(dim=-1), indices)


@every_quantizer
def test_claim_08_an_all_true_mask_is_no_mask(make):
    """vector-quantize-pytorch returns another loss with a mask that masks nothing, or raises.
    Here outputs, losses, gradients and what rules learn are the same."""
    found = []
    for mask in (None, torch.ones(MAP) > 0):
        quantizer = seeded(make).train()
        torch.manual_seed(5)
        outs = []

        def losses(x, quantizer=quantizer, mask=mask, outs=outs):
            outs.append(quantizer(x, mask))
            return outs[0].loss + outs[0].quantized.square().sum()

        rules = [rule(quantizer) for rule in RULES.values()] if rules_can_write(quantizer) else []
        moved = gradients(quantizer, maps(quantizer), losses)
        for rule in rules:
            rule.step(outs[0])
        found.append((outs[0].quantized, outs[0].indices, outs[0].terms, moved, state(quantizer)))
    exactly(found[1], found[0])


@every_quantizer
@pytest.mark.parametrize("value", [0.0, 100.0, 1e30], ids=str)
def test_claim_08_what_padding_holds_does_not_matter(make, value):
    """vector-quantize-pytorch lets padding into its diversity loss and into the codes it revives.
    Here outputs, losses, gradients and state are the same whatever padding holds."""
    found, mask = [], some_tokens()
    for content in (1.0, value):
        quantizer = seeded(make).train()
        torch.manual_seed(5)
        outs = []

        def losses(x, quantizer=quantizer, outs=outs):
            outs.append(quantizer(x, mask))
            kept = features_last(quantizer, outs[0].quantized)[mask]
            return outs[0].loss + kept.square().sum()

        rules = [rule(quantizer) for rule in RULES.values()] if rules_can_write(quantizer) else []
        x = filled(quantizer, maps(quantizer), mask, content)
        moved = gradients(quantizer, x, losses)
        for rule in rules:
            rule.step(outs[0])
        assert not features_last(quantizer, moved["x"])[~mask].any()
        found.append((outs[0].indices, outs[0].terms, moved, state(quantizer)))
    exactly(found[1], found[0])


@every_quantizer
@pytest.mark.parametrize("kind", ["all-masked", "empty"])
def test_claim_08_without_a_token_the_loss_is_0_and_nothing_moves(make, kind):
    """vector-quantize-pytorch returns NaN for a batch that is empty or masked as a whole. Here the
    loss is exactly 0, gradients are finite, and codebooks and rules stay as they were."""
    quantizer = make().train()
    rules = [rule(quantizer) for rule in RULES.values()] if rules_can_write(quantizer) else []
    before = [state(module) for module in (quantizer, *rules)]
    x = maps(quantizer, count=0 if kind == "empty" else MAP[0])
    mask = torch.zeros(MAP) > 0 if kind == "all-masked" else None
    outs = []

    def losses(x):
        outs.append(quantizer(x, mask))
        return outs[0].loss + outs[0].quantized.sum()

    moved = gradients(quantizer, x, losses)
    exactly(outs[0].loss.detach(), torch.zeros(()))
    assert all(gradient.isfinite().all() for gradient in moved.values())
    for rule in rules:
        rule.step(outs[0])
    exactly([state(module) for module in (quantizer, *rules)], before)


def hand_written_residual_logits(quantizer, x, indices, temperature):
    rest, logits = x, []
    for number, stage in enumerate(quantizer.stages):
        codes = stage.codebook.weight
        distances = torch.cdist(rest.double(), codes.double()) ** 2
        logits.append(-distances / temperature)
        rest = rest - codes[indices[..., number]]
    return torch.stack(logits, dim=-2)


@pytest.mark.parametrize(
    "make", [residual, lambda: ResidualQuantizer([vq()] * 3)], ids=["own", "shared"]
)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_claim_09_teacher_forced_cross_entropy_is_that_of_a_loop_over_stages(make, temperature):
    """vector-quantize-pytorch raises when a residual quantizer is asked for its index loss, and
    has no temperature. Here logits of given indices are those of a loop over stages, and losses
    take weights for each token."""
    quantizer = make()
    x = maps(quantizer).requires_grad_()
    indices = torch.randint(0, 16, (*MAP, 3))
    logits = quantizer.logits(x, temperature=temperature, indices=indices)
    assert logits.shape == (*MAP, 3, 16)
    expected = hand_written_residual_logits(quantizer, x, indices, temperature).log_softmax(dim=-1)
    assert_close(logits.log_softmax(dim=-1).double(), expected, rtol=1e-4, atol=1e-4)
    weights = torch.rand(indices.shape)
    losses = -expected.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    assert_close(
        index_cross_entropy(logits, indices, weights=weights).double(),
        (weights * losses).sum() / weights.sum(),
        rtol=1e-4,
        atol=1e-5,
    )
    codes = quantizer.stages[0].codebook.weight
    first, chosen, weights = logits[..., 0, :], indices[..., 0], weights[..., 0]
    soft = distance_cross_entropy(first, chosen, codes, weights=weights)
    targets = (-torch.cdist(codes, codes).double().square()).softmax(dim=-1)[chosen]
    by_hand = -(targets * expected[..., 0, :]).sum(dim=-1)
    expected = (weights * by_hand).sum() / weights.sum()
    assert_close(soft.double(), expected, rtol=1e-4, atol=1e-5)


@quantizers_where(has_codes_to_score)
def test_claim_09_scoring_changes_no_state_and_has_the_shape_of_the_indices(make):
    """vector-quantize-pytorch updates its codebook while it scores indices and returns a
    quantized tensor of another shape. Here logits have one more dimension than indices, for every
    layout, and scoring changes nothing."""
    quantizer = make().train()
    before = state(quantizer)
    x = maps(quantizer)
    indices = quantizer.encode(x)
    forced = quantizer.logits(x, indices=indices)
    assert forced.shape == (*indices.shape, quantizer.codebook_size)
    exactly(state(quantizer), before)
    if not has(quantizer, ResidualQuantizer) or quantizer_is_greedy(quantizer):
        exactly(forced, quantizer.logits(x))


def quantizer_is_greedy(quantizer):
    """Left to themselves, logits follow the choice of each stage, not that of a beam."""
    return all(getattr(module, "beam_size", 1) == 1 for module in quantizer.modules())


@every_quantizer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_claim_13_no_result_shares_memory_with_the_state(make, training):
    """vector-quantize-pytorch returns one of its buffers as the loss: adding to it poisons all
    later losses. Here nothing that is returned shares memory with the module."""
    quantizer = make().train(training)
    x = maps(quantizer)
    with torch.no_grad():
        out = quantizer(x)
        results = [*tree_leaves(out), quantizer.encode(x), quantizer.decode(out.indices)]
        if quantizer.codebooks:
            results.append(quantizer.logits(x))
    owned = {
        t.untyped_storage().data_ptr() for t in (*quantizer.parameters(), *quantizer.buffers())
    }
    assert not owned & {result.untyped_storage().data_ptr() for result in results}


@every_quantizer
def test_claim_13_writing_to_a_loss_changes_no_later_loss(make):
    """vector-quantize-pytorch returns what was added to the last loss. Here a loss under
    `no_grad` requires no gradient, and is the same after the last one was written to."""
    quantizer = make().eval()
    x = maps(quantizer)
    with torch.no_grad():
        first = quantizer(x)
        assert not first.loss.requires_grad
        value = first.loss.clone()
        first.loss.add_(1.5)
        for term in first.terms.values():
            term.add_(1.5)
        exactly(quantizer(x).loss, value)


@every_quantizer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_mask
def test_claim_18_one_typed_result_for_all(make, training, mask):
    """vector-quantize-pytorch returns tuples of two to four, losses of several shapes and indices
    of several dtypes. Here every class returns the same fields of the same types in every mode."""
    quantizer = make().train(training)
    out = quantizer(maps(quantizer), mask())
    assert type(out) is QuantizerOutput
    assert (out.loss.shape, out.loss.dtype) == ((), torch.float32)
    assert {(t.shape, t.dtype) for t in out.terms.values()} <= {((), torch.float32)}
    assert out.indices.dtype == torch.int64
    positions = (MAP[0], 21) if has(quantizer, MultiScaleQuantizer) else MAP
    per_token = (quantizer.num_codebooks,) if quantizer.num_codebooks > 1 else ()
    assert out.indices.shape == (*positions, *per_token)
    assert len(out.selections) == len(quantizer.codebooks)


@every_quantizer
def test_claim_18_usage_is_measured_for_all(make):
    """vector-quantize-pytorch has no measure of how its codebook is used. Here one meter takes
    the indices of every quantizer."""
    quantizer = make().eval()
    meter = CodebookUsage(quantizer.codebook_size)
    results = [quantizer(maps(quantizer), mask).indices for mask in (None, some_tokens())]
    for indices in results:
        meter.update(indices)
    every = torch.cat([indices.flatten() for indices in results])
    counts = every[every >= 0].unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    summary = meter.compute()
    assert summary.perplexity == pytest.approx(float((-share * share.log()).sum().exp()))
    assert summary.usage == pytest.approx(len(counts) / quantizer.codebook_size)
    assert summary.dead_codes == quantizer.codebook_size - len(counts)
    assert (summary.num_tokens, summary.skipped_tokens) == (counts.sum(), (every == -1).sum())


WRONG = {
    "features": lambda q, x: (arrange(q, features_last(q, x)[..., :-1]), None),
    "integers": lambda q, x: (x.long(), None),
    "mask-dtype": lambda q, x: (x, torch.ones(MAP)),
    "mask-shape": lambda q, x: (x, torch.ones(MAP[:-1]) > 0),
}


@every_quantizer
@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("call", ["forward", "encode"])
def test_claim_25_wrong_input_names_what_is_wrong(make, spoil, call):
    """vector-quantize-pytorch answers wrong input with errors of einsum or bare assertions. Here
    the error names the argument, what it must be and what it was."""
    quantizer = make()
    x, mask = spoil(quantizer, maps(quantizer))
    pattern = r"^`\w+(\(.*\))?` must (have|be) .*, got .+\."
    with pytest.raises((ValueError, TypeError), match=pattern):
        getattr(quantizer, call)(x, mask)


@every_quantizer
def test_claim_25_wrong_indices_name_what_is_wrong(make):
    """vector-quantize-pytorch fails inside an embedding when indices have a wrong type. Here the
    error says so."""
    quantizer = make()
    message = r"^`indices` must be an integer tensor, got torch\.float32\."
    with pytest.raises(TypeError, match=message):
        quantizer.decode(torch.zeros(3))


def test_claim_25_the_package_is_typed_and_needs_little():
    """vector-quantize-pytorch has no types and needs five packages for its tensor notation and
    logging. Here types are shipped, and beside torch and numpy there are two small ones."""
    assert (files("vqprior") / "py.typed").is_file()
    needed = {re.split(r"[^\w-]", name)[0] for name in requires("vqprior") if "extra" not in name}
    assert needed == {"torch", "einops", "numpy", "typing-extensions"}
