"""Claims on gradients: 3, 12, 14, 20, 22, 23."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.claims.cast import (
    RULES,
    every_quantizer,
    gradients,
    is_pure,
    maps,
    multi_scale,
    quantizers_where,
    residual,
    rules_can_write,
    seeded,
)
from tests.contracts.factories import DIM, projected, simvq, state, vq
from vqprior import (
    BSQ,
    FSQ,
    LFQ,
    ChannelsFirst,
    CodebookEMA,
    CodebookRevival,
    GroupedQuantizer,
    MultiScaleQuantizer,
    ResidualQuantizer,
    TransformedCodebook,
    VectorQuantizer,
)
from vqprior.functional import (
    IndexBackpropagation,
    commitment_loss,
    distance_cross_entropy,
    entropy_loss,
    gram_loss,
    index_cross_entropy,
    orthogonality_loss,
    rotation_trick,
    straight_through,
    symmetric_vq_loss,
)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


LOSSES = {
    "own": lambda q, out, x: out.loss,
    "output": lambda q, out, x: out.quantized.square().sum(),
    "commitment": lambda q, out, x: commitment_loss(out),
    "joint": lambda q, out, x: symmetric_vq_loss(out),
    "gram": lambda q, out, x: gram_loss(out),
}
ON_DISTANCES = {
    "cross-entropy": lambda q, out, x: index_cross_entropy(q.logits(x), out.indices),
    "entropy": lambda q, out, x: entropy_loss(q.logits(x, temperature=2.0)),
    "soft-targets": lambda q, out, x: distance_cross_entropy(
        q.logits(x), out.indices, q.codebook.codes()
    ),
}


@quantizers_where(rules_can_write)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_claim_03_rules_between_forward_and_backward_change_no_gradient(make, loss):
    """vector-quantize-pytorch writes its codebook inside forward, behind the back of autograd:
    gradients of losses on distances are silently wrong. Here a rule may step between forward and
    backward, also between several calls and one backward, and gradients are those of the codebook
    that each call used."""
    found = []
    for step in (False, True):
        quantizer = seeded(make).eval()  # the codebook is the rules' in both runs
        rules = [rule(quantizer) for rule in RULES.values()]
        x = maps(quantizer).requires_grad_()
        out = quantizer(x)
        total = loss(quantizer, out, x)
        if step:
            before = state(quantizer)
            for rule in rules:
                rule.step(out)
            assert any((state(quantizer)[name] != value).any() for name, value in before.items())
        found.append(torch.autograd.grad(total, x)[0])
    exactly(found[1], found[0])


@quantizers_where(rules_can_write)
def test_claim_03_several_forwards_before_one_backward(make):
    """vector-quantize-pytorch with several calls before one backward mixes the codebooks of all
    calls. Here the gradient of each call is that of the codebook it used."""
    quantizer = make().eval()
    rules = [rule(quantizer) for rule in RULES.values()]
    xs = [maps(quantizer, seed).requires_grad_() for seed in range(3)]
    total, expected = 0.0, []
    for x in xs:
        twin = make().eval()
        twin.load_state_dict(quantizer.state_dict())
        twin.requires_grad_(requires_grad=False)
        alone = twin(x)
        expected.append(torch.autograd.grad(alone.loss + alone.quantized.square().sum(), x)[0])
        out = quantizer(x)
        total = total + out.loss + out.quantized.square().sum()
        for rule in rules:
            rule.step(out)
    exactly(list(torch.autograd.grad(total, xs)), expected)


def gradient_or_refusal(total, x):
    try:
        return torch.autograd.grad(total, x)[0]
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("loss", ON_DISTANCES.values(), ids=ON_DISTANCES.keys())
def test_claim_03_losses_on_distances_are_never_silently_wrong(loss, metric):
    """vector-quantize-pytorch silently computes these gradients from the codebook after its
    update. Here they are those of a codebook at rest, or autograd says that codes changed."""
    found = []
    for step in (False, True):
        quantizer = seeded(lambda: vq(metric=metric))
        rules = [rule(quantizer) for rule in RULES.values()]
        x = maps(quantizer).requires_grad_()
        out = quantizer(x)
        total = loss(quantizer, out, x)
        if step:
            for rule in rules:
                rule.step(out)
        found.append(gradient_or_refusal(total, x))
    if isinstance(found[1], str):
        assert metric == "dot"  # the only one whose scores keep the codes as they are
        assert "modified by an inplace operation" in found[1]
    else:
        exactly(found[1], found[0])


class Observed:
    """A training call on the same codes and tokens, and what flows back from its result."""

    def __init__(self, make):
        quantizer = seeded(make)
        torch.manual_seed(5)
        x = maps(quantizer).requires_grad_()
        self.x, self.quantizer, self.out = x, quantizer, quantizer(x)
        learned = [p for p in quantizer.parameters() if p.requires_grad]
        self.gradient, *self.of_codes = torch.autograd.grad(
            self.out.quantized.square().sum(),
            [x, *learned],
            retain_graph=True,
            allow_unused=True,
        )
        self.error = (self.out.quantized - x).square().mean()
        self.terms = {name: term.detach() for name, term in self.out.terms.items()}


def times(term, factor):
    return lambda a, b: torch.equal(b.terms[term], factor * a.terms[term])


def lower(term):
    return lambda a, b: b.terms[term] < a.terms[term]


def has_new(term):
    return lambda a, b: term not in a.terms and term in b.terms


def best_cosine(a, b):
    codes = b.quantizer.codebook.codes()
    best = F.cosine_similarity(b.x.unsqueeze(-2), codes, dim=-1).argmax(dim=-1)
    return torch.equal(b.out.indices, best) and not torch.equal(a.out.indices, best)


def gains(a, b):
    """A rotation keeps lengths: what changes them is |code| / |x|."""
    gain = b.out.quantized.norm(dim=-1) / b.x.norm(dim=-1)
    expected = a.gradient.norm(dim=-1) * gain
    return torch.allclose(b.gradient.norm(dim=-1), expected, rtol=1e-4)


def doubled(codes, position):
    return 2 * codes


BITS = {"batch_entropy_weight": 0.0, "sample_entropy_weight": 0.0, "commitment_weight": 0.0}


def lfq(kind=LFQ, bits=DIM, **options):
    return kind(bits, **BITS | options)


# What is changed, from what, and how the result must change.
OPTIONS = {
    "commitment_weight": (vq, lambda: vq(commitment_weight=1.0), times("commitment", 4)),
    "codebook_weight": (vq, lambda: vq(codebook_weight=0.5), times("codebook", 0.5)),
    "metric": (vq, lambda: vq(metric="cosine"), best_cosine),
    "rotation_trick": (vq, lambda: vq(estimator=rotation_trick), gains),
    "index_backpropagation": (
        vq,
        lambda: vq(estimator=IndexBackpropagation()),
        lambda a, b: a.of_codes == [None] and b.of_codes[0].any(dim=1).all(),
    ),
    "index_backpropagation-temperature": (
        lambda: vq(estimator=IndexBackpropagation()),
        lambda: vq(estimator=IndexBackpropagation(temperature=9.0)),
        lambda a, b: not torch.equal(a.of_codes[0], b.of_codes[0]),
    ),
    "codebook": (
        vq,
        simvq,
        lambda a, b: not a.quantizer.codebook.weight.equal(b.quantizer.codebook.codes()),
    ),
    "residual-dropout": (
        residual,
        lambda: residual(dropout=1.0),
        lambda a, b: (a.out.indices >= 0).all() and (b.out.indices[..., -1] == -1).any(),
    ),
    "residual-beam_size": (
        residual, lambda: residual(beam_size=4), lambda a, b: b.error < a.error
    ),
    "residual-estimator": (
        residual, lambda: residual(estimator=rotation_trick), gains
    ),
    "multi-scale-scales": (
        multi_scale,
        lambda: MultiScaleQuantizer(vq(), scales=(1, 4)),
        lambda a, b: (a.out.indices.shape[1], b.out.indices.shape[1]) == (21, 17),
    ),
    "multi-scale-refine": (
        multi_scale,
        lambda: multi_scale(refine=doubled),
        lambda a, b: not torch.equal(a.out.quantized, b.out.quantized),
    ),
    "multi-scale-commitment_weight": (
        lambda: multi_scale(vq(commitment_weight=0.0)),
        lambda: multi_scale(vq(commitment_weight=0.0), commitment_weight=1.0),
        has_new("commitment"),
    ),
    "multi-scale-codebook_weight": (
        lambda: multi_scale(vq(codebook_weight=0.0)),
        lambda: multi_scale(vq(codebook_weight=0.0), codebook_weight=1.0),
        has_new("codebook"),
    ),
    "fsq-levels": (
        lambda: FSQ([3] * DIM), lambda: FSQ([9] * DIM),
        lambda a, b: b.out.quantized.unique().numel() == 9 > a.out.quantized.unique().numel(),
    ),
    "fsq-symmetric": (
        lambda: FSQ([4] * DIM),
        lambda: FSQ([4] * DIM, symmetric=True),
        lambda a, b: (a.out.quantized == 0).any() and not (b.out.quantized == 0).any(),
    ),
    "binary-commitment_weight": (
        lfq, lambda: lfq(commitment_weight=1.0), has_new("commitment")
    ),
    "binary-sample_entropy_weight": (
        lambda: lfq(sample_entropy_weight=1.0, temperature=4.0),
        lambda: lfq(sample_entropy_weight=2.0, temperature=4.0),
        times("entropy", 2),
    ),
    "binary-batch_entropy_weight": (
        lambda: lfq(batch_entropy_weight=1.0), lambda: lfq(batch_entropy_weight=2.0),
        times("entropy", 2),
    ),
    "binary-temperature": (
        lambda: lfq(BSQ, sample_entropy_weight=1.0),
        lambda: lfq(BSQ, sample_entropy_weight=1.0, temperature=0.1),
        lower("entropy"),
    ),
    "binary-group_size": (
        # Entropies of parts add up to no less than that of the whole, and count negatively.
        lambda: lfq(batch_entropy_weight=1.0),
        lambda: lfq(batch_entropy_weight=1.0, group_size=1),
        lower("entropy"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "change", "changes"), OPTIONS.values(), ids=OPTIONS.keys())
def test_claim_12_every_option_changes_the_result(make, change, changes):
    """vector-quantize-pytorch has options without any effect: an orthogonal loss that the moving
    average erases, a straight-through that is discarded. Here each changes the result, and in the
    direction that it promises."""
    assert changes(Observed(make), Observed(change))


def moved_by(rule, quantizer=vq, steps=1, scale=1.0):
    quantizer = seeded(quantizer)
    start, learner = quantizer.codebook.codes().detach().clone(), rule(quantizer)
    for seed in range(steps):
        learner.step(quantizer(scale * maps(quantizer, seed)))
    return quantizer.codebook.codes().detach() - start


def test_claim_12_every_option_of_a_rule_changes_the_result():
    """vector-quantize-pytorch has options that change nothing in some combinations. Here each
    option of a rule is seen to act."""
    slow, fast = (moved_by(functools.partial(CodebookEMA, decay=d)) for d in (0.99, 0.5))
    assert (slow.norm(dim=1) <= fast.norm(dim=1)).all()
    assert slow.norm() < 0.5 * fast.norm()
    smooth = moved_by(functools.partial(CodebookEMA, decay=0.5, eps=1.0))
    assert not torch.equal(smooth, fast)

    def revived(**options):
        options = {"threshold": 0.5, "patience": 2.0} | options
        rule = functools.partial(CodebookRevival, **options)
        return moved_by(rule, scale=10.0)  # codes of length 1: only some reach that far

    moved = revived().any(dim=1)
    assert moved.any()
    assert not revived(threshold=0.0).any()
    assert not revived(patience=100.0).any()
    assert not torch.equal(revived(seed=1), revived())
    assert revived(threshold=0.9).any(dim=1).sum() >= moved.sum()


@every_quantizer
def test_claim_12_every_parameter_gets_a_gradient(make):
    """vector-quantize-pytorch has parameters, such as the values of LatentQuantize, that no loss
    ever reaches. Here one training step reaches all that require a gradient."""
    quantizer = make().train()
    learned = {name for name, p in quantizer.named_parameters() if p.requires_grad}
    found = gradients(
        quantizer, maps(quantizer), lambda x: (o := quantizer(x)).loss + o.quantized.square().sum()
    )
    assert set(found) == learned | {"x"}
    assert all(gradient.any() for gradient in found.values())


def test_claim_12_an_orthogonality_loss_acts_or_raises():
    """vector-quantize-pytorch lets the moving average undo what its orthogonal loss did. Here the
    loss lowers itself where the codebook learns by gradient, and raises where a rule owns it."""
    quantizer = vq()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    losses = []
    for _ in range(20):
        quantizer(maps(quantizer))  # a call does not move the codes back
        loss = orthogonality_loss(quantizer.codebook.codes())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(after < before for before, after in itertools.pairwise(losses))
    CodebookEMA(quantizer)
    with pytest.raises(ValueError, match="gradient"):
        orthogonality_loss(quantizer.codebook.codes())


IMPOSSIBLE = {
    "rules-of-computed-codes": lambda: CodebookEMA(simvq()),
    "rules-without-a-codebook": lambda: CodebookRevival(FSQ([3, 3])),
    "beam-without-a-ranking": lambda: ResidualQuantizer([LFQ(4)], beam_size=2),
    "stages-of-unequal-size": lambda: ResidualQuantizer([vq(d=2), vq(d=3)]),
    "scales-of-scales": lambda: multi_scale(multi_scale()),
    "groups-of-scales": lambda: GroupedQuantizer([multi_scale()]),
    "a-refinement-that-cannot-learn": lambda: multi_scale(refine=nn.Linear(DIM, DIM)),
    "a-codebook-of-another-size": lambda: VectorQuantizer(3, 8, codebook=vq().codebook),
    "a-module-that-drops-codes": lambda: TransformedCodebook(vq().codebook, nn.Flatten(0)),
}


@pytest.mark.parametrize("combine", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_claim_12_impossible_combinations_raise_when_they_are_built(combine):
    """vector-quantize-pytorch accepts combinations in which an option is ignored. Here a
    combination that cannot work raises in the constructor, with a way out."""
    with pytest.raises((ValueError, TypeError), match=r"must .*got"):
        combine()


@quantizers_where(is_pure)
def test_claim_14_activation_checkpointing_changes_nothing(make):
    """vector-quantize-pytorch updates its codebook a second time when a checkpointed forward is
    computed again, and returns other gradients. Here state and gradients are those of the plain
    run, with rules stepped once by hand."""
    found = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        quantizer = seeded(make)
        torch.manual_seed(5)
        outs = []

        def call(x, quantizer=quantizer, outs=outs):
            outs.append(quantizer(x))
            return outs[-1].quantized.square().sum() + outs[-1].loss

        rules = [rule(quantizer) for rule in RULES.values()] if rules_can_write(quantizer) else []
        moved = gradients(quantizer, maps(quantizer), lambda x, run=run, call=call: run(call, x))
        for rule in rules:
            rule.step(outs[0])
        found.append((len(outs), moved, state(quantizer), [state(rule) for rule in rules]))
    assert [count for count, *_ in found] == [1, 2]
    exactly(found[1][1:], found[0][1:])


ESTIMATORS = {
    "straight_through": straight_through,
    "rotation_trick": rotation_trick,
    "rotation_trick-bounded": functools.partial(rotation_trick, max_gain=1.0),
    "index_backpropagation": IndexBackpropagation(),
    "reinmax": IndexBackpropagation("reinmax"),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_claim_20_the_value_is_the_code_whatever_the_estimator(estimator, training):
    """vector-quantize-pytorch returns 0 in place of the code for a token at the origin, and codes
    that differ in the last bits with and without a gradient. Here the value is the code, bit for
    bit."""
    quantizer = vq(estimator=estimator).train(training)
    x = maps(quantizer)
    x[0, 0] = 0.0
    x[0, 1] *= 1e-20
    for tokens in (x, x.clone().requires_grad_()):
        out = quantizer(tokens)
        exactly(out.quantized.detach(), quantizer.codebook.weight[out.indices].detach())


def test_claim_20_the_default_is_straight_through():
    """vector-quantize-pytorch rotates gradients unless it is told not to. Here the default is the
    identity."""
    for quantizer in (vq(), residual(), ResidualQuantizer([vq(estimator=rotation_trick)])):
        x = maps(quantizer).requires_grad_()
        weight = torch.randn_like(x)
        exactly(torch.autograd.grad((quantizer(x).quantized * weight).sum(), x)[0], weight)


@pytest.mark.parametrize("max_gain", [None, 1.0, 3.0])
def test_claim_20_rotated_gradients_are_finite_and_bounded(max_gain):
    """vector-quantize-pytorch multiplies the gradient of a short token by a thousand and more.
    Here it is finite for every token, and `max_gain` bounds the factor."""
    codes = F.normalize(torch.randn(6, DIM), dim=1)
    x = torch.stack(
        [torch.zeros(DIM), -codes[1], -codes[2] * 1e-3, codes[3] * 1e-3, codes[4], torch.randn(DIM)]
    ).requires_grad_()
    weight = torch.randn_like(x)
    quantized = rotation_trick(x, codes, max_gain=max_gain)
    (gradient,) = torch.autograd.grad((quantized * weight).sum(), x)
    assert gradient.isfinite().all()
    gain = gradient.norm(dim=1) / weight.norm(dim=1)
    unbounded = torch.where(x.norm(dim=1) > 0, codes.norm(dim=1) / x.norm(dim=1), 1.0)
    bounded = unbounded.clamp_max(math.inf if max_gain is None else max_gain)
    assert_close(gain, bounded.detach(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_claim_22_gradients_are_those_of_the_paper(beta, weight):
    """vector-quantize-pytorch has one weight for both losses of a codebook that learns by
    gradient, and can run an optimizer inside forward. Here each loss has its weight, gradients on
    tokens and codes are those of the equations, and a call moves nothing."""
    quantizer = vq(commitment_weight=beta, codebook_weight=weight)
    codes = quantizer.codebook.weight
    x = maps(quantizer).requires_grad_()
    before = state(quantizer)
    out = quantizer(x)
    exactly(state(quantizer), before)
    of_output = torch.randn_like(x)
    ((out.quantized * of_output).sum() + out.loss).backward()
    difference = (x - codes[out.indices]).detach()
    expected = torch.zeros_like(codes).index_add_(
        0, out.indices.flatten(), -2 * weight * difference.flatten(0, -2) / x.numel()
    )
    assert_close(x.grad, of_output + 2 * beta * difference / x.numel())
    assert_close(torch.zeros_like(codes) if codes.grad is None else codes.grad, expected)
    exactly(state(quantizer), before)


PROJECTED = {
    "projected": lambda: projected(vq(d=2)),
    "rotation": lambda: projected(vq(d=2, estimator=rotation_trick)),
    "index-backpropagation": lambda: projected(vq(d=2, estimator=IndexBackpropagation())),
    "fsq": lambda: projected(FSQ([5, 3])),
    "bsq": lambda: projected(BSQ(6)),
    "residual-inside": lambda: projected(ResidualQuantizer([vq(d=3), vq(d=3)])),
    "residual-outside": lambda: ResidualQuantizer([projected(vq(d=2)), projected(vq(d=3))]),
    "grouped": lambda: GroupedQuantizer([projected(vq(d=2), 2), projected(vq(d=1), 2)]),
    "multi-scale": lambda: multi_scale(projected(vq(d=2)), codebook_weight=1.0),
    "channel-first": lambda: ChannelsFirst(projected(vq(d=2))),
    "without-losses": lambda: projected(vq(d=2, commitment_weight=0.0, codebook_weight=0.0)),
}


@pytest.mark.parametrize("make", PROJECTED.values(), ids=PROJECTED.keys())
def test_claim_23_projections_learn_whether_or_not_the_input_has_a_gradient(make):
    """vector-quantize-pytorch looks at the module's input to decide whether to pass a gradient:
    with frozen features its projection never learns from the reconstruction. Here parameters get
    the same gradient either way."""
    found = []
    for requires_grad in (True, False):
        quantizer = seeded(make)
        out = quantizer(maps(quantizer).requires_grad_(requires_grad))
        (out.quantized.square().sum() + out.loss).backward()
        found.append({name: p.grad for name, p in quantizer.named_parameters()})
    assert {name for name, gradient in found[0].items() if gradient is not None} >= {
        name for name in found[0] if "down" in name or "up" in name
    }
    exactly(found[1], found[0])
