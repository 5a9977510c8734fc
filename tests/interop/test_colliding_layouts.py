"""Projects whose state dicts look alike: the caller says which, and nothing is read by default.

The formulas of the other projects are written out here, with tensors of their names and shapes.
"""

import inspect
import re

import pytest
import torch
from torch.nn import functional as F

from tests.interop.layouts import SCALES, dac, taming, var, vqp_codebook, vqp_projections
from vqprior import interop
from vqprior.functional import IndexBackpropagation


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


@pytest.mark.parametrize(
    ("reader", "argument"),
    [
        (interop.from_taming, "metric"),
        (interop.from_var, "metric"),
        (interop.from_dac, "strides"),
        (interop.from_vqp_fsq, "residual"),
    ],
)
def test_what_tells_projects_apart_has_no_default(reader, argument):
    assert inspect.signature(reader).parameters[argument].default is inspect.Parameter.empty


def test_codes_and_features_are_normalized_in_titok_and_glm_image():
    state, x = taming(), torch.randn(2, 200, 6)
    codes, unit = F.normalize(state["embedding.weight"], dim=-1), F.normalize(x, dim=-1)
    indices = (unit @ codes.T).argmax(dim=-1)
    quantizer = interop.from_taming(
        state, metric="cosine", commitment_weight=0.25, codebook_weight=1.0
    )
    out, error = quantizer(x), (codes[indices] - unit).square().mean()
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, codes[indices])
    torch.testing.assert_close(quantizer.decode(indices), codes[indices])
    torch.testing.assert_close(out.loss, 1.25 * error)
    assert (interop.from_taming(state, metric="euclidean").encode(x) != indices).any()


def test_scores_are_products_in_ibq_and_apertus():
    state, x = taming(), torch.randn(2, 200, 6, requires_grad=True)
    codes = state["embedding.weight"].clone().requires_grad_()
    probabilities = (x @ codes.T).softmax(dim=-1)
    indices = probabilities.argmax(dim=-1)
    hard = F.one_hot(indices, 16).float()
    expected = (hard + probabilities - probabilities.detach()) @ codes
    quantizer = interop.from_taming(state, metric="dot")
    quantizer.estimator = IndexBackpropagation()
    out = quantizer(x)
    assert torch.equal(out.indices, indices)
    assert torch.equal(out.quantized, codes[indices])
    direction = torch.randn_like(x)
    ours = torch.autograd.grad((out.quantized * direction).sum(), (x, quantizer.codebook.weight))
    theirs = torch.autograd.grad((expected * direction).sum(), (x, codes))
    for our_grad, their_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-4)
    assert (interop.from_taming(state, metric="euclidean").encode(x) != indices).any()


@pytest.mark.parametrize(
    ("reader", "state", "projects"),
    [
        (
            interop.from_taming,
            taming,
            "'euclidean' (taming-transformers, CodeFormer, Chameleon), 'cosine' (GLM-Image, "
            "TiTok), 'dot' (IBQ, Emu3.5, Apertus)",
        ),
        (interop.from_var, var, "'euclidean' (VAR), 'cosine' (`using_znorm=True`)"),
    ],
)
def test_an_unknown_metric_shows_who_has_which(reader, state, projects):
    options = {"scales": SCALES} if reader is interop.from_var else {}
    message = (
        f"`metric` must be one of {projects}, got 'l2'. Look it up in the code that saved the "
        "state dict, which does not show it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        reader(state(), metric="l2", **options)


@pytest.mark.parametrize("strides", [(4, 2, 1), [8, 4, 2, 1], 2, (), 0])
def test_stages_with_strides_are_refused(strides):
    """As SNAC has them, whose keys are those of ``dac("parametrizations")``."""
    message = (
        f"`strides` must be 1 for every stage, got {strides}. Stages with strides, as those of "
        "SNAC, are not supported."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        interop.from_dac(dac("parametrizations"), strides=strides)


def test_strides_of_one_are_a_number_or_a_sequence():
    state, x = dac(), torch.randn(2, 5, 6)
    one, each = (interop.from_dac(state, strides=strides) for strides in (1, [1, 1, 1]))
    assert torch.equal(one.encode(x), each.encode(x))


def test_stages_of_residual_fsq_are_refused():
    message = (
        "`residual` must be False, got True. The stages of a ResidualFSQ of "
        "vector-quantize-pytorch, as in X-Codec2, are not supported."
    )
    for state in ({}, vqp_projections()):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            interop.from_vqp_fsq(state, [4] * 6, residual=True)


def unit(state):
    return {k: F.normalize(v, dim=-1) if k.endswith(".embed") else v for k, v in state.items()}


READERS = {
    interop.from_vqp_vector_quantize: "",
    interop.from_vqp_residual_vq: "layers.0.",
    interop.from_vqp_grouped_residual_vq: "rvqs.0.layers.0.",
}


@pytest.mark.parametrize(("reader", "before"), READERS.items())
def test_a_metric_that_the_codes_contradict_is_refused(reader, before):
    state = vqp_codebook(f"{before}_codebook")
    assert reader(state, metric="euclidean").codebook_sizes == (16,)
    with pytest.raises(ValueError, match=r"^`metric` must be 'euclidean' for codes with lengths"):
        reader(state, metric="cosine")
    for dtype in (torch.float32, torch.bfloat16):
        rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in unit(state).items()}
        assert reader(rounded, metric="cosine").codebook_sizes == (16,)
        with pytest.raises(
            ValueError,
            match=r"^`metric` must be 'cosine' for codes with lengths from \S+ to \S+, got "
            r"'euclidean'\. `use_cosine_sim=True` keeps them at 1\.$",
        ):
            reader(rounded)
