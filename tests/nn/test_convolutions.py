"""Residual block, resampling and discriminator, written out with torch.nn.functional."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.nn.recorder import Recorder
from vqprior.nn import (
    ChannelNorm,
    Downsample,
    PatchDiscriminator,
    ResidualBlock,
    Upsample,
    group_norm,
)


@pytest.mark.parametrize("out_channels", [None, 6, 10])
@pytest.mark.parametrize("norm", [group_norm, ChannelNorm])
def test_residual_block_is_its_formula(norm, out_channels):
    block = ResidualBlock(6, out_channels, norm=norm).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    hidden = block.norm1(x)
    hidden = F.conv2d(hidden * hidden.sigmoid(), block.conv1.weight, block.conv1.bias, padding=1)
    hidden = block.norm2(hidden)
    hidden = F.conv2d(hidden * hidden.sigmoid(), block.conv2.weight, block.conv2.bias, padding=1)
    skip = x
    if out_channels == 10:
        skip = torch.einsum("oc,bchw->bohw", block.skip.weight[:, :, 0, 0], x)
        skip = skip + block.skip.bias.view(1, 10, 1, 1)
    assert_close(block(x), skip + hidden)


def test_residual_block_builds_its_norms_by_the_callable():
    built = []

    def norm(channels):
        built.append(channels)
        return nn.Identity()

    block = ResidualBlock(6, 10, norm=norm)
    assert built == [6, 10]
    assert isinstance(ResidualBlock(6).norm1, nn.GroupNorm)
    assert isinstance(block.norm2, nn.Identity)


def test_residual_block_with_channel_norm_is_the_same_on_a_tile():
    block = ResidualBlock(8, norm=ChannelNorm).double()
    x = torch.randn(1, 8, 20, 20, dtype=torch.float64)
    # Two 3x3 convolutions see two positions further: those of the tile's border are left out.
    assert_close(block(x[:, :, 4:16, 4:16])[:, :, 2:-2, 2:-2], block(x)[:, :, 6:14, 6:14])


@pytest.mark.parametrize(("height", "width"), [(6, 4), (7, 5), (2, 3)])
def test_downsample_sees_rows_2i_to_2i_plus_2(height, width):
    layer = Downsample(3, 4).double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    out = layer(x)
    assert out.shape == (2, 4, height // 2, width // 2)
    padded = torch.zeros(2, 3, height + 1, width + 1, dtype=torch.float64)
    padded[:, :, :height, :width] = x
    for i in range(height // 2):
        for j in range(width // 2):
            patch = padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected = torch.einsum("ocyx,bcyx->bo", layer.conv.weight, patch) + layer.conv.bias
            assert_close(out[:, :, i, j], expected)


def test_downsample_rejects_a_single_row():
    with pytest.raises(ValueError, match=r"h and w at least 2, got \(2, 3, 1, 8\)"):
        Downsample(3)(torch.zeros(2, 3, 1, 8))


def test_upsample_repeats_then_convolves():
    layer = Upsample(3, 4).double()
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert_close(layer(x), F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1))


def repeated_and_convolved(x, conv):
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.conv2d(repeated, conv.weight, conv.bias, padding=1)


def adds_up_the_kernel(layer, x):
    """Whether the layer takes its shorter way: a transposed convolution with sums."""
    with Recorder() as recorder:
        layer(x)
    return any(name == "convolution" and args[6] for name, args, _ in recorder.calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (3, 9, 11), (64, 2, 2)])
def test_upsample_by_sums_is_the_same_function(batch, height, width, layout, dtype):
    layer = Upsample(32, 5).to(dtype).to(memory_format=layout)
    x = torch.randn(batch, 32, height, width, dtype=dtype).contiguous(memory_format=layout)
    x.requires_grad_()
    assert adds_up_the_kernel(layer, x)
    out, expected = layer(x), repeated_and_convolved(x, layer.conv)
    assert_close(out, expected)
    assert out.is_contiguous(memory_format=layout)
    direction = torch.randn_like(out)
    wanted = [x, layer.conv.weight, layer.conv.bias]
    grads = torch.autograd.grad(out, wanted, direction)
    for grad, other in zip(grads, torch.autograd.grad(expected, wanted, direction), strict=True):
        # Sums over the map in another order: 1e-5 of the largest.
        assert_close(grad, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_upsample_by_sums_needs_no_bias_and_takes_any_layout():
    layer, wide = Upsample(32, 5), torch.randn(2, 40, 32, 48)
    layer.conv.bias = None
    for x in (
        wide[:, 8:],
        wide[:, 8:].mT,
        wide[:, :32, ::2, ::2],
        wide[:1, :32].expand(3, -1, -1, -1),
    ):
        assert adds_up_the_kernel(layer, x)
        assert_close(layer(x), repeated_and_convolved(x, layer.conv))


def test_upsample_by_sums_has_second_derivatives():
    layer = Upsample(32, 1).double()
    x = torch.randn(1, 32, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


def test_upsample_by_sums_sees_every_change_of_its_weights():
    layer, x = Upsample(32, 5), torch.randn(1, 32, 16, 16)
    layer(x)
    layer.conv.weight.data.mul_(2)
    assert_close(layer(x), repeated_and_convolved(x, layer.conv))
    layer.load_state_dict({name: torch.randn_like(v) for name, v in layer.state_dict().items()})
    assert_close(layer(x), repeated_and_convolved(x, layer.conv), rtol=1e-4, atol=1e-3)
    assert set(layer.state_dict()) == {"conv.weight", "conv.bias"}


def halve(module, args):
    module.weight.data.mul_(0.5)


def tile(conv):
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.register_forward_pre_hook(halve),
        lambda conv: conv.register_forward_hook(lambda module, args, out: 2 * out),
        lambda conv: setattr(conv, "forward", lambda x: F.avg_pool2d(x, 2)),
        tile,
    ],
    ids=["pre_hook", "hook", "forward", "circular"],
)
def test_upsample_calls_a_convolution_that_was_changed(change):
    layer, x = Upsample(32), torch.randn(1, 32, 16, 16)
    change(layer.conv)
    assert not adds_up_the_kernel(layer, x)
    doubled = F.interpolate(x, scale_factor=2.0)
    other = Upsample(32)
    other.load_state_dict(layer.state_dict())
    change(other.conv)
    assert torch.equal(layer(x), other.conv(doubled))


def test_upsample_calls_a_convolution_that_was_replaced():
    layer, x = Upsample(32), torch.randn(1, 32, 16, 16)
    layer.conv = nn.Conv2d(32, 4, 5, padding=2, groups=4)
    assert_close(layer(x), layer.conv(F.interpolate(x, scale_factor=2.0)))
    layer.conv = nn.Sequential(nn.Conv2d(32, 4, 1))
    assert_close(layer(x), layer.conv(F.interpolate(x, scale_factor=2.0)))


def test_upsample_adds_up_the_kernel_only_where_it_pays():
    layer = Upsample(32)
    assert not adds_up_the_kernel(layer, torch.randn(1, 32, 15, 17))
    assert not adds_up_the_kernel(Upsample(31), torch.randn(1, 31, 16, 16))
    x = torch.randn(1, 32, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not adds_up_the_kernel(layer, x)
    assert not adds_up_the_kernel(layer.bfloat16(), x.bfloat16())


@pytest.mark.parametrize("make", [ResidualBlock, Downsample, Upsample])
def test_channels_default_to_the_input_and_are_checked(make):
    assert make(4)(torch.zeros(1, 4, 4, 4)).shape[1] == 4
    with pytest.raises(ValueError, match=r"`in_channels` must be at least 1, got 0\."):
        make(0)
    with pytest.raises(ValueError, match=r"`out_channels` must be at least 1, got 0\."):
        make(4, 0)


def test_discriminator_has_the_layers_of_pix2pix():
    layers = PatchDiscriminator().layers
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    channels = [(conv.in_channels, conv.out_channels) for conv in convs]
    assert channels == [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    assert [conv.stride[0] for conv in convs] == [2, 2, 2, 1, 1]
    assert [conv.bias is not None for conv in convs] == [True, False, False, False, True]
    assert all(conv.kernel_size == (4, 4) for conv in convs)
    norms = [layer.num_features for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    assert norms == [128, 256, 512]
    slopes = [layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)]
    assert slopes == [0.2] * 4


def test_discriminator_weights_start_with_standard_deviation_0_02():
    weight = PatchDiscriminator().layers[5].weight  # 128 * 256 * 16 numbers
    assert weight.numel() == 524288
    # Four standard errors: 0.02 / sqrt(2 n) for the deviation.
    assert_close(weight.std().item(), 0.02, rtol=0, atol=4 * 0.02 / (2 * 524288) ** 0.5)


def test_discriminator_logit_sees_70_pixels():
    net = PatchDiscriminator(1, width=2, norm=nn.Identity).double()
    x = torch.randn(1, 1, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = net(x)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    rows = (x.grad[0, 0].abs().sum(dim=1) > 0).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


@pytest.mark.parametrize(("num_layers", "smallest"), [(1, 6), (2, 12), (3, 24), (4, 48)])
def test_discriminator_needs_room_for_one_logit(num_layers, smallest):
    net = PatchDiscriminator(1, width=2, num_layers=num_layers)
    larger = smallest + 2**num_layers + 1
    assert net(torch.randn(2, 1, smallest, larger)).shape == (2, 1, 1, 2)
    widths = [c.out_channels for c in net.layers if isinstance(c, nn.Conv2d)]
    assert widths == [*[2, 4, 8, 16, 16][: num_layers + 1], 1]
    message = rf"h and w at least {smallest}, got \(2, 1, {smallest - 1}, {larger}\)"
    with pytest.raises(ValueError, match=message):
        net(torch.randn(2, 1, smallest - 1, larger))


def test_discriminator_keeps_biases_with_other_norms():
    net = PatchDiscriminator(width=2, norm=ChannelNorm)
    assert all(c.bias is not None for c in net.layers if isinstance(c, nn.Conv2d))


@pytest.mark.parametrize("name", ["in_channels", "width", "num_layers"])
def test_discriminator_rejects(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be at least 1, got 0\."):
        PatchDiscriminator(**{name: 0})
