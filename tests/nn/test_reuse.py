"""Without gradients blocks write over what they made themselves, and over nothing else."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from vqprior.nn import ChannelNorm, ResidualBlock, SwinLayer, group_norm

BLOCKS = {
    "group norm": lambda: ResidualBlock(16, norm=group_norm),
    "channel norm": lambda: ResidualBlock(16, norm=ChannelNorm),
    "no norm": lambda: ResidualBlock(16, norm=nn.Identity),
    "wider": lambda: ResidualBlock(16, 32),
    "swin": lambda: SwinLayer(16, num_heads=2, window_size=4, shift=2),
}
every_block = pytest.mark.parametrize("name", BLOCKS)
FORMATS = (torch.contiguous_format, torch.channels_last)
# Every layer whose result is written over.
OVERWRITTEN = [
    ("group norm", "norm1"), ("group norm", "norm2"), ("group norm", "conv2"),
    ("channel norm", "norm1"), ("swin", "proj"), ("swin", "mlp"), ("swin", "mlp.2"),
]  # fmt: skip


def build(name):
    torch.manual_seed(0)
    return BLOCKS[name]().eval()


def image(memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 16, 9, 7, generator=generator).to(memory_format=memory_format)


@every_block
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_same_with_and_without_gradients_and_the_input_stays(name, memory_format):
    block, x = build(name), image(memory_format)
    expected = block(x).detach()
    before = x.clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(block(x), expected)  # attention has other kernels for gradients
    assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "layer"), OVERWRITTEN)
def test_what_a_replaced_forward_has_kept_stays(name, layer):
    kept = kept_by(build(name), lambda block, keep: replace_forward(block, layer, keep))
    assert all(torch.equal(now, then) for now, then in kept)


def replace_forward(block, layer, keep):
    module = block.get_submodule(layer)
    forward = module.forward
    module.forward = lambda x: keep(forward(x))


@pytest.mark.parametrize(("name", "layer"), OVERWRITTEN)
def test_what_a_hook_has_kept_stays(name, layer):
    def hook(block, keep):
        return block.get_submodule(layer).register_forward_hook(of_result(keep))

    assert all(torch.equal(now, then) for now, then in kept_by(build(name), hook))


@every_block
def test_what_a_global_hook_has_kept_stays(name):
    def hook(block, keep):
        return register_module_forward_hook(of_result(keep))

    assert all(torch.equal(now, then) for now, then in kept_by(build(name), hook))


def of_result(keep):
    def hook(module, inputs, result):
        keep(result)

    return hook


def kept_by(block, install):
    """Pairs of what was kept and how it was when it was."""
    kept = []

    def keep(result):
        kept.append((result, result.clone()))
        return result

    handle = install(block, keep)
    try:
        with torch.no_grad():
            block(image())
    finally:
        if handle is not None:
            handle.remove()
    assert kept
    return kept


def test_a_parametrized_layer_is_left_alone():
    block = build("group norm")
    x = image()
    expected = block(x).detach()
    parametrizations.weight_norm(block.conv2)
    with torch.no_grad():
        assert_close(block(x), expected)


def test_a_sum_of_two_dtypes_keeps_the_wider():
    block = build("group norm")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert block(image()).dtype == torch.float32


def test_memory_is_used_again(monkeypatch):
    """Or the rest of this file would test nothing."""
    calls = []
    silu = nn.functional.silu
    monkeypatch.setattr(
        nn.functional, "silu",
        lambda x, inplace=False: calls.append(inplace) or silu(x, inplace=inplace),
    )  # fmt: skip
    block = build("group norm")
    block(image())
    with torch.no_grad():
        block(image())
    assert calls == [False, False, True, True]
