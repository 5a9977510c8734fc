"""What holds for every block: dtypes, compilation, wrong input."""

import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior.nn import (
    ChannelNorm,
    Downsample,
    PatchDiscriminator,
    ResidualBlock,
    SwinLayer,
    Upsample,
    group_norm,
)

BLOCKS = {
    "channel_norm": (lambda: ChannelNorm(8), (2, 8, 5, 6)),
    "group_norm": (lambda: group_norm(8), (2, 8, 5, 6)),
    "residual": (lambda: ResidualBlock(8), (2, 8, 5, 6)),
    "residual_wider": (lambda: ResidualBlock(8, 12, norm=ChannelNorm), (2, 8, 5, 6)),
    "residual_bare": (lambda: ResidualBlock(8, norm=nn.Identity), (2, 8, 5, 6)),
    "downsample": (lambda: Downsample(8, 6), (2, 8, 5, 6)),
    "upsample": (lambda: Upsample(8, 6), (2, 8, 5, 6)),
    "upsample_by_sums": (lambda: Upsample(32, 6), (2, 32, 9, 15)),
    "swin": (lambda: SwinLayer(8, num_heads=2, window_size=3), (2, 8, 6, 9)),
    "swin_shifted": (lambda: SwinLayer(8, num_heads=2, window_size=3, shift=1), (2, 8, 5, 7)),
    "discriminator": (lambda: PatchDiscriminator(3, width=4), (2, 3, 33, 40)),
}
OURS = {name: case for name, case in BLOCKS.items() if name != "group_norm"}
every_block = pytest.mark.parametrize(("make", "shape"), BLOCKS.values(), ids=BLOCKS.keys())
every_class = pytest.mark.parametrize(("make", "shape"), OURS.values(), ids=OURS.keys())


@every_block
def test_keeps_dtype_and_device(make, shape, device, dtype):
    block = make().to(device, dtype)
    out = block(torch.randn(shape).to(device, dtype))
    assert (out.dtype, out.device.type) == (dtype, device.type)
    assert out.isfinite().all()


@every_block
def test_half_precision_is_close_to_single(make, shape):
    block, x = make().eval(), torch.randn(shape)
    expected = block(x)
    # Three halves of a percent of the largest value: a few roundings to 8 bits in a row.
    tolerance = 0.015 * expected.abs().max().item() + 0.01
    assert_close(block.bfloat16()(x.bfloat16()).float(), expected, rtol=0, atol=tolerance)


@every_block
def test_works_under_autocast_with_gradients(make, shape):
    block, x = make(), torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    out.float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.full
@every_block
def test_compiles_without_graph_break_and_gives_the_same_gradients(make, shape):
    block = make()
    # Not dynamic: after a block of the same class, symbolic sizes take many seconds to compile.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(shape)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = compiled(mine), block(other)
    assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    # Gradients are sums over the map in another order: 1e-4 of the largest of them.
    assert_close(mine.grad, other.grad, rtol=0, atol=1e-4 * (1 + other.grad.abs().max().item()))


@every_block
def test_state_continues_and_pickles(make, shape):
    block, x = make().eval(), torch.randn(shape)
    fresh = make().eval()
    fresh.load_state_dict(block.state_dict(), strict=True)
    assert_close(fresh(x), block(x), rtol=0, atol=0)
    assert_close(pickle.loads(pickle.dumps(block))(x), block(x), rtol=0, atol=0)


@every_block
def test_memory_format_does_not_matter(make, shape):
    block, x = make().eval().double(), torch.randn(shape, dtype=torch.float64)
    assert_close(block(x.contiguous(memory_format=torch.channels_last)), block(x))


@every_class
def test_rejects_what_is_no_feature_map(make, shape):
    block, channels = make(), shape[1]
    smallest = r"h and w at least \d+, got "
    form = rf"`x` must have shape \(b, {channels}, h, w\) with {smallest}"
    with pytest.raises(ValueError, match=form + r"\(2, 64, 64\)\. Channels .* come first\."):
        block(torch.zeros(2, 64, 64))
    with pytest.raises(ValueError, match=form + r"\(2, 7, 64, 64\)\. Channels .* come first\."):
        block(torch.zeros(2, 7, 64, 64))
    with pytest.raises(ValueError, match=form + rf"\(2, {channels}, 0, 64\)\. "):
        block(torch.zeros(2, channels, 0, 64))
    with pytest.raises(TypeError, match=r"`x` must be a floating-point tensor, got torch\.int64"):
        block(torch.zeros(shape, dtype=torch.int64))
