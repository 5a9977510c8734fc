"""Entropies, against sums over all codes and against each other; two ranks are elsewhere."""

import itertools
import math
import re

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.observers import LargestTensor, NoHostSync
from vqprior.functional import bit_entropy_loss, entropy_loss, kl_to_uniform

LOSSES = [entropy_loss, bit_entropy_loss, kl_to_uniform]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
MASK = torch.tensor([True, False, True, True, False])


def entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


def by_definition(p, sample_weight=1.0, batch_weight=1.0):
    return sample_weight * entropy(p).mean() - batch_weight * entropy(p.mean(0))


def code_logits(bit_logits):
    """Logits of all ``2**bits`` codes, whose softmax is the product of independent bits."""
    patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=bit_logits.shape[-1])))
    return bit_logits @ patterns.to(bit_logits).T


def gradient(value, leaf):
    return torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("leading", [(8,), (2, 3, 4), ()])
def test_entropy_matches_its_definition(leading, weights):
    logits = (3 * torch.randn(*leading, 6, dtype=torch.float64)).requires_grad_()
    loss = entropy_loss(logits, sample_weight=weights[0], batch_weight=weights[1])
    expected = by_definition(logits.reshape(-1, 6).softmax(-1), *weights)
    assert_close(loss, expected)
    assert_close(gradient(loss, logits), gradient(expected, logits))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6])
def test_bits_match_the_softmax_over_all_codes(bits, weights):
    logits = (2 * torch.randn(9, bits, dtype=torch.float64)).requires_grad_()
    loss = bit_entropy_loss(logits, sample_weight=weights[0], batch_weight=weights[1])
    expected = by_definition(code_logits(logits).softmax(-1), *weights)
    assert_close(loss, expected)
    assert_close(gradient(loss, logits), gradient(expected, logits))


@pytest.mark.parametrize(("bits", "size"), [(6, 1), (6, 2), (6, 4), (5, 2), (3, 5), (6, 6)])
def test_groups_of_bits_add_up_and_bound_from_above(bits, size):
    logits = (2 * torch.randn(9, bits, dtype=torch.float64)).requires_grad_()
    options = {"sample_weight": 0.0, "group_size": size}
    loss = bit_entropy_loss(logits, **options)
    expected = -sum(
        entropy(code_logits(logits[:, start : start + size]).softmax(-1).mean(0))
        for start in range(0, bits, size)
    )
    assert_close(loss, expected)
    assert_close(gradient(loss, logits), gradient(expected, logits))
    exact = bit_entropy_loss(logits, sample_weight=0.0)
    assert loss <= exact + 1e-12  # the entropy enters with a minus


def test_groups_leave_the_entropy_of_tokens_alone():
    logits = torch.randn(9, 30, dtype=torch.float64)
    options = {"batch_weight": 0.0}
    loss = bit_entropy_loss(logits, group_size=7, **options)
    p = logits.sigmoid()
    expected = (entropy(p.unsqueeze(-1)) + entropy((1 - p).unsqueeze(-1))).sum(1).mean()
    assert_close(loss, expected)


def test_twenty_bits_are_exact():
    """Every token sure of another code: the entropy of the batch is the logarithm of ``n``."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (64, 20), generator=generator) * 2.0 - 1
    assert len(signs.unique(dim=0)) == 64
    assert_close(bit_entropy_loss(500 * signs), torch.tensor(-math.log(64)))


def test_bits_never_store_all_codes_of_all_tokens():
    logits = torch.randn(500, 12, requires_grad=True)
    with LargestTensor() as largest, NoHostSync():
        bit_entropy_loss(logits).backward()
    assert largest.numel <= 500 * 2**7  # both halves of 6 bits in one chain; all: 500 * 2**12


def test_kl_matches_its_definition():
    logits = (3 * torch.randn(2, 4, 6, dtype=torch.float64)).requires_grad_()
    loss = kl_to_uniform(logits)
    expected = math.log(6) - entropy(logits.softmax(-1)).mean()
    assert_close(loss, expected)
    assert_close(gradient(loss, logits), gradient(expected, logits))


def test_kl_to_itself_is_exact():
    """``log(k) - H`` would leave a rounding error here."""
    assert_close(kl_to_uniform(torch.full((5, 1000), 3.0)), torch.zeros(()), rtol=0, atol=1e-7)
    sure = torch.zeros(5, 1000)
    sure[:, 3] = 1e4
    assert_close(kl_to_uniform(sure), torch.tensor(math.log(1000)))


@every_loss
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 5.0])
def test_masked_tokens_do_not_count(loss, value):
    logits = torch.randn(5, 6)
    expected = loss(logits[MASK])
    logits[~MASK] = value
    logits.requires_grad_()
    masked = loss(logits, mask=MASK)
    assert_close(masked, expected)
    masked.backward()
    assert not logits.grad[~MASK].any()
    assert logits.grad.isfinite().all()
    assert logits.grad[MASK].any()


@every_loss
def test_an_all_true_mask_is_no_mask(loss):
    logits = torch.randn(2, 5, 6)
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert_close(loss(logits, mask=mask), loss(logits), rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("leading", [(0,), (4,), (2, 0)])
def test_without_a_token_the_loss_is_0(loss, leading):
    logits = torch.full((*leading, 6), torch.nan, requires_grad=True)
    value = loss(logits, mask=torch.zeros(leading) > 0)
    assert_close(value, torch.zeros(()))
    value.backward()
    assert not logits.grad.any()


@every_loss
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_extreme_logits_keep_values_and_gradients_finite(loss, scale):
    logits = (scale * torch.randn(7, 6)).requires_grad_()
    value = loss(logits)
    assert value.isfinite()
    assert gradient(value, logits).isfinite().all()


@pytest.mark.parametrize("loss", [entropy_loss, kl_to_uniform], ids=lambda f: f.__name__)
def test_impossible_codes_are_as_if_not_there(loss):
    logits = torch.randn(7, 6)
    logits[:, 4:] = -torch.inf
    logits.requires_grad_()
    value = loss(logits)
    offset = math.log(6 / 4) if loss is kl_to_uniform else 0.0
    assert_close(value, loss(logits[:, :4]) + offset)
    assert gradient(value, logits).isfinite().all()


@pytest.mark.parametrize("logit", [5.0, 12.0, 20.0, 50.0])
def test_the_entropy_of_a_nearly_sure_bit_keeps_its_digits(logit):
    for sign in (1, -1):
        loss = bit_entropy_loss(torch.tensor([[sign * logit]]), batch_weight=0.0)
        p = math.exp(-logit) / (1 + math.exp(-logit))
        expected = -p * math.log(p) - (1 - p) * math.log1p(-p)
        assert_close(loss, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=0)


@every_loss
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_computed_in_float32(loss, low):
    logits = (3 * torch.randn(3000, 6)).to(low).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits)
    assert value.dtype == torch.float32
    assert_close(value.double(), loss(logits.double()), rtol=1e-5, atol=1e-5)
    assert gradient(value, logits).dtype == low


@pytest.mark.full
@every_loss
def test_compiles_in_one_graph_without_waiting(loss):
    torch.compiler.reset()
    logits = torch.randn(9, 5, requires_grad=True)
    mask = torch.arange(9) != 4
    options = {} if loss is kl_to_uniform else {"across_ranks": True}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with NoHostSync():
        expected = loss(logits, mask=mask, **options)
    actual = compiled(logits, mask=mask, **options)
    assert_close(actual, expected)
    assert_close(gradient(actual, logits), gradient(expected, logits))


@pytest.mark.parametrize("loss", [entropy_loss, bit_entropy_loss], ids=lambda f: f.__name__)
def test_across_ranks_of_one_process_changes_nothing(loss):
    logits = torch.randn(9, 5)
    assert_close(loss(logits, across_ranks=True), loss(logits), rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize(
    ("logits", "mask", "error", "message"),
    [
        (
            torch.zeros(2, 3).long(),
            None,
            TypeError,
            "`logits` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.zeros(2, 0),
            None,
            ValueError,
            "`logits` must have shape (..., k) with k at least 1, got (2, 0).",
        ),
        (
            torch.zeros(2, 3),
            torch.ones(2),
            TypeError,
            "`mask` must be a boolean tensor, True for real tokens, got torch.float32. Convert it "
            "with `mask != 0`.",
        ),
        (
            torch.zeros(2, 3),
            torch.ones(2, 3) > 0,
            ValueError,
            "`mask` must have shape (2,), got (2, 3).",
        ),
    ],
)
def test_wrong_tensors(loss, logits, mask, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        loss(logits, mask=mask)


@pytest.mark.parametrize("loss", [entropy_loss, bit_entropy_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["sample_weight", "batch_weight"])
def test_negative_weights(loss, name):
    with pytest.raises(ValueError, match=f"^`{name}` must be at least 0.0, got -1.0.$"):
        loss(torch.zeros(2, 3), **{name: -1.0})


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (3, 0, "`group_size` must be at least 1, got 0."),
        (
            21,
            None,
            "`group_size` must be at most 20, got None for 21 bits. Pass a smaller size: the "
            "batch entropy is then an upper bound.",
        ),
        (
            40,
            25,
            "`group_size` must be at most 20, got 25 for 40 bits. Pass a smaller size: the "
            "batch entropy is then an upper bound.",
        ),
    ],
)
def test_wrong_groups(bits, group_size, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bit_entropy_loss(torch.zeros(2, bits), group_size=group_size)
