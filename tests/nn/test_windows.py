"""What ``SwinLayer`` remembers between calls, and that it never shows in a result."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.testing import assert_close

from vqprior.nn import SwinLayer
from vqprior.nn._windows import arrange_windows

# With windows of 4: whole windows only, a shift by half, one that leaves three lengths, and maps
# smaller than a window. In turn, so that each call follows one of another size.
SIZES = [(8, 8), (9, 14), (12, 4), (3, 2), (13, 7), (1, 1), (8, 8), (5, 16)]


@pytest.fixture(autouse=True)
def _nothing_remembered():
    arrange_windows.cache_clear()


def make(shift=2, **options):
    torch.manual_seed(1)
    layer = SwinLayer(8, **{"num_heads": 2, "window_size": 4, "shift": shift, **options})
    # At their start the biases are too small to notice when they are wrong.
    torch.nn.init.normal_(layer.relative_bias)
    return layer


def by_definition(layer, x):
    """Attention over the whole map, which a mask written from the definition cuts up."""
    batch, channels, height, width = x.shape
    m, heads = layer.window_size, layer.num_heads
    tokens = x.flatten(2).transpose(1, 2)
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    row_windows = (rows - layer.shift).div(m, rounding_mode="floor")
    column_windows = (columns - layer.shift).div(m, rounding_mode="floor")
    same = (row_windows[:, None] == row_windows) & (column_windows[:, None] == column_windows)
    names = (rows[:, None] - rows + m - 1) * (2 * m - 1) + columns[:, None] - columns + m - 1
    bias = layer.relative_bias[:, names.where(same, 0)]
    q, k, v = layer.qkv(layer.norm1(tokens)).view(batch, -1, 3, heads, channels // heads).unbind(2)
    logits = torch.einsum("bihe,bjhe->bhij", q, k) / (channels // heads) ** 0.5 + bias
    weights = logits.masked_fill(~same, -torch.inf).softmax(dim=-1)
    joined = torch.einsum("bhij,bjhe->bihe", weights, v).reshape(tokens.shape)
    tokens = tokens + layer.proj(joined)
    tokens = tokens + layer.mlp(layer.norm2(tokens))
    return tokens.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_values_and_gradients_are_those_of_the_definition(shift, batch):
    layer = make(shift).double()
    for size in SIZES:
        x = torch.randn(batch, 8, *size, dtype=torch.float64, requires_grad=True)
        direction = torch.randn_like(x)
        out, expected = layer(x), by_definition(layer, x)
        assert_close(out, expected)
        wanted = [x, *layer.parameters()]
        assert_close(
            torch.autograd.grad(out, wanted, direction),
            torch.autograd.grad(expected, wanted, direction),
        )


def test_an_empty_batch_stays_empty():
    assert make()(torch.zeros(0, 8, 5, 6)).shape == (0, 8, 5, 6)


def test_what_is_remembered_is_bounded_and_shared():
    layers = [make(shift) for shift in (0, 2)]
    for _ in range(3):
        for layer in layers * 2:
            layer(torch.randn(1, 8, 6, 5))
    assert arrange_windows.cache_info()[:2] == (10, 2)
    limit = arrange_windows.cache_info().maxsize
    for width in range(1, limit + 10):
        layers[0](torch.randn(1, 8, 3, width))
    assert arrange_windows.cache_info().currsize == limit <= 16


def test_positions_come_window_by_window():
    windows = arrange_windows(2, 3, 5, 4, 2, torch.device("cpu"))
    # Rows 0-1 and 2, columns 0-1 and 2-4: four shapes of window, one of each in both images.
    assert windows.shapes == ((2, 4), (2, 6), (2, 2), (2, 3))
    assert windows.order[:8].tolist() == [0, 1, 5, 6, 15, 16, 20, 21]
    assert windows.order[-3:].tolist() == [27, 28, 29]
    assert torch.equal(windows.order[windows.place], torch.arange(30))


def test_windows_of_one_shape_lie_together():
    # A shift by half cuts the first and the last windows to equal halves.
    shapes = arrange_windows(1, 16, 24, 8, 4, torch.device("cpu")).shapes
    assert shapes == ((4, 16), (4, 32), (2, 32), (2, 64))


@pytest.mark.parametrize("grad", [False, True])
def test_parameters_are_never_remembered(grad):
    layer, x = make(), torch.randn(2, 8, 9, 6)
    with torch.set_grad_enabled(grad):
        layer(x)
        layer.relative_bias.data.mul_(3)  # unseen by version counters
        assert_close(layer(x), by_definition(layer, x))
        layer.relative_bias.data = torch.randn_like(layer.relative_bias)
        assert_close(layer(x), by_definition(layer, x))
        layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})
        # Numbers this large are rounded in their fifth digit.
        assert_close(layer(x), by_definition(layer, x), rtol=1e-4, atol=1e-3)


def test_a_step_of_an_optimizer_shows_in_the_next_call():
    layer, x = make(), torch.randn(2, 8, 9, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        out = layer(x)
        assert_close(out, by_definition(layer, x))
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()


def test_copies_and_state_know_nothing_of_earlier_calls():
    layer, x = make(), torch.randn(2, 8, 9, 6)
    names, size = set(layer.state_dict()), len(pickle.dumps(layer))
    out = layer(x)
    assert set(layer.state_dict()) == names == {name for name, _ in layer.named_parameters()}
    assert len(pickle.dumps(layer)) == size
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), out)
        arrange_windows.cache_clear()
        assert torch.equal(other(x), out)


def test_dtypes_can_change_between_calls():
    layer, x = make(), torch.randn(2, 8, 9, 6)
    out = layer(x)
    assert_close(layer.double()(x.double()).float(), out)
    for dtype in (torch.float16, torch.bfloat16):
        low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        assert_close(low.float(), out, rtol=0, atol=0.05)
    assert_close(layer.float()(x), out)


def test_devices_do_not_mix():
    layer, x = make(), torch.randn(2, 8, 9, 6)
    out = layer(x)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).device.type == "meta"
    assert torch.equal(layer(x), out)


@pytest.mark.gpu
def test_on_a_gpu_and_back():
    layer, x = make(), torch.randn(2, 8, 9, 6)
    out = layer(x)
    assert_close(layer.cuda()(x.cuda()).cpu(), out, rtol=1e-3, atol=1e-3)
    assert_close(layer.cpu()(x), out)


@pytest.mark.gpu
def test_a_cuda_graph_holds_nothing_that_can_be_forgotten():
    layer, x = make().cuda().requires_grad_(False), torch.randn(2, 8, 9, 6, device="cuda")
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    before = arrange_windows.cache_info()
    with torch.cuda.graph(graph):
        out = layer(x)
    assert arrange_windows.cache_info() == before
    graph.replay()
    assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_inference_mode_first_and_training_after():
    layer, x = make(), torch.randn(2, 8, 9, 6)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.relative_bias.grad.isfinite().all()


def test_threads_may_share_a_layer():
    layer = make().requires_grad_(False)
    inputs = [torch.randn(1, 8, 3 + i % 5, 4 + i % 7) for i in range(40)]
    expected = [layer(x) for x in inputs]
    arrange_windows.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        for out, wanted in zip(pool.map(layer, inputs), expected, strict=True):
            assert torch.equal(out, wanted)


@pytest.mark.full
@pytest.mark.parametrize("shift", [0, 2])
def test_compiles_before_and_after_eager_calls(shift):
    layer = make(shift)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=False)
    for size in SIZES[1:3]:
        x = torch.randn(2, 8, *size)
        before = arrange_windows.cache_info()
        out = compiled(x)
        # A trace may neither leave its tensors to others nor keep theirs.
        assert arrange_windows.cache_info() == before
        assert_close(out, by_definition(layer, x))
        assert_close(layer(x), by_definition(layer, x))
        assert_close(compiled(x), by_definition(layer, x))


def test_fake_tensors_leave_nothing_behind():
    layer = make()
    state = {**layer.state_dict(), "relative_index": layer.relative_index}
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(tensor) for name, tensor in state.items()}
        fake = torch.func.functional_call(layer, state, (torch.randn(2, 8, 9, 6),))
    assert fake.shape == (2, 8, 9, 6)
    assert arrange_windows.cache_info().currsize == 0


def test_transforms_leave_nothing_behind():
    layer, x = make(), torch.randn(3, 2, 8, 9, 6)
    expected = [by_definition(layer, part) for part in x]
    assert_close(torch.func.vmap(layer)(x), torch.stack(expected))
    arrange_windows.cache_clear()
    with torch.no_grad():  # until torch 2.9, it picks a kernel without a gradient to the bias
        assert_close(torch.func.functionalize(lambda part: layer(part))(x[0]), expected[0])
    assert_close(layer(x[0]), expected[0])


@pytest.mark.full
@pytest.mark.parametrize("shift", [0, 2])
def test_one_exported_graph_fits_other_sizes(shift):
    layer = make(shift).eval()
    layer(torch.randn(2, 8, 9, 14))
    sizes = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
    program = torch.export.export(layer, (torch.randn(2, 8, 9, 14),), dynamic_shapes=(sizes,))
    module = program.module()
    for shape in [(2, 8, 9, 14), (3, 8, 13, 7), (2, 8, 6, 10)]:
        x = torch.randn(shape)
        assert_close(module(x), by_definition(layer, x))
        assert_close(layer(x), by_definition(layer, x))
