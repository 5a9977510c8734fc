"""Memory formats survive every block, and no block copies what it need not."""

import pytest
import torch
from torch import nn

from tests.nn.recorder import copies_of
from vqprior.nn import (
    ChannelNorm,
    Downsample,
    PatchDiscriminator,
    ResidualBlock,
    ScaleRefinement,
    SwinLayer,
    Upsample,
    group_norm,
)

NEVER = {}
# Zeros on two of four sides: the convolutions of torch pad opposite sides alike.
ONE_PAD = {"constant_pad_nd": 1}
# Tokens sorted by window, and back. Attention itself works on views.
SORTED = {"index_select": 2}
# With more than one shape of window, the results are joined.
JOINED = {"index_select": 2, "cat": 1}

BLOCKS = {
    "group_norm": (lambda: group_norm(32), 32, NEVER),
    "channel_norm": (lambda: ChannelNorm(32), 32, NEVER),
    "residual": (lambda: ResidualBlock(32), 32, NEVER),
    "residual_wider": (lambda: ResidualBlock(32, 48, norm=ChannelNorm), 32, NEVER),
    "residual_bare": (lambda: ResidualBlock(32, norm=nn.Identity), 32, NEVER),
    "downsample": (lambda: Downsample(32, 6), 32, ONE_PAD),
    "upsample": (lambda: Upsample(8, 6), 8, NEVER),
    "upsample_by_sums": (lambda: Upsample(32, 6), 32, NEVER),
    "discriminator": (lambda: PatchDiscriminator(3, width=4, norm=group_norm), 3, NEVER),
    "swin": (lambda: SwinLayer(32, num_heads=4, window_size=4), 32, SORTED),
    "swin_shifted": (lambda: SwinLayer(32, num_heads=4, window_size=4, shift=2), 32, JOINED),
}
# These decide on channels-last: they compute on features that lie together.
DECIDING = {"channel_norm", "residual_wider", "swin", "swin_shifted"}
every_block = pytest.mark.parametrize(
    ("make", "channels", "copies"), BLOCKS.values(), ids=BLOCKS.keys()
)
KEEPING = {name: case for name, case in BLOCKS.items() if name not in DECIDING}
every_keeping_block = pytest.mark.parametrize(
    ("make", "channels", "copies"), KEEPING.values(), ids=KEEPING.keys()
)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


@every_block
def test_channels_last_stays_so_without_a_copy(make, channels, copies):
    block = make().eval().to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(2, channels, 24, 24))
    with torch.no_grad():
        assert copies_of(lambda: block(x), like=x) == copies
        assert is_channels_last(block(x))


@every_block
def test_gradients_of_channels_last_are_channels_last(make, channels, copies):
    block = make().to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(2, channels, 24, 24)).requires_grad_()
    out = block(x)
    (grad,) = torch.autograd.grad(out, x, torch.randn_like(out))
    assert is_channels_last(grad)


@every_keeping_block
def test_contiguous_stays_so_without_a_copy(make, channels, copies):
    block, x = make().eval(), torch.randn(2, channels, 24, 24)
    with torch.no_grad():
        assert copies_of(lambda: block(x), like=x) == copies
        assert block(x).is_contiguous()


def test_a_stack_changes_the_layout_once():
    blocks = [ResidualBlock(32) for _ in range(2)]
    blocks += [SwinLayer(32, num_heads=4, window_size=4) for _ in range(2)]
    blocks += [ResidualBlock(32), SwinLayer(32, num_heads=4, window_size=4)]
    x = torch.randn(2, 32, 24, 24)
    with torch.no_grad():
        copies = copies_of(lambda: nn.Sequential(*blocks)(x), like=x)
    assert copies == {"clone": 1, "index_select": 6}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("size", "shift", "expected"),
    [((8, 8), 0, SORTED), ((8, 8), 2, JOINED), ((9, 14), 0, JOINED), ((9, 14), 1, JOINED)],
    ids=str,
)
def test_swin_copies_a_contiguous_map_once(size, shift, expected, batch):
    layer, x = SwinLayer(16, num_heads=2, window_size=4, shift=shift), torch.randn(batch, 16, *size)
    with torch.no_grad():
        assert copies_of(lambda: layer(x), like=x) == {"clone": 1, **expected}


def test_swin_does_not_write_to_its_input():
    layer = SwinLayer(8, num_heads=2, window_size=4, shift=2)
    x = channels_last(torch.randn(1, 8, 8, 8))
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


def test_scale_refinement_reads_codes_as_they_lie():
    refine, codes = ScaleRefinement(8), torch.randn(2, 6, 5, 8)
    with torch.no_grad():
        assert copies_of(lambda: refine(codes, 0.4), like=codes) == NEVER
        assert refine(codes, 0.4).is_contiguous()
