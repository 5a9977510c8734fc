"""The report of train_all.py: scores of the weights of every stage on three degradations."""

import copy
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from tvqrap.cli import UserError
from tvqrap.degradations.mixture import Mild, SecondOrderBatch, reduce
from tvqrap.images.files import preview, read_image
from tvqrap.images.panels import contact_sheet
from tvqrap.models.assembly import SuperResolver, TextureTokenizer, upscale_bicubic
from tvqrap.training.photos import check_damage, find_photos
from vqprior.functional import select_codes
from vqprior.metrics import psnr, rgb_to_luma

COUNT = {"cuda": 24}  # photos
FEW = 4
SIDE = 256  # side of the center crop of each
PART = 8  # images computed at once
BORDER = 4  # pixels at the border that are not measured
SHOWN = 12  # rows of the sheet
ZOOM = 128  # side of the part of an image that the sheet shows
DECISIONS = ("structure", "arg-max", "sampled", "true")
Model = TextureTokenizer | SuperResolver
Scores = dict[str, float]


class Samples(NamedTuple):
    """Originals, and their low-resolution versions by the name of the degradation."""

    hr: Tensor
    lr: dict[str, Tensor]
    damage: list[str]  # why photos were left out, a line for each


def read_samples(folder: Path, device: torch.device) -> Samples:
    """Cuts center crops from the first photos and degrades them in three ways, deterministically.

    Photos that cannot be read are left out, with a note for each.

    Raises:
        UserError: If no photo is large enough, or none can be read.
    """
    squares, damage = [], []
    paths = find_photos(folder)
    for path in paths:
        if len(squares) == COUNT.get(device.type, FEW):
            break
        try:
            image = preview(read_image(path))
        except UserError as error:
            damage.append(str(error))
            continue
        left, top = ((side - SIDE) // 2 for side in image.size)
        if min(left, top) >= 0:
            square = image.crop((left, top, left + SIDE, top + SIDE))
            levels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
            squares.append(levels.reshape(SIDE, SIDE, 3).permute(2, 0, 1))
    check_damage(damage, len(paths), "is not measured")
    if not squares:
        raise UserError(f"{folder}: no photo of at least {SIDE} x {SIDE} pixels")
    hr = torch.stack(squares).float() / 255
    clean = reduce(hr)
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same for all devices
    mild = Mild()(clean, generator)
    severe = SecondOrderBatch()(hr, generator)
    lr = {"clean": clean, "mild": mild, "severe": severe}
    lr = {name: ((x.clamp(0, 1) * 255).round() / 255).to(device) for name, x in lr.items()}
    return Samples(hr.to(device), lr, damage)


class Reporter:
    """Collects models, and measures them at the end.

    Args:
        samples: Images to measure on; None to measure nothing.
        perceptual: The perceptual distance.
    """

    def __init__(self, samples: Samples | None, perceptual: nn.Module) -> None:
        self.samples = samples
        self.perceptual = perceptual
        self.models: dict[str, Model] = {}

    def keep(self, name: str, model: Model) -> None:
        """Stores a copy of a model, to be measured."""
        self.models[name] = copy.deepcopy(model).eval()

    @torch.no_grad()
    def measure(self, seconds: float) -> tuple[dict, Image.Image | None]:
        """Returns all scores, and a sheet of the last model's images.

        Args:
            seconds: Time after which no further model is measured; the last model comes first.
        """
        if self.samples is None or not self.models:
            return {}, None
        started = time.monotonic()
        hr, lr = self.samples.hr, self.samples.lr
        bicubic = {kind: upscale_bicubic(x) for kind, x in lr.items()}
        report = {kind: {"bicubic": self._score(x)} for kind, x in bicubic.items()}
        shown = []
        for name, model in reversed(self.models.items()):
            if shown and time.monotonic() - started > seconds:
                break
            for kind, x in lr.items():
                decoded = {decision: decode(model, hr, x, decision) for decision in DECISIONS}
                decoded = {d: image for d, image in decoded.items() if image is not None}
                report[kind][name] = {d: self._score(p) for d, p in decoded.items()}
                if name == next(reversed(self.models)):
                    shown.append({"bicubic": bicubic[kind], **decoded, "original": hr})
        return {"photos": len(hr), "scores": report}, self._sheet(shown)

    def lines(self, report: dict) -> list[str]:
        """Returns the scores as lines of text."""
        lines = []
        for kind, rows in report.get("scores", {}).items():
            for name, scores in rows.items():
                for decision, score in scores.items() if name != "bicubic" else [("", scores)]:
                    numbers = "  ".join(f"{key} {value:.4f}" for key, value in score.items())
                    lines.append(f"{kind:7} {name:10} {decision:10} {numbers}")
        return lines

    def _score(self, image: Tensor) -> Scores:
        inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
        hr, image = self.samples.hr, image.clamp(0, 1)
        luma = psnr(rgb_to_luma(image)[inner], rgb_to_luma(hr)[inner]).mean()
        parts = zip(image.split(PART), hr.split(PART), strict=True)
        distance = sum(self.perceptual(a, b) * len(a) for a, b in parts) / len(hr)
        return {"psnr": float(luma), "perceptual": float(distance)}

    def _sheet(self, shown: list[dict[str, Tensor]]) -> Image.Image:
        rows = []
        for number in range(SHOWN):
            images = shown[number % len(shown)]
            which = number % len(self.samples.hr)
            rows.append([(name, _pixels(x[which])) for name, x in images.items()])
        return contact_sheet(rows, gap=4, font_size=14)


def decode(model: Model, hr: Tensor, lr: Tensor, decision: str) -> Tensor | None:
    """Returns images decoded with codes chosen in one way; None if the model cannot do that.

    ``"structure"`` uses no codes, ``"true"`` those of the original; ``"arg-max"`` and ``"sampled"``
    need a predictor.
    """
    tokenizer = model.tokenizer if isinstance(model, SuperResolver) else model
    if decision in ("arg-max", "sampled") and not isinstance(model, SuperResolver):
        return None
    if tokenizer.structure.regressed:
        return None
    generator = torch.Generator(lr.device).manual_seed(0)
    images = []
    for large, small in zip(hr.split(PART), lr.split(PART), strict=True):
        structure = tokenizer.structure.expand(small)
        if decision == "true":
            texture = tokenizer.codes[tokenizer.describe(large, small).indices].movedim(-1, 1)
        elif decision == "structure":
            texture = torch.zeros_like(structure)
        else:
            estimator = "straight_through" if decision == "arg-max" else "gumbel"
            texture, _ = select_codes(
                model.predict(small).logits, tokenizer.codes, estimator=estimator,
                generator=generator,
            )  # fmt: skip
            texture = texture.movedim(-1, 1)
        images.append(tokenizer.decoder(structure + texture, small))
    return torch.cat(images)


def _pixels(image: Tensor) -> Image.Image:
    """Returns the center of an image, enlarged."""
    first = (SIDE - ZOOM) // 2
    image = image[:, first : first + ZOOM, first : first + ZOOM]
    levels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(levels).resize((2 * ZOOM, 2 * ZOOM), Image.Resampling.NEAREST)
