"""The table of everything that is measured of the paper's super-resolver."""

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.paper import training
from tests.benchmarks.paper.release_form import in_release_form
from tests.benchmarks.timing import Measured, Settings, alternate, seconds_of, summarize
from tvqrap.images.layouts import Blended, seen_share
from tvqrap.images.tiling import upscale_tiled
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.models.paper import PaperConfig
from tvqrap.models.prepared import Prepared
from vqprior.metrics import psnr

QUICK = PaperConfig(width=8, codebook_size=16, predictor_depth=2)
FASTER, AS_MUCH = "times faster", "times as much"
RELEASE, LARGE_PRODUCT = "the release's form, float32", "the rate of a large product"
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
ROUNDS_OF_TILES = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One row; ``needs`` is a kind of device or empty."""

    part: str
    what: str
    measure: Callable[[Settings], Measured]
    against: str = ""
    target: tuple[str, float] | None = None
    needs: str = ""


@cache
def model_of(settings: Settings) -> SuperResolver:
    """Returns the network with initial weights, which do not affect its speed."""
    torch.manual_seed(0)
    config = QUICK if settings.quick else PaperConfig()
    model = SuperResolver(TextureTokenizer(config), config.make_predictor())
    return model.eval().to(settings.device)


@cache
def release_of(settings: Settings) -> torch.nn.Module:
    """Returns the same network in the release's form."""
    return in_release_form(model_of(settings))


@cache
def prepared(settings: Settings, precision: str, compiled: bool = False) -> Prepared:
    """Returns the network as upscale.py runs it."""
    torch.manual_seed(0)
    config = QUICK if settings.quick else PaperConfig()
    model = SuperResolver(TextureTokenizer(config), config.make_predictor())
    model.load_state_dict(model_of(settings).state_dict())
    model = model.eval().to(settings.device)
    return Prepared(model, precision=precision, compiled=compiled)


def images(settings: Settings, side: int, batch: int = 1) -> Tensor:
    """Returns random low-resolution images; content does not affect the time."""
    generator = torch.Generator().manual_seed(side)
    return torch.rand(batch, 3, side, side, generator=generator).to(settings.device)


def work(settings: Settings) -> Measured:
    """Measures billions of operations for an image of 64 x 64, of convolutions and products."""
    ours, release = (
        operations(model, settings) / 1e9 for model in (model_of(settings), release_of(settings))
    )
    return Measured("GFLOP", ours, note=f"{release:.1f} in the release's form")


def operations(model: torch.nn.Module, settings: Settings) -> int:
    # As products, because the counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images(settings, 64))
    return counter.get_total_flops()


@dataclasses.dataclass(frozen=True)
class Against:
    """Measures how much faster ours is than the release's form."""

    precision: str

    @torch.inference_mode()
    def __call__(self, settings: Settings) -> Measured:
        lr = images(settings, 64)
        ours, release = prepared(settings, self.precision), release_of(settings)
        for call in (ours, release):
            call(lr)
        seconds = alternate(lambda: ours(lr), lambda: release(lr), settings)
        return summarize(seconds[:, 1] / seconds[:, 0], FASTER, seconds)


@torch.inference_mode()
def release_rate(settings: Settings) -> Measured:
    """Measures the rate of the release's form relative to a large product's, in each round."""
    lr, release = images(settings, 64), release_of(settings)
    side = 256 if settings.quick else PRODUCT_SIDE[settings.device]
    left, right = torch.randn(2, side, side, device=settings.device)
    work_of_both = np.array([operations(release, settings), 2 * side**3])
    release(lr)
    seconds = alternate(lambda: release(lr), lambda: left @ right, settings)
    rates = work_of_both / seconds
    note = f"{np.median(rates[:, 0]) / 1e9:.0f} of {np.median(rates[:, 1]) / 1e9:.0f} GFLOP/s"
    return summarize(100 * rates[:, 0] / rates[:, 1], "%", seconds, note)


@torch.inference_mode()
def rounding(settings: Settings) -> Measured:
    """Measures the PSNR of bfloat16 to float32 for images decoded from the same codes."""
    lr = images(settings, 64)
    exact, rounded = prepared(settings, "float32"), prepared(settings, "bfloat16")
    prediction = exact.network.predict(lr)
    image = exact.network.reconstruct(prediction, lr)
    with torch.autocast(settings.device, torch.bfloat16):
        again = rounded.network.predict(lr)
        same_codes = rounded.network.reconstruct(prediction._replace(structure=again.structure), lr)
    same = (prediction.logits.argmax(-1) == again.logits.argmax(-1)).float().mean()
    value = float(psnr(same_codes.float(), image).mean())
    return Measured("dB", value, note=f"{100 * float(same):.1f}% of the indices are the same")


@torch.inference_mode()
def tiles(settings: Settings) -> Measured:
    """Measures the time per pixel of a 2000 x 2000 result in tiles against one tile."""
    model = prepared(settings, "float32")
    side, alone = (150, 128) if settings.quick else (500, 256)
    layout = Blended(52) if settings.quick else Blended()
    lr, tile = torch.rand(3, side, side), images(settings, alone)
    rounds = []
    for _ in range(ROUNDS_OF_TILES):
        whole = seconds_of(lambda: upscale_tiled(model, lr, layout), settings.device)
        one = seconds_of(lambda: model(tile), settings.device)
        rounds.append((whole / side**2, one / alone**2))
    seconds = np.array(rounds)
    seen = seen_share(layout, model.tiling, side, side)
    note = f"the network sees {seen:.3f} times as many pixels"
    return summarize(seconds[:, 0] / seconds[:, 1], AS_MUCH, seconds * [side**2, alone**2], note)


@dataclasses.dataclass(frozen=True)
class Milliseconds:
    """Measures one call on images of 64 x 64."""

    precision: str
    batch: int
    compiled: bool = False

    @torch.inference_mode()
    def __call__(self, settings: Settings) -> Measured:
        lr = images(settings, 64, self.batch)
        model = prepared(settings, self.precision, self.compiled)
        for _ in range(3):
            model(lr)
        seconds = alternate(lambda: model(lr), lambda: None, settings)[:, 0]
        return summarize(1000 * seconds, "ms")


def _cases() -> tuple[Case, ...]:
    at_most, at_least = (lambda value: ("at most", value)), (lambda value: ("at least", value))
    cases = [
        Case("work", "operations", work, target=at_most(188)),
        Case("speed", "float32", Against("float32"), RELEASE, at_least(1.2)),
        Case("speed", "bfloat16", Against("bfloat16"), RELEASE, at_least(1.8)),
        Case("speed", "the release's form", release_rate, LARGE_PRODUCT),
        Case("precision", "the same codes, bfloat16 against float32", rounding),
        Case("tiles", "2000 x 2000 in tiles", tiles, "one tile", at_most(1.1), "cpu"),
    ]
    cases += [
        Case("training", f"--stage {stage}, step", training.Step(stage), needs="cpu")
        for stage in training.STAGES
    ]
    cases += [
        Case("calls", f"{'compiled' if compiled else 'eager'}, {precision}, batch {batch}",
             Milliseconds(precision, batch, compiled), needs=device)
        for device, batches in (("cpu", (1,)), ("cuda", (1, 16)))
        for compiled in (False, True)
        for precision in ("float32", "bfloat16")
        for batch in batches
    ]  # fmt: skip
    return tuple(cases)


CASES = _cases()
PARTS_IN_ORDER = tuple(dict.fromkeys(case.part for case in CASES))
