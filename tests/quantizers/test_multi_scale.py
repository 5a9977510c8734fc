"""`MultiScaleQuantizer`: VAR's algorithm, averages of what counts, ``refine``, and errors.

The laws of all quantizers are in ``tests/contracts``.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.contracts.factories import DIM, multi_scale, refined, residual_of, vq
from tests.contracts.layouts import draw, draw_mask, exactly
from vqprior import (
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    MultiScaleQuantizer,
)

SIZES = {1: [(1,), (3,), (6,)], 2: [(1, 1), (2, 1), (2, 3), (4, 5)], 3: [(1, 1, 1), (2, 3, 2)]}
every_dimension = pytest.mark.parametrize("sizes", SIZES.values(), ids=["1d", "2d", "3d"])


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
    table = EmbeddingCodebook(16, 4)  # gradients below are those of its weight
    inner = vq(codebook=table, commitment_weight=0.0, codebook_weight=0.0).double()
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


def test_a_scale_of_a_map_without_indices_is_not_refined():
    """The bias belongs to scales of a map with an index; within one, -1 is a code of zeros."""
    quantizer = refined()
    indices = quantizer.encode(draw(quantizer, (2,)))
    indices[0, 1:] = -1  # 1, 2, 6 and 20 positions
    indices[1, :2] = indices[1, 3:9] = -1
    coarse, fine = quantizer.decode(indices)
    inner = quantizer.quantizer
    first = inner.decode(indices[:1, :1, None].expand(1, 4, 5))
    assert_close(coarse, quantizer.refine(first, 0.0)[0])
    second = inner.decode(indices[1:, 1:3, None]).movedim(-1, 1)
    second = F.interpolate(second, size=(4, 5), mode="bicubic", align_corners=False)
    last = quantizer.refine(inner.decode(indices[1:, 9:].unflatten(1, (4, 5))), 1.0)
    assert_close(fine, (quantizer.refine(second.movedim(1, -1), 1 / 3) + last)[0])


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


def test_logits_without_choices_so_far_are_those_of_the_whole_map():
    quantizer = refined()
    x = draw(quantizer)
    logits = quantizer.logits(x, indices=torch.full_like(quantizer.encode(x), -1))
    whole = [F.adaptive_avg_pool2d(x.movedim(-1, 1), size).flatten(2) for size in SIZES[2]]
    assert_close(logits, quantizer.quantizer.logits(torch.cat(whole, dim=-1).movedim(1, -1)))


def test_logits_rank_the_choices_first():
    quantizer = MultiScaleQuantizer(residual_of(DIM), SIZES[2])
    x = draw(quantizer)
    logits = quantizer.logits(x)
    assert logits.shape == (32, 29, 2, 16)
    exactly(logits.argmax(dim=-1), quantizer.encode(x))


# What counts.


def test_no_index_of_encode_differs_from_forward_in_many_maps():
    """The remainder is rounded in one way, whoever asks."""
    quantizer = MultiScaleQuantizer(vq(k=512), (1, 2, 3, 5, 8))
    x = draw(quantizer, (100,))
    out = quantizer(x)
    exactly(quantizer.encode(x), out.indices)
    exactly(quantizer.logits(x, indices=out.indices), quantizer.logits(x))


@every_dimension
def test_positions_that_only_masked_ones_cover_have_no_index(sizes):
    quantizer = multi_scale(scales=sizes)
    mask = draw_mask(quantizer, (3,))
    indices = quantizer(draw(quantizer, (3,)), mask).indices.reshape(3, -1, quantizer.num_codebooks)
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


def test_a_map_that_covers_a_part_is_averaged_over_that_part():
    """A cell's mean is that of what counts in it; the corner that does not cannot pull."""
    codes = EmbeddingCodebook.from_codes(torch.tensor([[1.0], [3.0], [100.0]]))
    quantizer = MultiScaleQuantizer(vq(3, 1, codebook=codes), (1, 2))
    x = torch.tensor([[[1.0], [3.0]], [[2.0], [1e6]]])
    mask = torch.tensor([[True, True], [True, False]])
    out = quantizer(x, mask)
    exactly(out.selections[0].inputs.flatten(), torch.tensor([2.0]))
    assert out.indices[0].item() in (0, 1)
    assert out.indices[4].item() == -1


def test_half_precision_maps_are_averaged_in_float32():
    """A mean of values around 1000 in half precision would choose other codes."""
    quantizer = MultiScaleQuantizer(vq(k=64), (1, 2, 16))
    quantizer.quantizer.codebook.weight.data += 1000
    x = (1000 + draw(quantizer, scale=1.0)).half()
    exactly(quantizer(x).indices, quantizer(x.float()).indices)


# Learning.


def test_quantized_moves_neither_codes_nor_refine():
    quantizer = refined()
    quantizer(draw(quantizer).requires_grad_()).quantized.sum().backward()
    assert all(p.grad is None for p in quantizer.parameters())


def test_the_gradient_is_the_identity_where_positions_count():
    quantizer = refined()
    x, mask = draw(quantizer).requires_grad_(), draw_mask(quantizer)
    weight = torch.randn(x.shape)
    (gradient,) = torch.autograd.grad((weight * quantizer(x, mask).quantized).sum(), x)
    exactly(gradient, weight * mask.unsqueeze(-1))


def test_one_step_of_the_average_for_the_uses_of_all_scales():
    quantizer = multi_scale()
    (codebook,) = set(quantizer.codebooks)
    ema = CodebookEMA(quantizer, decay=0.5, eps=0.0)
    out, before = quantizer(draw(quantizer, (8,))), codebook.codes().detach().clone()
    ema.step(out)
    inputs = torch.cat([s.inputs.detach().flatten(0, -2) for s in out.selections]).double()
    indices = torch.cat([s.indices.flatten() for s in out.selections])
    for j in indices.unique():
        mine = inputs[indices == j]
        expected = (0.5 * before[j] + 0.5 * mine.sum(dim=0)) / (0.5 + 0.5 * len(mine))
        assert_close(codebook.codes()[j].double(), expected, rtol=1e-4, atol=1e-5)


def test_revival_moves_unused_codes_onto_inputs_of_any_scale():
    inner = vq()
    inner.codebook.weight.data[1:] += 1000
    quantizer = MultiScaleQuantizer(inner, SIZES[2])
    out = quantizer(draw(quantizer, (20,)))
    CodebookRevival(quantizer, patience=1.0).step(out)
    inputs = torch.cat([s.inputs.reshape(-1, 4) for s in out.selections])
    for code in inner.codebook.codes()[1:]:
        assert (inputs == code).all(dim=1).any()
    assert len(quantizer.codebooks) == len(SIZES[2])


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
