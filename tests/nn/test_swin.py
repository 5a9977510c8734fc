"""SwinLayer against attention over the whole map with a mask written from its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior.nn import SwinLayer


def brute_force(layer, x):
    """Every position asks every other, and is refused unless their windows agree."""
    _, channels, height, width = x.shape
    m, shift, heads = layer.window_size, layer.shift, layer.num_heads
    positions = [(row, column) for row in range(height) for column in range(width)]
    tokens = torch.stack([x[:, :, row, column] for row, column in positions], dim=1)
    q, k, v = layer.qkv(layer.norm1(tokens)).chunk(3, dim=-1)
    size = channels // heads
    joined = torch.zeros_like(tokens)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
        for i, (row, column) in enumerate(positions):
            for j, (other_row, other_column) in enumerate(positions):
                same = (row - shift) // m == (other_row - shift) // m
                same &= (column - shift) // m == (other_column - shift) // m
                if same:
                    offset = (row - other_row + m - 1) * (2 * m - 1) + column - other_column + m - 1
                    logits[:, i, j] += layer.relative_bias[head, offset]
                else:
                    logits[:, i, j] = -torch.inf
        joined[..., part] = logits.softmax(dim=-1) @ v[..., part]
    tokens = tokens + layer.proj(joined)
    hidden = F.gelu(layer.mlp[0](layer.norm2(tokens)))
    tokens = tokens + layer.mlp[2](hidden)
    return tokens.transpose(1, 2).reshape(x.shape)


def make(**options):
    layer = SwinLayer(6, **{"num_heads": 2, "window_size": 3, **options}).double()
    # At their start the biases are too small to notice when they are wrong.
    with torch.no_grad():
        layer.relative_bias.normal_()
        for norm in (layer.norm1, layer.norm2):
            norm.weight.normal_()
            norm.bias.normal_()
    return layer.requires_grad_(False)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(6, 6), (7, 5), (2, 4), (1, 1), (3, 3)], ids=str)
def test_matches_brute_force_attention(size, shift):
    layer = make(shift=shift)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    assert_close(layer(x), brute_force(layer, x))


@given(h=st.integers(1, 6), w=st.integers(1, 6), m=st.integers(1, 4), data=st.data())
def test_matches_brute_force_attention_for_any_geometry(h, w, m, data):
    layer = make(window_size=m, shift=data.draw(st.integers(0, m - 1)), num_heads=1)
    x = torch.randn(1, 6, h, w, dtype=torch.float64)
    assert_close(layer(x), brute_force(layer, x))


@pytest.mark.parametrize("shift", [0, 2])
def test_a_position_sees_exactly_its_window(shift):
    layer = make(shift=shift)
    x = torch.randn(1, 6, 7, 8, dtype=torch.float64, requires_grad=True)
    layer(x)[0, :, 4, 5].sum().backward()
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    rows, columns = torch.arange(7), torch.arange(8)
    same_rows = (rows - shift) // 3 == (4 - shift) // 3
    same_columns = (columns - shift) // 3 == (5 - shift) // 3
    assert torch.equal(seen, same_rows.unsqueeze(1) & same_columns)


def test_every_parameter_learns_and_the_geometry_is_not_saved():
    layer = SwinLayer(6, num_heads=2, window_size=3, shift=1)
    layer(torch.randn(1, 6, 5, 5)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}


def test_hidden_features_follow_the_ratio():
    assert SwinLayer(6, num_heads=2, mlp_ratio=2.5).mlp[0].out_features == 15
    assert SwinLayer(6, num_heads=2, mlp_ratio=0.01).mlp[0].out_features == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4}, r"`channels` must be a positive multiple of num_heads = 4, got 6\."),
        ({"num_heads": 0}, r"`num_heads` must be at least 1, got 0\."),
        ({"window_size": 0}, r"`window_size` must be at least 1, got 0\."),
        ({"shift": 3}, r"`shift` must be in \[0, 3\), got 3\."),
        ({"shift": -1}, r"`shift` must be in \[0, 3\), got -1\."),
        ({"mlp_ratio": 0.0}, r"`mlp_ratio` must be greater than 0, got 0\.0\."),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        SwinLayer(6, **{"num_heads": 2, "window_size": 3, **options})
