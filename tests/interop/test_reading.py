"""What every reader does with what it is given: strict, by name, before anything is built."""

import re

import pytest
import torch

from tests.interop.layouts import LAYOUTS, numbers
from vqprior import Quantizer, interop

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
ENTRIES = [(layout, key) for layout, (_, make) in LAYOUTS.items() for key in make()]
# A projection without a bias is a layout of its own.
REQUIRED = [
    pair for pair in ENTRIES if not re.search(r"vqp.*project_\w+(\.0)?\.bias", " ".join(pair))
]
# The size of a lone table is what it is; `initted` has none.
SIZED = [
    pair
    for pair in ENTRIES
    if not pair[1].endswith("initted")
    and pair != ("var-without", "embedding.weight")
    and not pair[0].startswith("taming")
]
USED = [pair for pair in ENTRIES if not re.search(r"cluster_size|avg|init|hit_SV|mask", pair[1])]
HOUSE_FORM = re.compile(r"`\w+` must [^\n]+, got [^\n]+\. [A-Z][^\n]+\.")


def of(layout, pairs):
    return [key for name, key in pairs if name == layout]


def sample(layout):
    torch.manual_seed(0)
    reader, make = LAYOUTS[layout]
    return reader, make()


def message(call, *arguments, **options):
    with pytest.raises(ValueError, match="must") as caught:
        call(*arguments, **options)
    assert HOUSE_FORM.fullmatch(str(caught.value)), caught.value
    return str(caught.value)


@pytest.fixture
def nothing_is_built(monkeypatch):
    def refuse(*_):
        pytest.fail("a module was built before every entry was checked")

    monkeypatch.setattr(Quantizer, "__init__", refuse)


@every_layout
def test_prefix_picks_the_quantizer_of_a_model(layout):
    reader, state = sample(layout)
    plain = reader(state)
    model = {f"model.quantize.{key}": value for key, value in state.items()}
    model |= {"model.encoder.weight": numbers(3), "embedding.weight": "not even a tensor"}
    picked = reader(model, prefix="model.quantize.")
    assert repr(picked) == repr(plain)
    for (name, one), (other, two) in zip(
        picked.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(one, two), name


@every_layout
def test_the_result_owns_its_tensors(layout):
    reader, state = sample(layout)
    before = {key: value.clone() for key, value in state.items()}
    quantizer = reader(state)
    for tensor in quantizer.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(state[key], before[key]) for key in state)


@every_layout
def test_the_dtype_is_that_of_the_checkpoint(layout):
    reader, state = sample(layout)
    for dtype in (torch.float16, torch.float64):
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        parameters = list(reader(cast).parameters())
        assert {parameter.dtype for parameter in parameters} <= {dtype}


@every_layout
def test_everything_the_reader_returns_trains(layout):
    reader, state = sample(layout)
    quantizer = reader(state).train()
    shape = (4, 4, quantizer.dim) if layout.startswith("var") else (12, quantizer.dim)
    x = torch.randn(2, *shape, requires_grad=True)
    out = quantizer(x)
    (out.quantized.square().sum() + out.loss).backward()
    assert x.grad.abs().sum() > 0
    untrained = [
        name
        for name, parameter in quantizer.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not untrained


@every_layout
def test_a_missing_entry_is_named(layout, nothing_is_built):
    for key in of(layout, REQUIRED):
        reader, state = sample(layout)
        del state[key]
        # Where other keys of its part are left, they are what cannot be placed.
        part = key.rpartition("weight")[0] or key
        found = message(reader, state)
        assert ("got no key at all" if not state else part) in found or key in found


@every_layout
def test_an_entry_of_another_shape_is_named(layout, nothing_is_built):
    for key in of(layout, ENTRIES):
        reader, state = sample(layout)
        state[key] = state[key].unsqueeze(0)
        assert f"at {key!r}, got {tuple(state[key].shape)}" in message(reader, state)


@every_layout
def test_an_entry_of_another_size_is_rejected(layout, nothing_is_built):
    for key in of(layout, SIZED):
        reader, state = sample(layout)
        state[key] = torch.cat([state[key], state[key][..., :1]], dim=-1)
        assert "`state_dict` must hold" in message(reader, state)


@every_layout
def test_an_unexpected_entry_is_named(layout, nothing_is_built):
    reader, state = sample(layout)
    state = {f"q.{key}": value for key, value in state.items()} | {"q.extra.running": numbers(2)}
    found = message(reader, state, prefix="q.")
    assert "`state_dict` must hold only tensors of a" in found
    assert "got 'q.extra.running'." in found


# An FSQ without projections has no entries.
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "vqp-fsq"])
def test_a_wrong_prefix_shows_what_there_is(layout, nothing_is_built):
    reader, state = sample(layout)
    found = message(reader, state, prefix="quantizer.")
    assert "`state_dict` must hold keys that begin with 'quantizer.'" in found
    assert repr(next(iter(state))) in found


@every_layout
def test_what_is_no_tensor_is_named(layout, nothing_is_built):
    reader, state = sample(layout)
    found = message(reader, {"params_ema": state})
    assert found == (
        "`state_dict` must hold tensors, got a dict at 'params_ema'. Pass the nested state dict."
    )


@every_layout
def test_integers_are_not_codes(layout, nothing_is_built):
    for key in of(layout, USED):
        reader, state = sample(layout)
        state[key] = state[key].to(torch.int8)
        assert f"a floating-point tensor at {key!r}, got torch.int8" in message(reader, state)


@pytest.mark.parametrize(
    ("layout", "key", "value", "expected"),
    [
        (
            "encodec",
            "vq.layers.1._codebook.inited",
            torch.zeros(1),
            "`state_dict` must hold an initialized codebook at "
            "'vq.layers.1._codebook.inited', got 0. Run a training step first.",
        ),
        (
            "vqp-vq",
            "_codebook.initted",
            torch.tensor(False),
            "`state_dict` must hold an initialized codebook at '_codebook.initted', got False. "
            "Run a training step first.",
        ),
        (
            "vqp-lfq",
            "mask",
            torch.tensor([1, 2, 4, 8, 16, 32]),
            "`state_dict` must hold [32, 16, 8, 4, 2, 1] at 'mask', got [1, 2, 4, 8, 16, 32]. Bits "
            "must go from the highest to the lowest.",
        ),
    ],
)
def test_values_that_contradict_the_layout(layout, key, value, expected, nothing_is_built):
    reader, state = sample(layout)
    assert message(reader, state | {key: value}) == expected


def test_a_stage_that_is_left_out_is_named(nothing_is_built):
    reader, state = sample("encodec")
    state = {key.replace("layers.2", "layers.7"): value for key, value in state.items()}
    assert "must hold 'vq.layers.2._codebook.embed'" in message(reader, state)


def test_heads_that_contradict_the_file(nothing_is_built):
    _, state = sample("vqp-vq-heads")
    assert message(interop.from_vqp_vector_quantize, state, heads=3) == (
        "`state_dict` must hold 1 or 3 codebooks at '_codebook.embed', got 2. Omit `heads`: each "
        "codebook has its own head."
    )


def test_heads_in_a_residual_quantizer(nothing_is_built):
    state = {f"layers.0.{k}": v for k, v in sample("vqp-vq-heads")[1].items()}
    assert message(interop.from_vqp_residual_vq, state) == (
        "`state_dict` must hold one codebook at 'layers.0._codebook.embed', got 2. Use "
        "`from_vqp_vector_quantize` for multi-head codebooks."
    )


def test_scales_that_contradict_the_file(nothing_is_built):
    _, state = sample("var")
    assert message(interop.from_var, state, metric="euclidean") == (
        "`state_dict` must hold a tensor of shape (10, 16) at 'ema_vocab_hit_SV', got (4, 16). "
        "Check the options of the quantizer."
    )


@pytest.mark.parametrize(
    "reader",
    [
        interop.from_vqp_vector_quantize,
        interop.from_vqp_residual_vq,
        interop.from_vqp_grouped_residual_vq,
    ],
)
def test_unknown_metric(reader):
    with pytest.raises(ValueError, match=r"`metric` must be one of 'cosine', 'euclidean', got"):
        reader({}, metric="dot")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: interop.from_vqp_vector_quantize({}, heads=0), "heads"),
        (lambda: interop.from_vqp_fsq({}, [3], residual=False, num_codebooks=0), "num_codebooks"),
        (lambda: interop.from_vqp_lfq({}, num_codebooks=0), "num_codebooks"),
    ],
)
def test_counts_are_at_least_one(call, name):
    with pytest.raises(ValueError, match=rf"`{name}` must be at least 1, got 0\."):
        call()
