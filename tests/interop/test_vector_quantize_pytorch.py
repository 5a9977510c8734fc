"""Against the package itself: what is read has its indices and decodes to its vectors."""

import pytest
import torch

from vqprior import (
    GroupedQuantizer,
    ProjectedQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    interop,
)

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="the extra `peers` is not installed: nothing to compare with"
)


def trained(module, x):
    """After a few steps, so that codes are not what a constructor makes them."""
    module.train()
    for _ in range(3):
        module(x)
    return module.eval()


def same(ours, theirs, x):
    """Same indices, same vectors from ``forward`` and from ``decode``."""
    out = ours.eval()(x)
    quantized, indices = theirs(x)[:2]
    assert torch.equal(out.indices, indices.long())
    torch.testing.assert_close(out.quantized, quantized, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.decode(indices), quantized, rtol=1e-5, atol=1e-6)
    return out


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codebook_dim": 3},
        {"codebook_dim": 3, "layernorm_after_project_in": True},
        {"heads": 2},
        {"heads": 2, "codebook_dim": 4},
        {"heads": 2, "separate_codebook_per_head": True},
        {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 4},
        {"kmeans_init": True},
    ],
    ids=str,
)
def test_vector_quantize(options, cosine):
    x = torch.randn(2, 30, 8)
    theirs = trained(peer.VectorQuantize(8, 16, use_cosine_sim=cosine, **options), x)
    shared = options.get("heads") if "separate_codebook_per_head" not in options else None
    ours = interop.from_vqp_vector_quantize(
        theirs.state_dict(), metric="cosine" if cosine else "euclidean", heads=shared
    )
    same(ours, theirs, x)
    ours.train()
    theirs.train()
    torch.testing.assert_close(ours(x).terms["commitment"], theirs(x)[2])


def test_vector_quantize_that_learns_by_gradient():
    theirs = peer.VectorQuantize(8, 16, learnable_codebook=True, ema_update=False).eval()
    ours = interop.from_vqp_vector_quantize(theirs.state_dict())
    assert isinstance(ours, VectorQuantizer)
    same(ours, theirs, torch.randn(2, 30, 8))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"affine_param": True}, "_codebook.codebook_mean"),
        ({"vq_bridge": torch.nn.Linear(8, 8)}, "_codebook.vq_bridge.weight"),
        ({"kmeans_init": True}, "_codebook.initted"),
    ],
)
def test_vector_quantize_with_what_is_not_offered(options, key):
    state = peer.VectorQuantize(8, 16, **options).state_dict()
    with pytest.raises(ValueError, match=rf"`state_dict` must hold .*'{key}"):
        interop.from_vqp_vector_quantize(state)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codebook_dim": 3},
        {"shared_codebook": True},
        {"codebook_size": (16, 8, 24), "num_quantizers": None},
    ],
    ids=str,
)
def test_residual_vq(options, cosine):
    x = torch.randn(2, 30, 8)
    options = {"num_quantizers": 3, "codebook_size": 16} | options
    theirs = trained(peer.ResidualVQ(dim=8, use_cosine_sim=cosine, **options), x)
    metric = "cosine" if cosine else "euclidean"
    ours = interop.from_vqp_residual_vq(theirs.state_dict(), metric=metric)
    same(ours, theirs, x)
    assert len({id(c) for c in ours.codebooks}) == (1 if "shared_codebook" in options else 3)
    assert isinstance(ours, ProjectedQuantizer if "codebook_dim" in options else ResidualQuantizer)


def test_residual_vq_with_codes_from_networks_is_not_offered():
    theirs = peer.ResidualVQ(
        dim=8, num_quantizers=3, codebook_size=16, implicit_neural_codebook=True
    )
    with pytest.raises(ValueError, match=r"got 'mlps\.0\.proj_in\.weight'\."):
        interop.from_vqp_residual_vq(theirs.state_dict())


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 3}], ids=str)
def test_grouped_residual_vq(options):
    x = torch.randn(2, 30, 8)
    theirs = peer.GroupedResidualVQ(dim=8, groups=2, num_quantizers=3, codebook_size=16, **options)
    theirs = trained(theirs, x)
    ours = interop.from_vqp_grouped_residual_vq(theirs.state_dict())
    quantized, indices, _ = theirs(x)
    out = ours(x)
    assert isinstance(ours, GroupedQuantizer)
    assert torch.equal(out.indices, indices.permute(1, 2, 0, 3).flatten(2))
    torch.testing.assert_close(out.quantized, quantized, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ours.decode(out.indices), theirs.get_output_from_indices(indices), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("options", [{}, {"frozen_codebook_dim": 5}], ids=str)
def test_sim_vq(options):
    theirs = peer.SimVQ(8, 16, rotation_trick=False, **options).eval()
    ours = interop.from_vqp_sim_vq(theirs.state_dict())
    x = torch.randn(2, 30, 8)
    out = same(ours, theirs, x)
    torch.testing.assert_close(out.loss, theirs(x)[2])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"dim": 8}, {"dim": 8, "projection_has_bias": False}, {"num_codebooks": 2}]
)
def test_fsq(options, symmetric):
    theirs = peer.FSQ([3, 4, 5], preserve_symmetry=symmetric, **options).eval()
    count = options.get("num_codebooks", 1)
    ours = interop.from_vqp_fsq(
        theirs.state_dict(), [3, 4, 5], residual=False, symmetric=symmetric, num_codebooks=count
    )
    same(ours, theirs, 2 * torch.randn(2, 30, theirs.dim))


@pytest.mark.parametrize(
    "options", [{}, {"dim": 8}, {"dim": 8, "projection_has_bias": False}, {"num_codebooks": 2}]
)
def test_lfq_has_the_order_of_bits(options):
    theirs = peer.LFQ(codebook_size=32, **options).eval()
    count = options.get("num_codebooks", 1)
    ours = interop.from_vqp_lfq(theirs.state_dict(), num_codebooks=count)
    same(ours, theirs, torch.randn(2, 30, theirs.dim))
    x = torch.randn(2, 30, theirs.dim, requires_grad=True)
    out, (quantized, _, loss) = ours.train()(x), theirs.train()(x)
    torch.testing.assert_close(out.loss, loss, rtol=0.0, atol=1e-5)
    (grad,) = torch.autograd.grad(out.quantized.square().sum() + out.loss, x)
    (their_grad,) = torch.autograd.grad(quantized.square().sum() + loss, x)
    torch.testing.assert_close(grad, their_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"dim": 8}, {"num_codebooks": 2}])
def test_spherical_lfq(options):
    theirs = peer.LFQ(codebook_size=32, spherical=True, **options).eval()
    count = options.get("num_codebooks", 1)
    ours = interop.from_vqp_lfq(theirs.state_dict(), spherical=True, num_codebooks=count)
    x = torch.randn(2, 30, theirs.dim)
    same(ours, theirs, x)
    torch.testing.assert_close(ours.train()(x).loss, theirs.train()(x)[2], rtol=0.0, atol=2e-4)


@pytest.mark.parametrize("num_quantizers", [1, 3])
@pytest.mark.parametrize("dim", [3, 8])
def test_residual_fsq_looks_like_fsq(dim, num_quantizers):
    """The reason why ``residual`` has no default."""
    theirs = peer.ResidualFSQ(levels=[3, 4, 5], num_quantizers=num_quantizers, dim=dim).eval()
    state = theirs.state_dict()
    assert state.keys() == peer.FSQ([3, 4, 5], dim=dim).state_dict().keys()
    x = 2 * torch.randn(2, 300, dim)
    ours = interop.from_vqp_fsq(state, [3, 4, 5], residual=False, symmetric=True)
    assert (ours.encode(x) != theirs(x)[1][..., 0]).any()
