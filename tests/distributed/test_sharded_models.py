"""Models inside FSDP, its first and its second version, train as they do in one process."""

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from tests.contracts.factories import state
from tests.distributed.models import CLOSE, MODELS, Model, data, train, trained_by_one_process
from tests.distributed.ranks import collected, exactly, run, same_on_all_ranks, seeded
from vqprior import CodebookEMA, CodebookRevival, VectorQuantizer, initialize_codebooks_

WORLD = 2
# A warning of DTensor that does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:Found a non-scalar tensor")
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


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
        # Codebooks of a moving average are buffers, which are not sharded.
        shard(model)
        assert {hasattr(p, "full_tensor") for p in model.parameters()} == {True}
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
        "self_updating",
    )
}


class TrainsAsOneFlattened:
    """FSDP1 joins the parameters of a module into one flat tensor and splits that."""

    def __init__(self, kind, original):
        self.kind, self.original = kind, original

    def __call__(self, rank, world):
        from torch.distributed.fsdp import FullyShardedDataParallel

        make, rules_of = MODELS[self.kind]
        one = trained_by_one_process(self.kind, world)
        model = seeded(lambda: Model(make()))
        rules = rules_of(model.quantizer)
        yield
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=self.original, device_id=torch.device("cpu")
        )
        train(wrapped, rules, data(world), lambda parts: parts[rank])
        with FullyShardedDataParallel.summon_full_params(wrapped):
            found = state(model)
            for tensor in found.values():
                same_on_all_ranks(tensor)
            assert_close(found, one, **CLOSE)


CHECKS |= {
    f"{kind}_in_fsdp1{'_with_original_parameters' if original else ''}": TrainsAsOneFlattened(
        kind, original
    )
    for kind in ("gradient", "ema", "self_updating")
    for original in (False, True)
}


class FlatCodebooksCannotBeWrittenTo:
    def __init__(self, original):
        self.original = original

    def __call__(self, rank, world):
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = seeded(lambda: Model(VectorQuantizer(3, 8)))
        rule = CodebookRevival(model.quantizer)
        yield
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=self.original, device_id=torch.device("cpu")
        )
        _, out = wrapped(data(world)[0][rank])
        out.loss.backward()
        with pytest.raises(TypeError, match=r"^`codebook` must be whole on every rank to be"):
            rule.step(out)
        for late in (CodebookEMA, CodebookRevival):
            with pytest.raises((TypeError, ValueError), match=r"^`codebook.* must .*, got "):
                late(model.quantizer)
        dist.barrier()


CHECKS |= {
    "flat_codebooks_cannot_be_written_to": FlatCodebooksCannotBeWrittenTo(original=False),
    "parts_of_codebooks_cannot_be_written_to": FlatCodebooksCannotBeWrittenTo(original=True),
}


@check
def sharded_codebooks_cannot_be_written_to(rank, world):
    message = r"^`codebook` must be whole on every rank to be written to, got a sharded parameter\."
    model = seeded(lambda: Model(VectorQuantizer(3, 8)))
    rule = CodebookRevival(model.quantizer)
    yield
    shard(model)
    x = data(world)[0][rank]
    _, out = model(x)
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
def test_sharded_models(reports, name):
    for rank, report in enumerate(reports):
        assert not report[name], f"rank {rank}: {report[name]}"
