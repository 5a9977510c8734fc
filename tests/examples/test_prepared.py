"""Models made ready: memory format, precision, compilation."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._inductor import config as inductor
from torch.nn import functional as F

import upscale
from tests.examples.stand_in import StandIn
from tvqrap.cli import UserError, run
from tvqrap.images.files import read_image
from tvqrap.images.tiling import upscale_tiled
from tvqrap.models.prepared import Prepared
from tvqrap.models.weights import DEFAULT_WEIGHTS, load_super_resolver

CHANNELS_LAST = torch.channels_last


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # in inductor
class TestCompiled:
    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
    def test_gives_the_same(self):
        model = Quiet().eval()
        lr = torch.rand(3, 40, 20)
        compiled = upscale_tiled(Prepared(model, compiled=True), lr, dtype=torch.uint16)
        eager = upscale_tiled(model, lr, dtype=torch.uint16)
        torch.testing.assert_close(compiled.float(), eager.float(), rtol=0, atol=1)

    def test_without_a_compiler_is_one_line(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(upscale, "load_super_resolver", lambda path: Quiet().eval())
        images = [str(tmp_path / name) for name in ("a.png", "b.png")]
        for image in images:
            Image.new("RGB", (16, 12), "teal").save(image)
        command = [*images, "--output", str(tmp_path / "out"), "--compile", "--device", "cpu"]
        with inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
            status = run(lambda: upscale.main(command))
        err = capsys.readouterr().err
        assert err.startswith("error: --compile: the network cannot be compiled here: ")
        assert "no-such-compiler" in err
        assert len(err.splitlines()) == 1
        assert status == 2
        assert not list((tmp_path / "out").iterdir())

    def test_bugs_are_not_blamed_on_the_compiler(self):
        with pytest.raises(RuntimeError, match="channels"):
            Prepared(Quiet().eval(), compiled=True)(torch.rand(1, 4, 9, 9))


class Quiet(StandIn):
    """Keeps no list of calls, to which a compiled network could not add."""

    def forward(self, lr):
        upscaled = F.interpolate(lr, scale_factor=4, mode="bicubic")
        return upscaled + 0.1 * torch.tanh(self.filter(upscaled))


def test_a_prepared_model_is_the_model():
    model = StandIn().eval()
    prepared = Prepared(model)
    assert prepared.tiling == model.tiling
    lr = torch.rand(2, 3, 11, 9)
    layouts = []
    model.filter.register_forward_pre_hook(
        lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=CHANNELS_LAST))
    )
    with torch.no_grad():
        torch.testing.assert_close(prepared(lr), StandIn.forward(model, lr))
    assert layouts == [True, False]
    assert model.filter.weight.is_contiguous(memory_format=CHANNELS_LAST)


def test_the_shipped_weights_do_not_mind_the_memory_format():
    lr = read_image(Path(upscale.__file__).parent / "photos" / "flower.jpg").rgb[
        :, 100:148, 100:140
    ]
    with torch.no_grad():
        plain = load_super_resolver(DEFAULT_WEIGHTS)(lr[None])
        prepared = Prepared(load_super_resolver(DEFAULT_WEIGHTS))(lr[None])
        rounded = Prepared(load_super_resolver(DEFAULT_WEIGHTS), precision="bfloat16")(lr[None])
    torch.testing.assert_close(prepared, plain, rtol=0, atol=1e-5)
    assert 1e-5 < (rounded - plain).abs().mean() < 2 / 255


def test_memory_that_runs_out_in_a_prepared_model_stays_that():
    model = StandIn().eval()

    def forward(lr):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    model.forward = forward
    with pytest.raises(UserError, match=r"pass a smaller --tile$"):
        upscale_tiled(Prepared(model), torch.rand(3, 9, 9))
