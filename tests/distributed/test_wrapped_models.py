"""Models inside DistributedDataParallel and FSDP2 train as they do in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from tests.contracts.factories import state
from tests.distributed.ranks import collected, exactly, run, same_on_all_ranks, seeded
from vqprior import (
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    ResidualQuantizer,
    SelfUpdating,
    TransformedCodebook,
    VectorQuantizer,
    initialize_codebooks_,
)
from vqprior.functional import IndexBackpropagation
from vqprior.metrics import CodebookUsage

WORLD = 2
# A warning of DTensor that does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:Found a non-scalar tensor")
CHECKS = {}
# Averaging gradients over ranks rounds differently from averaging over tokens: in five steps,
# numbers of about 1 differ by a few times 2**-24 each.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def check(function):
    CHECKS[function.__name__] = function
    return function


class Model(nn.Module):
    """An encoder, a quantizer and a decoder."""

    def __init__(self, quantizer):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = nn.Linear(5, 3), quantizer, nn.Linear(3, 5)

    def forward(self, x):
        out = self.quantizer(self.encoder(x))
        return self.decoder(out.quantized), out


def simvq():
    frozen = EmbeddingCodebook(8, 3).requires_grad_(requires_grad=False)
    return VectorQuantizer(3, 8, codebook=TransformedCodebook(frozen, nn.Linear(3, 3)))


def no_rules(quantizer):
    return []


def both_rules(quantizer):
    return [CodebookEMA(quantizer, decay=0.5), CodebookRevival(quantizer, patience=1.0)]


def self_updating():
    quantizer = VectorQuantizer(3, 8)
    return SelfUpdating(quantizer, *both_rules(quantizer))


def by_gradient(**options):
    # Each rank pulls the codes that it does not use itself: not what one process would do.
    return VectorQuantizer(3, 8, unused_weight=0.0, **options)


MODELS = {
    "gradient": (by_gradient, no_rules),
    "gradient_without_commitment": (lambda: by_gradient(commitment_weight=0.0), no_rules),
    "ema": (lambda: VectorQuantizer(3, 8), both_rules),
    "ema_without_commitment": (lambda: VectorQuantizer(3, 8, commitment_weight=0.0), both_rules),
    "self_updating": (self_updating, no_rules),
    "simvq": (simvq, no_rules),
    "simvq_without_commitment": (simvq, no_rules),
    "index_backpropagation": (
        lambda: VectorQuantizer(
            3, 8, estimator=IndexBackpropagation(), commitment_weight=0.0, codebook_weight=0.0
        ),
        no_rules,
    ),
    "residual": (lambda: ResidualQuantizer([by_gradient() for _ in range(3)]), no_rules),
    "residual_shared_ema": (lambda: ResidualQuantizer([VectorQuantizer(3, 8)] * 3), both_rules),
}


def data(world):
    """Batches with equally many tokens on every rank, so that the mean of means is the mean."""
    generator = torch.Generator().manual_seed(4)
    return [[torch.randn(8, 5, generator=generator) for _ in range(world)] for _ in range(5)]


def train(model, rules, steps, select):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for parts in steps:
        x = select(parts)
        y, out = model(x)
        optimizer.zero_grad()
        ((y - x).square().mean() + out.loss).backward()
        optimizer.step()
        for rule in rules:
            rule.step(out)


def trained_by_one_process(kind, world):
    make, rules_of = MODELS[kind]
    model = seeded(lambda: Model(make()))
    before = state(model)
    train(model, rules_of(model.quantizer), data(world), torch.cat)
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert {"encoder.weight", "decoder.weight"} < moved  # and parts of the quantizer
    return state(model)


class TrainsAsOne:
    """A check for one model, with or without broadcasts; a class, so that it can be pickled."""

    def __init__(self, kind, broadcast_buffers):
        self.kind, self.broadcast_buffers = kind, broadcast_buffers

    def __call__(self, rank, world):
        make, rules_of = MODELS[self.kind]
        one = trained_by_one_process(self.kind, world)
        model = seeded(lambda: Model(make()))
        rules = rules_of(model.quantizer)
        yield
        # Without `find_unused_parameters`: every parameter has a gradient.
        wrapped = nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=self.broadcast_buffers
        )
        train(wrapped, rules, data(world), lambda parts: parts[rank])
        for tensor in state(model).values():
            same_on_all_ranks(tensor)
        assert_close(state(model), one, **CLOSE)


CHECKS |= {
    f"{kind}_in_ddp{'' if broadcast else '_without_broadcasts'}": TrainsAsOne(kind, broadcast)
    for kind in MODELS
    for broadcast in (True, False)
}


@check
def gradients_accumulate_in_ddp(rank, world):
    """The first of two micro-batches runs under ``no_sync``, as DDP's documentation advises."""
    steps = data(world)
    one = seeded(lambda: Model(VectorQuantizer(3, 8)))
    rules = both_rules(one.quantizer)
    mine = seeded(lambda: Model(VectorQuantizer(3, 8)))
    my_rules = both_rules(mine.quantizer)

    def backward(model, rules, x):
        y, out = model(x)
        ((y - x).square().mean() + out.loss).div(2).backward()
        for rule in rules:
            rule.step(out)

    for parts in steps[:2]:
        backward(one, rules, torch.cat(parts))
    yield
    wrapped = nn.parallel.DistributedDataParallel(mine)
    with wrapped.no_sync():
        backward(wrapped, my_rules, steps[0][rank])
    backward(wrapped, my_rules, steps[1][rank])
    learned = [p for p in one.parameters() if p.requires_grad]
    for ours, theirs in zip(
        (p for p in mine.parameters() if p.requires_grad), learned, strict=True
    ):
        assert_close(ours.grad, theirs.grad, **CLOSE)
    assert_close(state(mine), state(one), **CLOSE)


def two_steps(wrapped, rank, world):
    for parts in data(world)[:2]:
        y, out = wrapped(parts[rank])
        (y.square().mean() + out.loss).backward()


@check
def what_no_loss_reaches_needs_to_be_looked_for(rank, world):
    """A codebook with weight 0, and one that a rule took over after wrapping, have no gradient."""
    unweighted = [Model(VectorQuantizer(3, 8, codebook_weight=0.0)) for _ in range(2)]
    taken_over = Model(VectorQuantizer(3, 8))
    yield
    ddp = nn.parallel.DistributedDataParallel
    two_steps(ddp(unweighted[0], find_unused_parameters=True), rank, world)
    wrapped = [ddp(unweighted[1]), ddp(taken_over)]
    CodebookEMA(taken_over.quantizer)
    for model in wrapped:
        with pytest.raises(RuntimeError, match="not used in producing loss"):
            two_steps(model, rank, world)
    dist.barrier()


@check
def a_meter_belongs_beside_the_wrapped_model(rank, world):
    """Inside the model, DDP would overwrite the counts of a rank with those of rank 0."""
    model, beside = seeded(lambda: Model(VectorQuantizer(3, 8))), CodebookUsage(8)
    model.inside = CodebookUsage(8)
    yield
    wrapped = nn.parallel.DistributedDataParallel(model)
    for number in range(2):
        out = wrapped(data(world)[number][rank][: 4 + 2 * rank])[1]
        beside.update(out.indices)
        model.inside.update(out.indices)
    assert beside.compute().num_tokens == 2 * (4 + 6)
    assert model.inside.compute().num_tokens == 2 * 4 + (4 + 6)


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model.children():
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(model):
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


class TrainsAsOneSharded:
    def __init__(self, kind):
        self.kind = kind

    def __call__(self, rank, world):
        make, rules_of = MODELS[self.kind]
        one = trained_by_one_process(self.kind, world)
        model = seeded(lambda: Model(make()))
        rules = rules_of(model.quantizer)
        yield
        # Rules need whole codebooks, so these are not sharded.
        left_out = set(model.quantizer.parameters()) if rules else set()
        shard(model, ignored_params=left_out)
        assert {hasattr(p, "full_tensor") for p in model.encoder.parameters()} == {True}
        assert {hasattr(p, "full_tensor") for p in model.quantizer.parameters()} == {not rules}
        train(model, rules, data(world), lambda parts: parts[rank])
        for tensor in whole(model).values():
            same_on_all_ranks(tensor)
        assert_close(whole(model), one, **CLOSE)


CHECKS |= {
    f"{kind}_in_fsdp": TrainsAsOneSharded(kind)
    for kind in (
        "gradient",
        "gradient_without_commitment",
        "index_backpropagation",
        "residual",
        "ema",
        "residual_shared_ema",
    )
}


@check
def sharded_codebooks_cannot_be_written_to(rank, world):
    message = r"^`codebook` must be whole on every rank to be written to, got a sharded parameter\."
    model = seeded(lambda: Model(VectorQuantizer(3, 8)))
    rules = both_rules(model.quantizer)
    yield
    shard(model)
    x = data(world)[0][rank]
    _, out = model(x)
    for rule in rules:
        with pytest.raises(TypeError, match=message):
            rule.step(out)
    for rule in (CodebookEMA, CodebookRevival):
        with pytest.raises(TypeError, match=message):
            rule(model.quantizer)
    codes = torch.zeros(8, 3)
    with pytest.raises(TypeError, match=message):
        model.quantizer.codebook.set_codes_(codes, torch.ones(8) > 0)
    dist.barrier()


@check
def other_methods_are_registered_with_fsdp(rank, world):
    """FSDP2 gathers parameters for ``forward``; other methods must be registered."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    quantizer = seeded(lambda: VectorQuantizer(3, 8))
    x = data(world)[0][0][:, :3]
    indices = quantizer.encode(x)
    codes = quantizer.decode(indices).detach()
    model = seeded(lambda: Model(seeded(lambda: VectorQuantizer(3, 8))))
    model.quantizer.load_state_dict(quantizer.state_dict())
    yield
    shard(model)
    for method in ("encode", "decode"):
        register_fsdp_forward_method(model.quantizer, method)
    exactly(model.quantizer.encode(x), indices)
    exactly(model.quantizer.decode(indices).detach(), codes)


@check
def codebooks_start_before_they_are_sharded(rank, world):
    one = seeded(lambda: Model(VectorQuantizer(3, 4)))
    mine = seeded(lambda: Model(VectorQuantizer(3, 4)))
    parts = data(world)[0]
    torch.manual_seed(6)
    initialize_codebooks_(one.quantizer, one.encoder(torch.cat(parts)))
    yield
    torch.manual_seed(6 + rank)  # rank 0 decides
    initialize_codebooks_(mine.quantizer, mine.encoder(parts[rank]))
    shard(mine)
    # Ranks encode the joint batch in parts, which rounds differently.
    assert_close(whole(mine), state(one), **CLOSE)


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    return run(collected(CHECKS, request), WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_wrapped_models(reports, name):
    for rank, report in enumerate(reports):
        assert not report[name], f"rank {rank}: {report[name]}"
