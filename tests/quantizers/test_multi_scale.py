"""`MultiScaleQuantizer`: all laws for its own layout of indices, and VAR's algorithm."""

import copy
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.contracts.factories import state
from tests.contracts.observers import LargestTensor, NoHostSync, watching
from vqprior import (
    BSQ,
    FSQ,
    LFQ,
    ChannelsFirst,
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    GroupedQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    RequireFinite,
    ResidualQuantizer,
    SelfUpdating,
    TextureQuantizer,
    VectorQuantizer,
)
from vqprior.functional import IndexBackpropagation, _softmax_gradient
from vqprior.functional._kernels import _search_blocks
from vqprior.nn import ScaleRefinement

SIZES = {1: [(1,), (3,), (6,)], 2: [(1, 1), (2, 1), (2, 3), (4, 5)], 3: [(1, 1, 1), (2, 3, 2)]}


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def vq(d=4, k=16, **options):
    return VectorQuantizer(d, k, **options)


def refined(**options):
    refine = ScaleRefinement(4, 2)
    return MultiScaleQuantizer(vq(), SIZES[2], refine=refine, codebook_weight=1.0, **options)


MAKERS = {
    "1d": lambda: MultiScaleQuantizer(vq(), SIZES[1]),
    "2d": lambda: MultiScaleQuantizer(vq(), SIZES[2]),
    "3d": lambda: MultiScaleQuantizer(vq(), SIZES[3]),
    "one-scale": lambda: MultiScaleQuantizer(vq(), (3,)),
    "equal-scales": lambda: MultiScaleQuantizer(vq(), (3, 3)),
    "weights": lambda: MultiScaleQuantizer(
        vq(commitment_weight=0.0, codebook_weight=0.0),
        SIZES[2],
        commitment_weight=0.25,
        codebook_weight=1.0,
    ),
    "refine": refined,
    "taken-over": lambda: taken_over(refined(commitment_weight=0.25)),
    "cosine": lambda: MultiScaleQuantizer(vq(metric="cosine"), SIZES[2]),
    "ibq": lambda: MultiScaleQuantizer(
        vq(metric="dot", estimator=IndexBackpropagation()), SIZES[2]
    ),
    "residual": lambda: MultiScaleQuantizer(ResidualQuantizer([vq(), vq(k=5)]), SIZES[2]),
    "grouped": lambda: MultiScaleQuantizer(GroupedQuantizer([vq(d=3), FSQ([4])]), SIZES[2]),
    "projected": lambda: MultiScaleQuantizer(
        ProjectedQuantizer(vq(d=2), nn.Linear(4, 2), nn.Linear(2, 4)), SIZES[2], codebook_weight=1.0
    ),
    "fsq": lambda: MultiScaleQuantizer(FSQ([8, 5, 2, 7], symmetric=True), SIZES[2]),
    "lfq": lambda: MultiScaleQuantizer(LFQ(4), SIZES[2]),
    "bsq": lambda: MultiScaleQuantizer(BSQ(4), SIZES[2]),
    "self-updating": lambda: MultiScaleQuantizer(self_updating(vq()), SIZES[2]),
}


def taken_over(quantizer):
    CodebookEMA(quantizer)
    return quantizer


def self_updating(quantizer):
    return SelfUpdating(quantizer, CodebookEMA(quantizer, decay=0.9))


every_scale = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def makers_where(applies):
    chosen = {name: make for name, make in MAKERS.items() if applies(make())}
    return pytest.mark.parametrize("make", chosen.values(), ids=chosen.keys())


def is_pure(quantizer):
    return not any(isinstance(module, SelfUpdating) for module in quantizer.modules())


every_pure = makers_where(is_pure)
compiled = ("1d", "2d", "3d", "refine", "ibq", "residual", "projected", "fsq", "self-updating")
every_compiled = pytest.mark.parametrize("make", [MAKERS[name] for name in compiled], ids=compiled)
every_learned = makers_where(lambda quantizer: quantizer.codebooks)


def draw(quantizer, leading=(3,), *, seed=0, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (*leading, *quantizer.scales[-1], quantizer.dim)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def draw_mask(quantizer, leading=(3,)):
    """Whole cells of the smaller scales are masked too, and a whole map."""
    mask = torch.rand(*leading, *quantizer.scales[-1]) > 0.4
    mask[0, 0] = False
    mask[-1] = False
    return mask


# Law 1: the value.


@every_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", [False, True], ids=["module-float32", "module-cast"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_decode_returns_what_forward_returned(make, dtype, cast, masked):
    """At masked positions too, where the scales that cover them still speak."""
    quantizer = make().eval()
    quantizer = quantizer.to(dtype) if cast else quantizer
    x = draw(quantizer, dtype=dtype)
    mask = draw_mask(quantizer) if masked else None
    out = quantizer(x, mask)
    exactly(quantizer.decode(out.indices).to(dtype), out.quantized)
    exactly(quantizer.encode(x, mask), out.indices)
    exactly(quantizer.quantize_as(x, out.indices).quantized, out.quantized)
    assert out.loss.dtype == torch.float32


def test_no_index_of_encode_differs_from_forward_in_many_maps():
    """The remainder is rounded in one way, whoever asks."""
    quantizer = MultiScaleQuantizer(vq(k=512), (1, 2, 3, 5, 8))
    x = draw(quantizer, (100,))
    out = quantizer(x)
    exactly(quantizer.encode(x), out.indices)
    exactly(quantizer.logits(x, indices=out.indices), quantizer.logits(x))


@every_scale
def test_sizes_and_shapes(make):
    quantizer = make().eval()
    counts = [torch.Size(scale).numel() for scale in quantizer.scales]
    out = quantizer(draw(quantizer, (2, 3)))
    last = () if quantizer.num_codebooks == 1 else (quantizer.num_codebooks,)
    assert out.indices.shape == (2, 3, sum(counts), *last)
    assert out.indices.dtype == torch.int64
    assert len(out.selections) == len(quantizer.codebooks)
    expected = quantizer.quantizer.bits_per_token * sum(counts) / counts[-1]
    assert quantizer.bits_per_token == pytest.approx(expected)
    assert quantizer.codebook_sizes == quantizer.quantizer.codebook_sizes
    assert not quantizer.has_index_per_token
    exactly(out.loss, sum(out.terms.values(), torch.zeros(())))


@every_scale
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0), (2, 1, 2)])
def test_leading_dimensions_are_batch_dimensions(make, leading):
    quantizer = make().eval()
    x = draw(quantizer, leading)
    flat = x.reshape(torch.Size(leading).numel(), *x.shape[len(leading) :])
    out, expected = quantizer(x), quantizer(flat)
    exactly(out.quantized, expected.quantized.reshape(x.shape))
    exactly(out.indices, expected.indices.reshape(out.indices.shape))
    exactly(out.terms, expected.terms)
    exactly(quantizer.decode(out.indices), out.quantized)
    exactly(quantizer.encode(x), out.indices)


# Law 2: purity.


@every_scale
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_calls_change_no_state(make, training):
    quantizer = make().train(training)
    if training and not is_pure(quantizer):
        return
    before, versions = state(quantizer), [p._version for p in quantizer.parameters()]
    x, rng = draw(quantizer), torch.get_rng_state()
    given = x.clone()
    quantizer.decode(quantizer(x).indices)
    assert not quantizer.encode(x.requires_grad_()).requires_grad
    exactly(state(quantizer), before)
    exactly(x.detach(), given)
    assert [p._version for p in quantizer.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), rng)


# Law 3: the gradient.


@every_scale
def test_the_gradient_of_quantized_is_the_identity_where_positions_count(make):
    quantizer = make().eval()
    x, weight = draw(quantizer).requires_grad_(), torch.randn(draw(quantizer).shape)
    mask = draw_mask(quantizer)
    quantized = quantizer(x).quantized
    exactly(torch.autograd.grad((weight * quantized).sum(), x)[0], weight)
    quantized = quantizer(x, mask).quantized
    expected = weight * mask.unsqueeze(-1)
    exactly(torch.autograd.grad((weight * quantized).sum(), x)[0], expected)


def test_quantized_moves_neither_codes_nor_refine():
    quantizer = refined()
    quantizer(draw(quantizer).requires_grad_()).quantized.sum().backward()
    assert all(p.grad is None for p in quantizer.parameters())


# Law 4: masks.


def run(quantizer, x, mask):
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    out = quantizer(x, mask)
    (out.loss + out.quantized.square().sum()).backward()
    gradients = {n: p.grad for n, p in quantizer.named_parameters() if p.grad is not None}
    return out, x.grad, gradients


@every_scale
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38, 0.0], ids=str)
def test_what_masked_positions_hold_does_not_matter(make, value):
    quantizer = make().eval()
    x, mask = draw(quantizer), draw_mask(quantizer)
    expected, expected_grad, expected_params = run(quantizer, x, mask)
    x[~mask] = value
    out, grad, params = run(quantizer, x, mask)
    exactly(out.quantized, expected.quantized)
    exactly(out.indices, expected.indices)
    exactly(out.terms, expected.terms)
    for ours, theirs in zip(out.selections, expected.selections, strict=True):
        exactly(vars(ours), vars(theirs))
    exactly(grad, expected_grad)
    exactly(params, expected_params)
    assert not grad[~mask].any()
    if value != value:  # one feature that is not finite masks a position by itself
        exactly(quantizer(x).indices, expected.indices)
        exactly(quantizer(x).terms, expected.terms)


@every_scale
def test_positions_that_only_masked_ones_cover_have_no_index(make):
    quantizer = make().eval()
    mask = draw_mask(quantizer)
    indices = quantizer(draw(quantizer), mask).indices.reshape(3, -1, quantizer.num_codebooks)
    start = 0
    for scale in quantizer.scales:
        count = torch.Size(scale).numel()
        named = indices[:, start : start + count, 0] >= 0
        covered = F.adaptive_max_pool3d(
            mask.float().reshape(3, *[1] * (3 - len(scale)), *mask.shape[1:]),
            (*[1] * (3 - len(scale)), *scale),
        )
        exactly(named, covered.flatten(1) > 0)
        start += count


@every_scale
def test_an_all_true_mask_is_no_mask(make):
    quantizer = make().eval()
    x = draw(quantizer)
    out, expected = quantizer(x, torch.ones(x.shape[:-1]) > 0), quantizer(x)
    exactly(out.quantized, expected.quantized)
    exactly(out.indices, expected.indices)
    exactly(out.terms, expected.terms)


@every_scale
@pytest.mark.parametrize("kind", ["all-masked", "empty", "all-nan"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_a_position_the_loss_is_0_and_gradients_are_finite(make, kind, training):
    quantizer = make().train(training)
    before = state(quantizer)
    x = draw(quantizer, (0 if kind == "empty" else 3,))
    x = torch.full_like(x, torch.nan) if kind == "all-nan" else x
    x.requires_grad_()
    mask = torch.zeros(x.shape[:-1]) > 0 if kind == "all-masked" else None
    out = quantizer(x, mask)
    exactly(out.loss, torch.zeros(()))
    exactly(quantizer.decode(out.indices), out.quantized)
    (out.loss + out.quantized.sum()).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in quantizer.parameters())
    exactly(state(quantizer), before)


@every_scale
def test_a_masked_map_leaves_the_others_alone(make):
    quantizer = make().eval()
    x, mask = draw(quantizer), torch.ones(3, *make().scales[-1]) > 0
    mask[1] = False
    out, alone = quantizer(x, mask), quantizer(x[[0, 2]])
    exactly(out.indices[[0, 2]], alone.indices)
    exactly(out.quantized[[0, 2]], alone.quantized)
    assert_close(out.terms, alone.terms)
    assert (out.indices[1] == -1).all()


def test_a_map_that_covers_a_part_is_averaged_over_that_part():
    """A cell's mean is that of what counts in it; the corner that does not cannot pull."""
    codes = EmbeddingCodebook.from_codes(torch.tensor([[1.0], [3.0], [100.0]]))
    quantizer = MultiScaleQuantizer(vq(1, 3, codebook=codes), (1, 2))
    x = torch.tensor([[[1.0], [3.0]], [[2.0], [1e6]]])
    mask = torch.tensor([[True, True], [True, False]])
    out = quantizer(x, mask)
    exactly(out.selections[0].inputs.flatten(), torch.tensor([2.0]))
    assert out.indices[0].item() in (0, 1)
    assert out.indices[4].item() == -1


# Law 5: precision.


@every_scale
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(make, low):
    quantizer = make().eval()
    x, mask = draw(quantizer), draw_mask(quantizer)
    expected = quantizer(x, mask)
    with torch.autocast("cpu", dtype=low):
        out = quantizer(x, mask)
        encoded, decoded = quantizer.encode(x, mask), quantizer.decode(expected.indices)
    exactly(out.indices, expected.indices)
    exactly(encoded, expected.indices)
    exactly(out.quantized, expected.quantized)
    exactly(decoded, expected.quantized)
    exactly(out.terms, expected.terms)


def test_half_precision_maps_are_averaged_in_float32():
    """A mean of values around 1000 in half precision would choose other codes."""
    quantizer = MultiScaleQuantizer(vq(k=64), (1, 2, 16))
    quantizer.quantizer.codebook.weight.data += 1000
    x = (1000 + draw(quantizer, scale=1.0)).half()
    exactly(quantizer(x).indices, quantizer(x.float()).indices)


# Law 6: memory, synchronization, compilation.


@every_pure
def test_nothing_of_size_n_by_k_is_stored(make, monkeypatch):
    monkeypatch.setattr(_search_blocks, "_MAX_BLOCK_ENTRIES", 512)
    monkeypatch.setattr(_softmax_gradient, "_MAX_BLOCK_ENTRIES", 512)
    quantizer = make()
    x = draw(quantizer, (40,)).requires_grad_()
    with watching(LargestTensor()) as largest:
        out = quantizer(x)
        (out.loss + out.quantized.sum()).backward()
    # All maps with a column for what counts; or, of one scale, entropies of 4 bits; or weights.
    assert largest.numel <= max(40 * (x[0].numel() // quantizer.dim) * 5, 512)


@every_scale
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_waits_for_the_device(make, training):
    quantizer = make().train(training)
    x, mask = draw(quantizer).requires_grad_(), draw_mask(quantizer)
    with watching(NoHostSync()):
        out = quantizer(x, mask)
        (out.loss + out.quantized.sum()).backward()
        quantizer.decode(quantizer.encode(x, mask))


@pytest.mark.slow
@every_compiled
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(make, training):
    torch.compiler.reset()
    quantizer, twin = make().train(training), make().train(training)
    twin.load_state_dict(quantizer.state_dict())
    x, mask = draw(quantizer).requires_grad_(), draw_mask(quantizer)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    results = []
    for each in (compiled, twin):
        results.append(each(x, mask))
        (results[-1].loss + results[-1].quantized.square().sum()).backward()
    for name in ("quantized", "indices", "loss", "terms"):
        assert_close(getattr(results[0], name), getattr(results[1], name))
    for ours, theirs in zip(quantizer.parameters(), twin.parameters(), strict=True):
        none = torch.zeros_like(ours)  # a graph returns zeros where eager has no gradient
        assert_close(*(none if p.grad is None else p.grad for p in (ours, theirs)))


@pytest.mark.slow
@every_compiled
def test_exports_with_a_free_batch_size(make):
    quantizer = make().eval()
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(quantizer, (draw(quantizer),), dynamic_shapes=shapes)
    x = draw(quantizer, (7,), seed=1)
    exactly(program.module()(x).indices, quantizer(x).indices)
    exactly(program.module()(x).quantized, quantizer(x).quantized)


# Law 8: state.


@every_scale
@pytest.mark.parametrize("clone", [lambda q: pickle.loads(pickle.dumps(q)), copy.deepcopy])
def test_copies_are_whole(make, clone):
    quantizer = make().eval()
    twin = clone(quantizer)
    x = draw(quantizer)
    exactly(twin(x).quantized, quantizer(x).quantized)
    exactly(twin(x).terms, quantizer(x).terms)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in quantizer.parameters()}


@every_scale
def test_a_state_loads_strictly_and_gives_the_same(make):
    quantizer, other = make().eval(), make().eval()
    other.load_state_dict(quantizer.state_dict())
    x = draw(quantizer)
    exactly(other(x).quantized, quantizer(x).quantized)


# Rules.


@every_learned
def test_one_step_of_the_average_for_the_uses_of_all_scales(make):
    quantizer = make().eval()
    codebook = quantizer.codebooks[0]
    ema = CodebookEMA(quantizer, decay=0.5, eps=0.0)
    out = quantizer(draw(quantizer, (8,)))
    before, of_first = (
        codebook.codes().detach().clone(),
        out.selections[:: len(quantizer.quantizer.codebooks)],
    )
    ema.step(out)
    inputs = torch.cat([s.inputs.detach()[s.mask] for s in of_first])
    indices = torch.cat([s.indices[s.mask] for s in of_first])
    for j in range(codebook.num_codes):
        mine = inputs[indices == j].double()
        expected = (0.5 * before[j] + 0.5 * mine.sum(dim=0)) / (0.5 + 0.5 * len(mine))
        expected = expected if len(mine) else before[j].double()
        assert_close(codebook.codes()[j].double(), expected, rtol=1e-4, atol=1e-5)


def test_revival_moves_unused_codes_onto_inputs_of_any_scale():
    inner = vq()
    inner.codebook.weight.data[1:] += 1000
    quantizer = MultiScaleQuantizer(inner, SIZES[2])
    out = quantizer(draw(quantizer, (20,)))
    CodebookRevival(quantizer, patience=1.0).step(out)
    inputs = torch.cat([s.inputs.reshape(-1, 4) for s in out.selections])
    for code in inner.codebook.weight[1:]:
        assert (inputs == code).all(dim=1).any()
    assert len(quantizer.codebooks) == len(SIZES[2])


@every_learned
def test_self_updating_outside(make):
    quantizer = make().eval()
    codebook = quantizer.codebooks[0]
    updating = SelfUpdating(quantizer, CodebookEMA(quantizer, decay=0.5))
    before, x = codebook.codes().detach().clone(), draw(quantizer)
    assert not updating.has_index_per_token
    exactly(updating.eval()(x).quantized, quantizer(x).quantized)
    exactly(codebook.codes().detach(), before)
    updating.train()(x)
    assert (codebook.codes() != before).any()


# Wrappers.


@every_scale
def test_channel_first_is_a_change_of_layout(make):
    quantizer = make().eval()
    maps = ChannelsFirst(quantizer)
    x, mask = draw(quantizer), draw_mask(quantizer)
    out, expected = maps(x.movedim(-1, 1), mask), quantizer(x, mask)
    exactly(out.quantized, expected.quantized.movedim(-1, 1))
    exactly(out.indices, expected.indices)
    exactly(out.terms, expected.terms)
    exactly(maps.decode(out.indices), out.quantized)
    exactly(maps.encode(x.movedim(-1, 1), mask), out.indices)
    exactly(maps.quantize_as(x.movedim(-1, 1), out.indices).indices, out.indices)
    assert maps.bits_per_token == quantizer.bits_per_token
    assert not maps.has_index_per_token


@every_scale
def test_texture_on_feature_maps(make):
    quantizer = make().eval()
    tvq = TextureQuantizer(ChannelsFirst(quantizer))
    texture, structure = draw(quantizer).movedim(-1, 1), draw(quantizer, seed=1).movedim(-1, 1)
    out = tvq(texture, structure)
    expected = quantizer((texture - structure).movedim(1, -1))
    exactly(out.quantized, structure + expected.quantized.movedim(-1, 1))
    exactly(out.indices, expected.indices)
    exactly(tvq.decode(out.indices, structure), out.quantized)
    exactly(tvq.encode(texture, structure), out.indices)


# VAR's algorithm.


class Phi(nn.Module):
    """A refinement that depends on the position, unlike for each feature."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 4)

    def forward(self, codes, position):
        return codes + (1 + position) * codes @ self.weight


def algorithm_1(x, codes, phi, sizes):
    """Tian et al., algorithm 1, with the losses of section 3.2; channels first, one map."""
    f = x.permute(2, 0, 1)
    total = torch.zeros_like(f)
    indices, commitment, codebook = [], 0.0, 0.0
    for number, (h, w) in enumerate(sizes):
        rest = (f - total).detach()
        small = F.interpolate(rest[None], size=(h, w), mode="area")[0]
        distances = (small.permute(1, 2, 0).reshape(-1, 1, 4) - codes).square().sum(dim=-1)
        chosen = distances.argmin(dim=1)
        indices.append(chosen)
        z = codes[chosen].reshape(h, w, 4).permute(2, 0, 1)
        if number < len(sizes) - 1:
            z = F.interpolate(z[None], size=f.shape[1:], mode="bicubic", align_corners=False)[0]
        z = phi(z.permute(1, 2, 0), number / (len(sizes) - 1)).permute(2, 0, 1)
        total = total + z
        commitment = commitment + (f - total.detach()).square().mean() / len(sizes)
        codebook = codebook + (f.detach() - total).square().mean() / len(sizes)
    return torch.cat(indices), total.permute(1, 2, 0), commitment, codebook


def var(scales, refine):
    inner = vq(commitment_weight=0.0, codebook_weight=0.0).double()
    options = {"commitment_weight": 0.25, "codebook_weight": 0.5}
    return MultiScaleQuantizer(inner, scales, refine=refine, **options)


@pytest.mark.parametrize("scales", [(1, 2, 3, 5), ((1, 2), (3, 2), (3, 7)), (4, 4)])
def test_equals_an_independent_implementation(scales):
    phi = Phi().double()
    quantizer = var(scales, phi)
    x = torch.randn(2, *quantizer.scales[-1], 4, dtype=torch.float64, requires_grad=True)
    codes = quantizer.quantizer.codebook.weight
    each = [algorithm_1(map_, codes, phi, quantizer.scales) for map_ in x]
    out = quantizer(x)
    exactly(out.indices, torch.stack([indices for indices, *_ in each]))
    assert_close(out.quantized, torch.stack([total for _, total, _, _ in each]))
    commitment = 0.25 * (each[0][2] + each[1][2]) / 2
    codebook = 0.5 * (each[0][3] + each[1][3]) / 2
    # Losses are float32 scalars.
    assert_close(out.terms["commitment"], commitment.float())
    assert_close(out.terms["codebook"], codebook.float())
    assert sorted(out.terms) == ["codebook", "commitment"]
    expected = torch.autograd.grad(commitment + codebook, [x, codes, phi.weight])
    assert_close(torch.autograd.grad(out.loss, [x, codes, phi.weight]), expected)


def test_the_terms_of_the_quantizer_add_up_over_scales():
    inner = vq()
    quantizer, both = (
        MultiScaleQuantizer(inner, (1, 2, 4)),
        MultiScaleQuantizer(inner, (1, 2, 4), commitment_weight=1.0),
    )
    x = draw(quantizer)
    out = quantizer(x)
    errors = [(s.inputs - s.codes).square().mean() for s in out.selections]
    assert_close(out.terms["commitment"], 0.25 * sum(errors))
    assert_close(out.terms["codebook"], sum(errors))
    sums = [
        quantizer.decode(torch.where(torch.arange(21) < n, out.indices, -1)) for n in (1, 5, 21)
    ]
    cumulative = sum((x - total).square().mean() for total in sums) / 3
    assert_close(both(x).terms["commitment"], 0.25 * sum(errors) + cumulative)
    exactly(both(x).terms["codebook"], out.terms["codebook"])


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions_enlarge_linearly(dimensions):
    sizes = SIZES[dimensions]
    inner = vq().double()
    quantizer = MultiScaleQuantizer(inner, sizes)
    x = draw(quantizer, dtype=torch.float64)
    rest, indices, total = x.movedim(-1, 1), [], 0
    mode = {1: "linear", 3: "trilinear"}[dimensions]
    for size in sizes:
        small = F.interpolate(rest, size=size, mode="area").movedim(1, -1)
        indices.append(inner.encode(small).flatten(1))
        codes = inner.decode(inner.encode(small)).movedim(-1, 1)
        enlarged = F.interpolate(codes, size=sizes[-1], mode=mode, align_corners=False)
        rest, total = rest - enlarged, total + enlarged
    out = quantizer(x)
    exactly(out.indices, torch.cat(indices, dim=1))
    assert_close(out.quantized, total.movedim(1, -1))


def test_refine_sees_positions_from_0_to_1():
    seen = []

    def watched(codes, position):
        seen.append(position)
        return codes

    MultiScaleQuantizer(vq(), (1, 2, 3, 4, 5), refine=watched).encode(torch.randn(5, 5, 4))
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]
    seen.clear()
    MultiScaleQuantizer(vq(), (3,), refine=watched).encode(torch.randn(3, 3, 4))
    assert seen == [0.0]


def test_a_single_scale_is_the_quantizer():
    inner = vq()
    quantizer, x = MultiScaleQuantizer(inner, (3,)), torch.randn(2, 3, 3, 4)
    out, expected = quantizer(x), inner(x)
    exactly(out.quantized, expected.quantized)
    exactly(out.indices, expected.indices.flatten(1))
    exactly(out.terms, expected.terms)
    assert quantizer.bits_per_token == inner.bits_per_token


def test_bits_per_position_of_the_map():
    assert MultiScaleQuantizer(vq(k=16), (1, 2, 4)).bits_per_token == 4 * 21 / 16


def test_scales_without_indices_add_nothing():
    """Prefixes of scales are coarse versions; the first alone is constant over the map."""
    quantizer = MultiScaleQuantizer(vq(k=64), (1, 2, 4))
    x = draw(quantizer, (50,))
    indices = quantizer.encode(x)
    coarse = quantizer.decode(torch.where(torch.arange(21) < 1, indices, -1))
    constant = quantizer.quantizer.decode(indices[:, :1]).unsqueeze(1).expand(50, 4, 4, 4)
    assert_close(coarse, constant)  # the weights of an interpolation add up to 1, rounded
    exactly(quantizer.decode(torch.full_like(indices, -1)), torch.zeros_like(x))
    fine = quantizer.decode(torch.where(torch.arange(21) >= 5, indices, -1))
    exactly(fine, quantizer.quantizer.decode(indices[:, 5:].unflatten(1, (4, 4))))
    errors = [
        (x - quantizer.decode(torch.where(torch.arange(21) < n, indices, -1))).square().mean()
        for n in (0, 1, 5, 21)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_teacher_forced_logits_equal_a_hand_written_loop():
    quantizer = refined()
    x = draw(quantizer)
    given = torch.randint(16, quantizer.encode(x).shape)
    rest, expected, start = x.movedim(-1, 1), [], 0
    for number, (h, w) in enumerate(quantizer.scales):
        small = F.interpolate(rest, size=(h, w), mode="area").movedim(1, -1)
        expected.append(quantizer.quantizer.logits(small, temperature=0.5).flatten(1, 2))
        codes = quantizer.quantizer.decode(given[:, start : start + h * w].unflatten(1, (h, w)))
        codes = codes.movedim(-1, 1)
        if number < 3:
            codes = F.interpolate(codes, size=(4, 5), mode="bicubic", align_corners=False)
        rest = rest - quantizer.refine(codes.movedim(1, -1), number / 3).movedim(-1, 1)
        start += h * w
    logits = quantizer.logits(x, temperature=0.5, indices=given)
    # Sums in another order; distances are up to about ten.
    assert_close(logits, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)


def test_logits_rank_the_choices_first():
    quantizer = MultiScaleQuantizer(ResidualQuantizer([vq(), vq(k=5)]), SIZES[2])
    x = draw(quantizer)
    logits = quantizer.logits(x)
    assert logits.shape == (3, 29, 2, 16)
    exactly(logits.argmax(dim=-1), quantizer.encode(x))


def test_assign_leaves_out_what_is_not_finite():
    quantizer = MultiScaleQuantizer(vq(), (1, 2))
    x = draw(quantizer, (1,))
    x[0, 0, 1, 2] = torch.nan
    out = quantizer.quantize_as(x, torch.ones(1, 5, dtype=torch.int64))
    assert out.indices.tolist() == [[1, 1, -1, 1, 1]]
    assert out.loss.isfinite()
    assert out.selections[1].mask.tolist() == [[[True, False], [True, True]]]


def test_repr_shows_options():
    assert repr(MultiScaleQuantizer(vq(), (1, 2))).splitlines()[1] == (
        "  scales=[(1, 1), (2, 2)], commitment_weight=0.0, codebook_weight=0.0"
    )


# Law 9: errors.

SCALES = (
    "`scales` must hold sizes of 1 to 3 dimensions that never shrink, got {}. For example "
    "(1, 2, 4)."
)


@pytest.mark.parametrize(
    ("scales", "options", "message"),
    [
        ([], {}, SCALES.format("[]")),
        ([2, (3,)], {}, SCALES.format("[2, (3,)]")),
        ([(1, 1, 1, 1)], {}, SCALES.format("[(1, 1, 1, 1)]")),
        ([()], {}, SCALES.format("[()]")),
        ([0, 2], {}, SCALES.format("[0, 2]")),
        ([2, 1], {}, SCALES.format("[2, 1]")),
        ([(1, 3), (2, 2)], {}, SCALES.format("[(1, 3), (2, 2)]")),
        ([1], {"commitment_weight": -1.0}, "`commitment_weight` must be at least 0.0, got -1.0."),
        ([1], {"codebook_weight": -1.0}, "`codebook_weight` must be at least 0.0, got -1.0."),
        (
            [1],
            {"refine": ScaleRefinement(4)},
            "`codebook_weight` must be greater than 0 for `refine` to learn, got 0.0. Freeze "
            "`refine`, or give a weight.",
        ),
    ],
)
def test_wrong_arguments(scales, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MultiScaleQuantizer(vq(), scales, **options)


def test_a_frozen_refine_needs_no_weight():
    frozen = ScaleRefinement(4).requires_grad_(requires_grad=False)
    assert MultiScaleQuantizer(vq(), (1, 2), refine=frozen)(torch.randn(2, 2, 4)).loss > 0


@pytest.mark.parametrize("wrap", [lambda q: q, RequireFinite])
def test_scales_of_scales(wrap):
    inner = wrap(MultiScaleQuantizer(vq(), (1, 2)))
    message = (
        rf"^`quantizer` must have indices for each token, got {type(inner).__name__}\. Put "
        r"`MultiScaleQuantizer` outside\.$"
    )
    with pytest.raises(ValueError, match=message):
        MultiScaleQuantizer(inner, (1, 2))


CALLS = {
    "forward": lambda q, x: q(x),
    "encode": lambda q, x: q.encode(x),
    "logits": lambda q, x: q.logits(x),
    "quantize_as": lambda q, x: q.quantize_as(x, torch.zeros(2, 5, dtype=torch.int64)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 4, 2, 2), (2, 4), (), (2, 2, 2, 5)])
def test_maps_of_another_size(call, shape):
    message = (
        f"`x` must have shape (..., 2, 2, 4), got {shape}. The last scale is the size of the map, "
        "and features come last: for feature maps (b, d, *spatial), wrap the quantizer in "
        "`ChannelsFirst`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(MultiScaleQuantizer(vq(), (1, 2)), torch.zeros(shape))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_integer_maps(call):
    with pytest.raises(TypeError, match=r"^`x` must be a floating-point tensor, got torch\.int64"):
        call(MultiScaleQuantizer(vq(), (1, 2)), torch.zeros(2, 2, 2, 4, dtype=torch.int64))


@pytest.mark.parametrize("call", ["forward", "encode"])
def test_wrong_masks(call):
    quantizer, x = MultiScaleQuantizer(vq(), (1, 2)), torch.zeros(3, 2, 2, 4)
    with pytest.raises(ValueError, match=r"^`mask` must have shape \(3, 2, 2\), got \(3, 2\)\.$"):
        getattr(quantizer, call)(x, torch.ones(3, 2) > 0)
    with pytest.raises(TypeError, match=r"^`mask` must be a boolean tensor, True for real tokens"):
        getattr(quantizer, call)(x, torch.ones(3, 2, 2))


@pytest.mark.parametrize("make", [vq, lambda: ResidualQuantizer([vq(), vq()])], ids=["one", "two"])
@pytest.mark.parametrize("call", ["decode", "quantize_as", "logits"])
def test_wrong_indices(make, call):
    quantizer, x = MultiScaleQuantizer(make(), (1, 2)), torch.zeros(2, 2, 4)
    calls = {
        "decode": quantizer.decode,
        "quantize_as": lambda indices: quantizer.quantize_as(x, indices),
        "logits": lambda indices: quantizer.logits(x, indices=indices),
    }
    tail = "5" if quantizer.num_codebooks == 1 else "5, 2"
    message = (
        f"`indices` must have shape (..., {tail}), the positions of all scales, got (4,). Fill up "
        "with -1 what is not known."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        calls[call](torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        TypeError, match=r"^`indices` must be an integer tensor, got torch\.float32"
    ):
        calls[call](torch.zeros(5))


def test_a_batch_of_indices_of_another_size():
    quantizer = MultiScaleQuantizer(vq(), (1, 2))
    x, indices = torch.zeros(3, 2, 2, 4), torch.zeros(2, 5, dtype=torch.int64)
    for call in (quantizer.quantize_as, lambda x, indices: quantizer.logits(x, indices=indices)):
        with pytest.raises(
            ValueError, match=r"^`indices` must have shape \(3, 5\), got \(2, 5\)\.$"
        ):
            call(x, indices)


def test_a_refine_of_another_shape():
    message = r"^`refine\(codes, position\)` must have shape \(1, 2, 2, 4\), got \(1, 2, 2, 3\)\.$"
    with pytest.raises(ValueError, match=message):
        MultiScaleQuantizer(vq(), (1, 2), refine=lambda codes, position: codes[..., :3])(
            torch.ones(2, 2, 4)
        )


def test_what_the_quantizer_cannot_do():
    x = torch.zeros(2, 2, 4)
    with pytest.raises(TypeError, match=r"explicit codebook for `logits`, got FSQ\."):
        MultiScaleQuantizer(FSQ([3] * 4), (1, 2)).logits(x)
    with pytest.raises(
        TypeError, match=r"explicit codebook for `nearest_indices`, got MultiScaleQuantizer\."
    ):
        MultiScaleQuantizer(vq(), (1, 2)).nearest_indices(x, 2)
    with pytest.raises(ValueError, match=r"^`temperature` must be greater than 0, got 0\.0\.$"):
        MultiScaleQuantizer(vq(), (1, 2)).logits(x, temperature=0.0)
