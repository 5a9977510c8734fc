"""The transforms of ``torch.func`` compute what a loop with autograd computes."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close

from tests.contracts.factories import every_quantizer, quantizers_where, self_updating, vq
from tests.contracts.layouts import draw, exactly, feature_axis, features_last, fill, is_of_tokens
from tests.contracts.traits import skips_what_is_not_finite
from vqprior import FSQ, RequireFinite, ResidualQuantizer

SAMPLES = 3
pytestmark = [
    # What torch has no rule for, it computes for one sample after the other.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    # `torch.func.jvp` itself calls it.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]


def samples(quantizer, leading=(4,)):
    return torch.stack([draw(quantizer, leading, seed=seed) for seed in range(SAMPLES)])


def perturbed(quantizer):
    """The parameters of one model for each sample."""
    torch.manual_seed(0)
    return {
        name: torch.stack([p + 0.01 * torch.randn_like(p) for _ in range(SAMPLES)]).detach()
        for name, p in quantizer.named_parameters()
    }


def loss_of(quantizer):
    """A function of parameters and input that depends on all that a call returns."""

    def loss(parameters, x):
        out = functional_call(quantizer, parameters, (x,))
        weight = torch.linspace(-1, 1, out.quantized.numel()).reshape(out.quantized.shape)
        return (weight * out.quantized).sum() + out.loss

    return loss


def gradients(quantizer, parameters, x):
    """Those of autograd, without ``torch.func``."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    x = x.detach().requires_grad_()
    loss = loss_of(quantizer)(leaves, x)
    found = torch.autograd.grad(loss, [x, *leaves.values()], materialize_grads=True)
    return dict(zip(leaves, found[1:], strict=True)), found[0]


def loop(quantizer, parameters, xs):
    """``gradients`` of each sample, by its own parameters."""
    each = [
        gradients(quantizer, {name: p[i] for name, p in parameters.items()}, xs[i])
        for i in range(SAMPLES)
    ]
    stacked = {name: torch.stack([one[0][name] for one in each]) for name in parameters}
    return stacked, torch.stack([one[1] for one in each])


@every_quantizer
def test_gradients_of_each_sample_are_those_of_a_loop(make):
    quantizer = make().eval()
    parameters, xs = dict(quantizer.named_parameters()), samples(quantizer)
    same = {name: p.detach().expand(SAMPLES, *p.shape) for name, p in parameters.items()}
    found = vmap(grad(loss_of(quantizer), (0, 1)), (None, 0))(parameters, xs)
    assert_close(found, loop(quantizer, same, xs), rtol=1e-4, atol=1e-5)


@every_quantizer
def test_gradients_of_an_ensemble_are_those_of_a_loop(make):
    """The outer transform differentiates what the inner one hides from ``requires_grad``."""
    quantizer = make().eval()
    parameters, xs = perturbed(quantizer), samples(quantizer)
    found = grad(lambda *both: vmap(loss_of(quantizer))(*both).sum(), (0, 1))(parameters, xs)
    assert_close(found, loop(quantizer, parameters, xs), rtol=1e-4, atol=1e-5)


@every_quantizer
def test_directional_derivatives_are_those_of_the_gradient(make):
    quantizer = make().eval()
    parameters = {name: p.detach() for name, p in quantizer.named_parameters()}
    x = draw(quantizer, (4,))
    torch.manual_seed(0)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}, torch.randn_like(x)
    of_parameters, of_x = gradients(quantizer, parameters, x)
    expected = (of_x * direction[1]).sum() + sum(
        (of_parameters[name] * direction[0][name]).sum() for name in parameters
    )
    _, found = jvp(loss_of(quantizer), (parameters, x), direction)
    # torch gives a number times a scalar a tangent in float64.
    assert_close(found.to(expected.dtype), expected, rtol=1e-4, atol=1e-4)


@quantizers_where(is_of_tokens, lambda q: feature_axis(q) == -1)
def test_vectors_can_be_mapped_one_by_one(make):
    quantizer = make().eval()
    x = draw(quantizer)
    exactly(vmap(quantizer.encode)(x), quantizer.encode(x))
    exactly(vmap(quantizer.decode)(quantizer.encode(x)), quantizer.decode(quantizer.encode(x)))
    assert_close(vmap(lambda one: quantizer(one).quantized)(x), quantizer(x).quantized)


@quantizers_where(skips_what_is_not_finite)
def test_broken_tokens_have_no_gradient(make):
    quantizer = make().eval()
    x = draw(quantizer, (4,))
    where = torch.zeros(features_last(quantizer, x).shape[:-1], dtype=torch.bool)
    where[1] = True
    xs = torch.stack([x, fill(quantizer, x, where, torch.nan)])
    parameters = dict(quantizer.named_parameters())
    found = vmap(grad(loss_of(quantizer), (0, 1)), (None, 0))(parameters, xs)
    assert all(one.isfinite().all() for one in (*found[0].values(), found[1]))


def test_checks_read_all_samples():
    quantizer = FSQ([5, 5])
    indices = torch.zeros(3, 4, dtype=torch.int64)
    indices[2, 1] = 25
    with pytest.raises(ValueError, match=r"`indices` must be -1 or in \[0, 25\), got 25"):
        vmap(quantizer.decode)(indices)
    x = torch.zeros(3, 4, 2)
    x[1, 2] = torch.inf
    with pytest.raises(ValueError, match="in 1 of 12 tokens"):
        vmap(RequireFinite(quantizer).encode)(x)


@pytest.mark.parametrize("wrap", [lambda q: q, lambda q: ResidualQuantizer([q, q])])
def test_a_quantizer_that_updates_itself_refuses(wrap):
    quantizer = wrap(self_updating(vq()))
    with pytest.raises(ValueError, match=r"`training` must be False .* Call `\.eval\(\)`"):
        grad(lambda x: quantizer(x).loss)(draw(quantizer))


@pytest.mark.full
def test_a_compiled_gradient_loses_no_loss():
    quantizer = vq()
    parameters, x = dict(quantizer.named_parameters()), draw(quantizer)
    plain = grad(loss_of(quantizer))
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    assert_close(compiled(parameters, x), plain(parameters, x))
