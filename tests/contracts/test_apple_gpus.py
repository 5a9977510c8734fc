"""Every public call uses only what torch has on Apple GPUs (``mps``): its kernels, and no float64.

Checked on the CPU, against the table of kernels that torch comes with.
"""

import doctest
import re
import sys
from pathlib import Path

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.contracts.factories import QUANTIZERS, REPRESENTATIVE, RULES
from tests.contracts.layouts import draw, has
from tests.contracts.traits import learned_by_rules, ranks_codes
from tests.test_public_api import DEFINITIONS
from vqprior import MultiScaleQuantizer, _precision
from vqprior.losses import _filter_bank
from vqprior.metrics import FrechetDistance, StreamingMean, gmsd, psnr, ssim
from vqprior.testing import _subject

TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
# What computes in float64 on the host.
ON_THE_HOST = {
    function.__code__
    for function in (_precision.to_float64, _filter_bank._derivative_filters, _subject.close)
}


def kernels_of_apple_gpus():
    """Names of the operators with a kernel of their own, or composed of others that have one."""
    entries = TABLE.read_text().split("\n- func: ")[1:]
    table = {entry[: entry.index("(")]: entry for entry in entries}

    def is_there(name):
        delegate = re.search(r"\n  structured_delegate: (\S+)", table[name])
        keys = re.findall(r"\n    ([\w, ]+):", table[name])
        if delegate:
            return is_there(delegate[1])
        if not keys or "MPS" in re.findall(r"\w+", " ".join(keys)):
            return True
        # What has one implementation for all devices calls the one that writes into a tensor.
        writes = name + ("_out" if "." in name else ".out")
        return any("Composite" in key for key in keys) and (writes not in table or is_there(writes))

    return {name for name in table if is_there(name)}


class Watch(TorchDispatchMode):
    """Notes the operators of a call, and whether one makes a float64 tensor out of others."""

    def __init__(self):
        super().__init__()
        self.names, self.float64 = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not has_float64((args, kwargs)):  # all that follows from it is on the host, too
            name = func.name().removeprefix("aten::")
            if has_float64(result) and not is_on_the_host():
                self.float64.add(name)
            self.names.add(name)
        return result


def has_float64(tree):
    leaves = tree_leaves(tree)
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in leaves)


def is_on_the_host():
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in ON_THE_HOST:
            return True
        frame = frame.f_back
    return False


def quantizers(names=tuple(QUANTIZERS)):
    for name in names:
        quantizer = QUANTIZERS[name]().train()
        x = draw(quantizer, (4,)).requires_grad_()
        out = quantizer(x)
        (out.quantized.sum() + out.loss).backward()
        quantizer.decode(quantizer.encode(x))
        quantizer.quantize_as(x, out.indices)
        if ranks_codes(quantizer) and not has(quantizer, MultiScaleQuantizer):
            quantizer.logits(x).sum().backward()
        if learned_by_rules(quantizer):
            for rule in RULES.values():
                rule(quantizer).step(quantizer(x))


def examples():
    """Of all docstrings; what they print is checked elsewhere, and depends on float64."""
    for name, definition in DEFINITIONS.items():
        for test in doctest.DocTestFinder().find(definition, name, globs={}):
            doctest.DocTestRunner().run(test, out=lambda _: None)


def representatives():
    quantizers(REPRESENTATIVE)


@pytest.mark.parametrize(
    "calls",
    [
        representatives,
        pytest.param(quantizers, marks=pytest.mark.full),
        pytest.param(examples, marks=pytest.mark.full),
    ],
)
def test_every_call_finds_its_kernels(calls, monkeypatch):
    monkeypatch.setattr(_precision, "_WITHOUT_FLOAT64", {"cpu"})
    with Watch() as seen:
        calls()
    assert len(seen.names) > 80
    assert not seen.float64
    missing = {name for name in seen.names if "::" not in name} - kernels_of_apple_gpus()
    assert not missing


@pytest.mark.parametrize("score", [psnr, ssim, gmsd])
def test_metrics_in_float32_are_close_to_those_in_float64(score, monkeypatch):
    torch.manual_seed(0)
    ours = torch.rand(4, 3, 24, 24)
    theirs = (ours + 0.01 * torch.randn(4, 3, 24, 24)).clamp(0, 1)
    metric = StreamingMean(score)
    metric.update(ours, theirs)
    monkeypatch.setattr(_precision, "_WITHOUT_FLOAT64", {"cpu"})
    narrow = StreamingMean(score)
    narrow.update(ours, theirs)
    assert narrow.total.dtype == torch.float32
    assert narrow.compute() == pytest.approx(metric.compute(), rel=1e-4)
    narrow.load_state_dict(metric.state_dict())  # of another device
    assert narrow.compute() == pytest.approx(metric.compute(), rel=1e-6)


def test_frechet_distance_in_float32_is_close_to_that_in_float64(monkeypatch):
    torch.manual_seed(0)
    ours, theirs = torch.randn(500, 8), 1 + 2 * torch.randn(400, 8)
    metric = FrechetDistance(8)
    metric.update(ours, theirs)
    monkeypatch.setattr(_precision, "_WITHOUT_FLOAT64", {"cpu"})
    narrow = FrechetDistance(8)
    narrow.update(ours, theirs)
    assert narrow.scatters.dtype == torch.float32
    assert narrow.compute() == pytest.approx(metric.compute(), rel=1e-5)


def test_sums_move_to_a_device_without_float64(monkeypatch):
    monkeypatch.setattr(_precision, "_WITHOUT_FLOAT64", {"meta"})
    moved = FrechetDistance(3).to("meta")
    with torch.device("meta"):
        made = FrechetDistance(3)
    for metric in (moved, made):
        assert [b.dtype for b in metric.buffers()] == [torch.int64, torch.float32, torch.float32]
    assert FrechetDistance(3).half().means.dtype == torch.float64
    assert FrechetDistance(3).share_memory().means.is_shared()
