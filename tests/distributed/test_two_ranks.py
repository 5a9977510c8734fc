"""Law 7: two ranks behave as one process with the joint batch.

Modules are built before the process group exists. The reference, one process with the joint batch,
also runs before.
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from tests.codebooks.pair import one_shared_codebook, two_codebooks
from tests.contracts.factories import Mix, state
from tests.distributed.ranks import (
    batches,
    collected,
    ema,
    exactly,
    joint,
    revival,
    run,
    same_on_all_ranks,
    seeded,
)
from vqprior import (
    BSQ,
    LFQ,
    ChannelsFirst,
    CodebookEMA,
    CodebookRevival,
    SelfUpdating,
    TextureQuantizer,
    VectorQuantizer,
    _distributed,
    initialize_codebooks_,
)
from vqprior.functional import bit_entropy_loss, entropy_loss
from vqprior.losses import adaptive_weight
from vqprior.metrics import CodebookUsage, StreamingMean, gmsd, psnr, ssim

WORLD = 2
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def learn_as_one(make, rules_of):
    """Trains one process before the yield and two ranks after it; both must end up equal."""
    one, mine = seeded(make), seeded(make)
    one_rules, my_rules = rules_of(one), rules_of(mine)
    steps = batches(one.dim, world=WORLD)
    for parts in steps:
        out = one(*joint(parts))
        for rule in one_rules:
            rule.step(out)
    yield
    for parts in steps:
        out = mine(*parts[_distributed.rank()])
        for rule in my_rules:
            rule.step(out)
        for codebook in mine.codebooks:
            same_on_all_ranks(codebook.codes().detach())
    exactly(state(mine), state(one))
    for my_rule, one_rule in zip(my_rules, one_rules, strict=True):
        exactly(state(my_rule), state(one_rule))


@check
def ema_learns_as_one(rank, world):
    yield from learn_as_one(lambda: VectorQuantizer(3, 8), lambda q: [ema(q)])


@check
def revival_learns_as_one(rank, world):
    yield from learn_as_one(lambda: VectorQuantizer(3, 8), lambda q: [revival(q)])


@check
def both_rules_learn_as_one(rank, world):
    yield from learn_as_one(lambda: VectorQuantizer(3, 8), lambda q: [ema(q), revival(q)])


@check
def several_codebooks_learn_as_one(rank, world):
    yield from learn_as_one(two_codebooks, lambda q: [ema(q), revival(q)])


@check
def a_shared_codebook_learns_as_one_by_ema(rank, world):
    yield from learn_as_one(one_shared_codebook, lambda q: [ema(q)])


@check
def wrappers_learn_as_one(rank, world):
    def make():
        return TextureQuantizer(ChannelsFirst(VectorQuantizer(3, 8)), fuse=Mix())

    one, mine = seeded(make), seeded(make)
    rules = [[ema(q), revival(q)] for q in (one, mine)]
    steps = batches(3, world=WORLD)
    for parts in steps:
        x, mask = joint(parts)
        out = one(x, torch.ones_like(x) / 4, mask)
        for rule in rules[0]:
            rule.step(out)
    yield
    for parts in steps:
        x, mask = parts[rank]
        out = mine(x, torch.ones_like(x) / 4, mask)
        for rule in rules[1]:
            rule.step(out)
    exactly(state(mine), state(one))


@check
def self_updating_learns_as_one(rank, world):
    def make():
        quantizer = VectorQuantizer(3, 8)
        return SelfUpdating(quantizer, ema(quantizer), revival(quantizer))

    one, mine = seeded(make), seeded(make)
    steps = batches(3, world=WORLD)
    for parts in steps:
        one(*joint(parts))
    yield
    for parts in steps:
        mine(*parts[rank])
    exactly(state(mine), state(one))


@check
def revival_zeroes_moments_on_every_rank(rank, world):
    quantizer = seeded(lambda: VectorQuantizer(3, 8))
    optimizer = torch.optim.Adam(quantizer.parameters())
    rule = CodebookRevival(quantizer, patience=0.1, threshold=0.5, optimizer=optimizer)
    yield
    x, _ = batches(3, world=WORLD)[0][rank]
    out = quantizer(100 + x)
    quantizer.codebook.weight.grad = torch.ones(8, 3)
    optimizer.step()
    before = quantizer.codebook.weight.detach().clone()
    rule.step(out)
    moved = (quantizer.codebook.weight.detach() != before).any(dim=1)
    assert moved.sum() == 7
    moment = optimizer.state[quantizer.codebook.weight]["exp_avg"]
    exactly(moment.any(dim=1), ~moved)
    same_on_all_ranks(moment)


@check
def the_result_of_another_quantizer_raises_before_any_collective(rank, world):
    quantizer = VectorQuantizer(3, 8)
    rules = [ema(quantizer), revival(quantizer)]
    yield
    out = dataclasses.replace(quantizer(torch.randn(4, 3)), selections=())
    for rule in rules:
        with pytest.raises(ValueError, match="`out` must hold 1 selections"):
            rule.step(out)


@check
def initialize_uses_the_joint_batch(rank, world):
    quantizers = {method: VectorQuantizer(3, 4) for method in ("kmeans", "sample")}
    expected = {}
    steps = batches(3, world=WORLD)[:4]
    for method, quantizer in quantizers.items():
        torch.manual_seed(11)
        expected[method] = []
        for parts in steps:
            initialize_codebooks_(quantizer, *joint(parts), method=method)
            expected[method].append(quantizer.codebook.weight.detach().clone())
    yield
    for method, quantizer in quantizers.items():
        torch.manual_seed(11 + rank)  # rank 0 decides
        for parts, codes in zip(steps, expected[method], strict=True):
            initialize_codebooks_(quantizer, *parts[rank], method=method)
            exactly(quantizer.codebook.weight.detach(), codes)


@check
def initialize_without_a_token_raises_on_every_rank(rank, world):
    quantizer = VectorQuantizer(3, 4)
    yield
    x, mask = batches(3, world=WORLD)[5][rank]
    with pytest.raises(ValueError, match="`x` must hold at least one finite vector"):
        initialize_codebooks_(quantizer, x, mask)
    dist.barrier()


@check
def ranks_are_counted(rank, world):
    assert (_distributed.is_active(), _distributed.rank(), _distributed.world_size()) == (
        False,
        0,
        1,
    )
    yield
    assert (_distributed.is_active(), _distributed.rank(), _distributed.world_size()) == (
        True,
        rank,
        WORLD,
    )


@check
def collectives_do_what_they_say(rank, world):
    yield
    x = torch.arange(6.0).reshape(3, 2) * (rank + 1)
    both = torch.stack([torch.arange(6.0).reshape(3, 2) * scale for scale in (1, 2)])
    exactly(_distributed.all_gather_stack(x), both)
    exactly(_distributed.all_gather_stack(x.T), both.mT)  # not contiguous
    exactly(_distributed.all_gather_stack(torch.tensor(rank)), torch.tensor([0, 1]))
    summed = x.clone()
    assert _distributed.all_reduce_sum_(summed) is summed
    exactly(summed, both.sum(dim=0))
    copied = x.clone()
    assert _distributed.broadcast_(copied) is copied
    exactly(copied, both[0])
    for sizes in [(3, 1), (0, 2), (2, 0), (0, 0), (3, 3)]:
        expected = torch.cat([part[:size] for part, size in zip(both, sizes, strict=True)])
        exactly(_distributed.gather_rows(x[: sizes[rank]]), expected)


@check
def codebook_usage_counts_all_ranks_without_changing_its_counts(rank, world):
    meter, one = CodebookUsage(8), CodebookUsage(8)
    parts = [torch.tensor([0, 1, 1, -1]), torch.tensor([5], dtype=torch.int32)]
    for part in parts:
        one.update(part)
    expected = one.compute()
    yield
    meter.update(parts[rank])
    for _ in range(2):
        assert dataclasses.asdict(meter.compute()) == pytest.approx(dataclasses.asdict(expected))
    meter.reset()
    if rank == 0:
        meter.update(torch.tensor([3]))
    assert meter.compute().num_tokens == 1


@check
def image_metrics_average_over_the_images_of_all_ranks(rank, world):
    images, targets = torch.rand(5, 3, 16, 16), torch.rand(5, 3, 16, 16)
    cases = []
    for score in (psnr, ssim, gmsd):
        one = StreamingMean(score)
        one.update(images, targets)
        cases.append((one.compute(), StreamingMean(score), StreamingMean(score)))
    yield
    images, targets = (_distributed.broadcast_(t) for t in (images, targets))
    for _, uneven, lopsided in cases:
        part = slice(0, 1) if rank == 0 else slice(1, 5)
        uneven.update(images[part], targets[part])
        if rank == 1:  # rank 0 has seen nothing, but takes part in the sum
            lopsided.update(images, targets)
        assert uneven.compute() == pytest.approx(lopsided.compute(), rel=1e-12)
    expected = torch.tensor([value for value, _, _ in cases])  # those of rank 0's own images
    actual = torch.tensor([uneven.compute() for _, uneven, _ in cases])
    assert_close(actual, _distributed.broadcast_(expected))


@check
def adaptive_weight_is_the_same_on_all_ranks(rank, world):
    parameter = torch.ones(3, requires_grad=True)
    yield
    reconstruction = (parameter * torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)).sum()
    adversarial = (parameter * torch.tensor([2.0, 0.0, 1.0]) * (2 * rank + 1)).sum()
    weight = adaptive_weight(reconstruction, adversarial, parameter, eps=1e-8)
    # Squared gradient norms per rank: 14 and 56, 5 and 45; their means are 35 and 25.
    assert_close(weight, torch.tensor(35**0.5 / 5))
    same_on_all_ranks(weight)


@check
def all_reduce_sum_adds_up_values_and_gradients(rank, world):
    yield
    x = torch.arange(6.0).reshape(3, 2).T.requires_grad_()  # not contiguous
    total = _distributed.all_reduce_sum((rank + 1) * x)
    exactly(total, 3 * x.detach())
    exactly(x.detach(), torch.arange(6.0).reshape(3, 2).T)
    # The losses of the ranks are 1 and 10 times the sum of squares of the total.
    (gradient,) = torch.autograd.grad((10**rank * total.square()).sum(), x)
    exactly(gradient, (rank + 1) * 11 * 2 * total.detach())
    assert not _distributed.all_reduce_sum(x.detach()).requires_grad


def entropies():
    for function in (entropy_loss, bit_entropy_loss):
        for weights in ((1.0, 0.0), (0.0, 1.0), (0.7, 1.3)):
            options = dict(zip(("sample_weight", "batch_weight"), weights, strict=True))
            yield lambda x, mask, f=function, o=options: f(x, mask=mask, across_ranks=True, **o)


@check
def entropies_are_those_of_the_joint_batch(rank, world):
    """With gradients averaged over ranks, as distributed training does."""
    torch.manual_seed(5)
    weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    steps = [[(x.double(), mask) for x, mask in parts] for parts in batches(3, world=WORLD)]
    expected = []
    for parts in steps:
        x, mask = joint(parts)
        losses = [entropy(x @ weight, mask) for entropy in entropies()]
        expected.append([(e.detach(), torch.autograd.grad(e, weight)[0]) for e in losses])
    yield
    for parts, values in zip(steps, expected, strict=True):
        x, mask = parts[rank]
        for entropy, (value, gradient) in zip(entropies(), values, strict=True):
            loss = entropy(x @ weight, mask)
            assert_close(loss.detach(), value)
            same_on_all_ranks(loss.detach())
            (mine,) = torch.autograd.grad(loss, weight)
            assert_close(_distributed.all_reduce_sum_(mine) / WORLD, gradient)


@check
def a_call_on_one_rank_alone_waits_for_nobody(rank, world):
    """Rules and the joint entropies of training are collective; calls are not."""
    quantizer = seeded(lambda: VectorQuantizer(3, 8))
    yield
    before = state(quantizer)
    if rank == 0:
        quantizer.train()(torch.randn(4, 3))
        LFQ(3).eval()(torch.randn(4, 3))
        BSQ(3).eval()(torch.randn(4, 3))
    exactly(state(quantizer), before)
    same_on_all_ranks(quantizer.codebook.weight.detach())


@check
def modules_survive_the_end_of_the_group(rank, world):
    """A rule used in a group continues without one."""
    quantizer = VectorQuantizer(3, 8)
    rule = CodebookEMA(quantizer)
    for _ in range(2):
        rule.step(quantizer(torch.randn(5, 3)))
        yield
    assert not _distributed.is_active()
    rule.step(quantizer(torch.randn(5, 3)))


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """An empty string or a traceback for each check on each rank."""
    return run(collected(CHECKS, request), WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(reports, name):
    for rank, report in enumerate(reports):
        assert not report[name], f"rank {rank}: {report[name]}"
