"""What is read decodes to what the published formulas say, written out here once more."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.interop.layouts import SCALES, dac, encodec, simvq, taming, var
from vqprior import VectorQuantizer, interop


def nearest(x, codes):
    """The index of the nearest code, by all distances in double precision."""
    return torch.cdist(x.double(), codes.double()).argmin(dim=-1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def test_taming_indices_values_and_loss():
    state, x = taming(), torch.randn(2, 5, 6)
    quantizer = interop.from_taming(state, metric="euclidean")
    out, codes = quantizer(x), state["embedding.weight"]
    indices = nearest(x, codes)
    assert isinstance(quantizer, VectorQuantizer)
    assert torch.equal(out.indices, indices)
    assert torch.equal(out.quantized, codes[indices])
    error = (codes[indices] - x).square().mean()
    torch.testing.assert_close(out.loss, error + 0.25 * error)
    torch.testing.assert_close(out.terms["codebook"], 0.25 * error)


def test_taming_weights_are_two_numbers():
    quantizer = interop.from_taming(
        taming(), metric="euclidean", commitment_weight=0.25, codebook_weight=1.0
    )
    assert (quantizer.commitment_weight, quantizer.codebook_weight) == (0.25, 1.0)


def test_simvq_codes_are_a_linear_map_of_a_frozen_table():
    state, x = simvq(), torch.randn(2, 5, 6)
    quantizer = interop.from_simvq(state)
    codes = (
        state["embedding.weight"] @ state["embedding_proj.weight"].T + state["embedding_proj.bias"]
    )
    out, indices = quantizer(x), nearest(x, codes)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, codes[indices])
    error = (codes[indices] - x).square().mean()
    torch.testing.assert_close(out.terms["commitment"], 0.25 * error)
    torch.testing.assert_close(out.terms["codebook"], error)
    trained = {name for name, p in quantizer.named_parameters() if p.requires_grad}
    assert trained == {"codebook.module.weight", "codebook.module.bias"}


def test_encodec_adds_up_stages():
    state, x = encodec(), torch.randn(2, 5, 6)
    rest, total, chosen, errors = x, torch.zeros_like(x), [], []
    for stage in range(3):
        codes = state[f"vq.layers.{stage}._codebook.embed"]
        chosen.append(nearest(rest, codes))
        errors.append((codes[chosen[-1]] - rest).square().mean())
        total = total + codes[chosen[-1]]
        rest = rest - codes[chosen[-1]]
    quantizer = interop.from_encodec(state)
    out = quantizer(x)
    assert torch.equal(out.indices, torch.stack(chosen, dim=-1))
    torch.testing.assert_close(out.quantized, total)
    torch.testing.assert_close(out.terms["commitment"], torch.stack(errors).mean())
    # A lower bandwidth: the first stages alone.
    first = torch.stack([chosen[0], chosen[1].clone().fill_(-1), chosen[2].clone().fill_(-1)], -1)
    assert torch.equal(quantizer.decode(first), state["vq.layers.0._codebook.embed"][chosen[0]])


@pytest.mark.parametrize("form", ["hooks", "parametrizations", "plain"])
def test_dac_searches_directions_in_projections(form):
    state, x = dac(form), torch.randn(2, 5, 6)

    def convolution(name):
        if form == "plain":
            return state[name + ".weight"]
        part = {"hooks": "weight_", "parametrizations": "parametrizations.weight.original"}[form]
        ends = "gv" if form == "hooks" else "01"
        length, direction = (state[f"{name}.{part}{end}"] for end in ends)
        norms = direction.flatten(1).square().sum(dim=1).sqrt()
        return direction * (length.flatten() / norms).reshape(-1, 1, 1)

    rest = x.transpose(1, 2)
    total, chosen = torch.zeros_like(rest), []
    for stage in range(3):
        name = f"quantizers.{stage}"
        lowered = F.conv1d(rest, convolution(name + ".in_proj"), state[name + ".in_proj.bias"])
        codes = state[name + ".codebook.weight"]
        cosines = F.normalize(lowered.transpose(1, 2), dim=-1) @ F.normalize(codes, dim=1).T
        chosen.append(cosines.argmax(dim=-1))
        raised = codes[chosen[-1]].transpose(1, 2)
        raised = F.conv1d(raised, convolution(name + ".out_proj"), state[name + ".out_proj.bias"])
        total, rest = total + raised, rest - raised
    quantizer = interop.from_dac(state, strides=1)
    out = quantizer(x)
    assert torch.equal(out.indices, torch.stack(chosen, dim=-1))
    torch.testing.assert_close(out.quantized, total.transpose(1, 2))
    torch.testing.assert_close(quantizer.decode(out.indices), total.transpose(1, 2))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("form", ["partially", "none", "fully", "without"])
def test_var_refines_what_each_scale_adds(form, metric):
    state, maps, ratio = var(form), torch.randn(2, 6, 4, 4), 0.5
    codes = state["embedding.weight"]
    names = [key.removesuffix(".weight") for key in state if key.startswith("quant_resi")]
    names = [name for name in names if not name.endswith(".bias")]
    margin = 1 / 12 if len(names) == 4 else 1 / 2 / max(len(names), 1)
    ticks = np.linspace(margin, 1 - margin, max(len(names), 1))
    rest, total, chosen, error = maps.clone(), torch.zeros_like(maps), [], 0.0
    for number, side in enumerate(SCALES):
        small = F.interpolate(rest, size=(side, side), mode="area") if side < 4 else rest
        tokens = small.permute(0, 2, 3, 1)
        if metric == "cosine":
            indices = (F.normalize(tokens, dim=-1) @ F.normalize(codes, dim=1).T).argmax(dim=-1)
        else:
            indices = nearest(tokens.reshape(-1, 6), codes).reshape(2, side, side)
        added = codes[indices].permute(0, 3, 1, 2)
        added = F.interpolate(added, size=(4, 4), mode="bicubic") if side < 4 else added
        if names:
            name = names[int(np.abs(ticks - number / (len(SCALES) - 1)).argmin())]
            weight, bias = state[name + ".weight"], state[name + ".bias"]
            added = (1 - ratio) * added + ratio * F.conv2d(added, weight, bias, padding=1)
        total, rest = total + added, rest - added
        error = error + F.mse_loss(total, maps) / len(SCALES)
        chosen.append(indices.flatten(1))
    quantizer = interop.from_var(state, scales=SCALES, metric=metric, ratio=ratio)
    out = quantizer(maps.permute(0, 2, 3, 1))
    assert torch.equal(out.indices, torch.cat(chosen, dim=1))
    torch.testing.assert_close(out.quantized, total.permute(0, 2, 3, 1))
    torch.testing.assert_close(quantizer.decode(out.indices), total.permute(0, 2, 3, 1))
    torch.testing.assert_close(out.terms["commitment"], 0.25 * error)
    torch.testing.assert_close(out.terms["codebook"], error)


def test_var_default_scales_are_those_of_the_release():
    state = var() | {"ema_vocab_hit_SV": torch.zeros(10, 16)}
    quantizer = interop.from_var(state, metric="euclidean")
    assert quantizer.decode(torch.zeros(1, 680, dtype=torch.long)).shape == (1, 16, 16, 6)


def test_reading_leaves_the_random_state_of_convolutions_alone():
    state = var()
    torch.manual_seed(0)
    less = {key: state[key] for key in list(state)[:2]}
    interop.from_var(less, metric="euclidean", scales=SCALES)
    without = torch.rand(())
    torch.manual_seed(0)
    interop.from_var(state, metric="euclidean", scales=SCALES)
    assert torch.rand(()) == without
