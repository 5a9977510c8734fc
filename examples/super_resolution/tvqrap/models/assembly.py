"""TVQ&RAP: the tokenizer, the super-resolver, and the losses of the three training stages.

1. ``TextureTokenizer`` encodes an image as a continuous *structure* and quantizes the residual
   *texture* given that structure. ``tokenizer_loss`` trains it.
2. ``SuperResolver`` gets the structure from the low-resolution image and predicts the indices.
   ``predictor_losses`` compares them with those of the tokenizer.
3. ``rap_loss``, reconstruction-aware prediction, compares decoded images instead.

An ``Architecture`` makes the networks: see convolutional.py for small ones, paper.py for the
authors'. Images are RGB in [0, 1]. In shapes, H x W is the high-resolution image, H/4 x W/4 the
low-resolution one, and H/g x W/g the grid of codes, with g = 8 or 4.

Li et al., "Texture Vector-Quantization and Reconstruction Aware Prediction for Generative
Super-Resolution", ICLR 2026, arXiv 2509.23774.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvqrap.images.layouts import Tiling, reflect
from vqprior import ChannelsFirst, Quantizer, QuantizerOutput, TextureQuantizer
from vqprior.functional import index_cross_entropy, select_codes
from vqprior.losses import alignment_loss

SCALE = 4  # high-resolution pixels for each low-resolution pixel, along a side

# Maps an image and its target to the loss and its terms, as vqprior.losses.ReconstructionAwareLoss.
Objective = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Architecture(Protocol):
    """A configuration that makes the networks of a model; it is saved with the weights."""

    codebook_size: int
    grid: int  # high-resolution pixels for each code, along a side
    tiling: Tiling

    def make_structure(self) -> nn.Module:
        """Returns a module with ``features(hr, lr, texture)``, ``expand(features)``,
        ``losses(features, hr)``, and ``regressed``: True if the features must be predicted, False
        if they are the low-resolution image.
        """

    def make_texture(self) -> nn.Module:
        """Returns the encoder from ``hr`` to texture ``(b, t, H/g, W/g)``."""

    def make_fusion(self) -> nn.Module:
        """Returns the map from ``(structure, texture)`` to the quantizer's input
        ``(b, d, H/g, W/g)``.
        """

    def make_quantizer(self) -> Quantizer:
        """Returns the quantizer of vectors of ``d`` features."""

    def make_decoder(self) -> nn.Module:
        """Returns the map from ``(structure + codes, lr)`` to an image; it has ``last_layer``."""

    def make_predictor(self) -> nn.Module:
        """Returns a module with ``trunk(lr)`` and, for regressed structure, ``regressor(trunk)``;
        called with ``(trunk, structure)`` it returns logits ``(b, H/g, W/g, k)``.
        """


@dataclasses.dataclass
class Step:
    """The loss of one batch, and what the trainer needs beside it."""

    loss: Tensor
    terms: dict[str, Tensor]
    indices: Tensor  # for codebook usage
    image: Tensor | None = None  # for a discriminator
    quantizer_output: QuantizerOutput | None = None  # for rules


class Tokenized(NamedTuple):
    """The result of a tokenizer's forward pass."""

    image: Tensor
    quantizer_output: QuantizerOutput
    terms: dict[str, Tensor]  # losses of the structure


class Description(NamedTuple):
    """The targets of a predictor."""

    features: Tensor  # of the structure
    indices: Tensor  # (b, H/g, W/g)


class TextureTokenizer(nn.Module):
    """Encodes an image as structure and texture codes, and decodes it; trained in stage 1."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config
        self.structure = config.make_structure()
        self.texture = config.make_texture()
        self.quantizer = TextureQuantizer(
            ChannelsFirst(config.make_quantizer()), fuse=config.make_fusion()
        )
        self.decoder = config.make_decoder()

    def forward(self, hr: Tensor, lr: Tensor, mask: Tensor | None = None) -> Tokenized:
        """Reconstructs ``hr`` from structure and codes; no codes where ``mask`` is False."""
        texture = self.texture(hr)
        features = self.structure.features(hr, lr, texture)
        out = self.quantizer(texture, self.structure.expand(features), mask)
        image = self.decoder(out.quantized, lr)
        return Tokenized(image, out, self.structure.losses(features, hr))

    @torch.no_grad()
    def describe(self, hr: Tensor, lr: Tensor) -> Description:
        """Returns the true features of the structure and the true indices."""
        texture = self.texture(hr)
        features = self.structure.features(hr, lr, texture)
        indices = self.quantizer.encode(texture, self.structure.expand(features))
        return Description(features, indices)

    @property
    def codes(self) -> Tensor:
        """The codebook ``(k, d)``."""
        return self.quantizer.codebooks[0].codes()


def tokenizer_loss(
    tokenizer: TextureTokenizer, hr: Tensor, lr: Tensor, objective: Objective, *,
    mask: Tensor | None = None, code_weight: Tensor | float = 1.0,
) -> Step:  # fmt: skip
    """Returns the loss of stage 1: reconstruction, codebook and structure.

    Places where ``mask`` ``(b, H/g, W/g)`` is False are decoded without codes.
    """
    image, out, structure_terms = tokenizer(hr, lr, mask)
    code_terms = {name: code_weight * term for name, term in out.terms.items()}
    loss, terms = objective(image, hr)
    loss = loss + sum(code_terms.values()) + sum(structure_terms.values())
    return Step(loss, terms | structure_terms | code_terms, out.indices, image, out)


class Prediction(NamedTuple):
    """The structure and the logits of the codes, predicted from the low-resolution image."""

    features: Tensor  # of the structure: the low-resolution image, or the regressed features
    structure: Tensor  # (b, d, H/g, W/g)
    logits: Tensor  # (b, H/g, W/g, k)


class SuperResolver(nn.Module):
    """Upscales images 4 times with a frozen tokenizer and a predictor of its codes.

    Without a predictor (``predictor=None``, as after stage 1) only the structure is decoded, which
    must then come from the low-resolution image.

    Attributes:
        texture_strength: Share of the predicted texture that is added to the structure, from 0
            (most faithful) to 1 (most detail). CodeFormer (Zhou et al., 2022) has such a weight.
    """

    def __init__(self, tokenizer: TextureTokenizer, predictor: nn.Module | None) -> None:
        super().__init__()
        if predictor is None and tokenizer.structure.regressed:
            raise ValueError(
                "`predictor` must be given for a tokenizer with regressed structure, which the "
                "predictor regresses; got None. Train `--stage predictor` first."
            )
        self.config = tokenizer.config
        self.tiling, self.codebook_size = self.config.tiling, self.config.codebook_size
        self.tokenizer = tokenizer.requires_grad_(requires_grad=False)
        self.predictor = predictor
        self.texture_strength = 1.0

    def predict(self, lr: Tensor) -> Prediction:
        """Returns structure and logits for sides that are multiples of ``tiling.multiple``."""
        if self.predictor is None:
            raise ValueError("`predict` needs a predictor, got None. Train `--stage predictor`.")
        trunk = self.predictor.trunk(lr)
        features = self.predictor.regressor(trunk) if self.tokenizer.structure.regressed else lr
        structure = self.tokenizer.structure.expand(features)
        return Prediction(features, structure, self.predictor(trunk, structure))

    def choose(self, prediction: Prediction, **options: object) -> Tensor:
        """Returns codes ``(b, H/g, W/g, d)``: the most likely, with options of ``select_codes``."""
        return select_codes(prediction.logits, self.tokenizer.codes.detach(), **options)[0]

    def decode(self, prediction: Prediction, codes: Tensor, lr: Tensor) -> Tensor:
        """Decodes structure plus codes."""
        features = prediction.structure + self.texture_strength * codes.movedim(-1, 1)
        return self.tokenizer.decoder(features, lr)

    def reconstruct(self, prediction: Prediction, lr: Tensor, **options: object) -> Tensor:
        """Decodes predicted codes; a loss on the image trains the predictor."""
        return self.decode(prediction, self.choose(prediction, **options), lr)

    def forward(self, lr: Tensor) -> Tensor:
        """Upscales images ``(b, 3, h, w)`` of any size to ``(b, 3, 4h, 4w)``; not clamped."""
        height, width = lr.shape[-2:]
        padded = reflect(lr, self.tiling.multiple)
        if self.predictor is None:
            image = self.tokenizer.decoder(self.tokenizer.structure.expand(padded), padded)
        else:
            image = self.reconstruct(self.predict(padded), padded)
        return image[..., : SCALE * height, : SCALE * width]

    @torch.no_grad()
    def indices(self, lr: Tensor) -> Tensor:
        """Returns the predicted indices, ``(b, H/g, W/g)`` with sizes rounded up; -1 without a
        predictor.
        """
        rows, columns = (-(-SCALE * side // self.config.grid) for side in lr.shape[-2:])
        if self.predictor is None:
            return torch.full((len(lr), rows, columns), -1, device=lr.device)
        logits = self.predict(reflect(lr, self.tiling.multiple)).logits
        return logits.argmax(dim=-1)[:, :rows, :columns]


def predictor_losses(
    model: SuperResolver, prediction: Prediction, hr: Tensor, lr: Tensor
) -> dict[str, Tensor]:
    """Returns the losses of stage 2: a prediction against the tokenizer's encoding of ``hr``."""
    truth = model.tokenizer.describe(hr, lr)
    terms = {"code": index_cross_entropy(prediction.logits, truth.indices)}
    if model.tokenizer.structure.regressed:
        # The paper's weights are 1 : 0.5; only their ratio matters to Adam.
        terms["structure"] = 2 * alignment_loss(prediction.features, truth.features)
    return terms


def rap_loss(
    model: SuperResolver, hr: Tensor, lr: Tensor, objective: Objective, *,
    code_weight: float = 0.0, **options: object,
) -> Step:  # fmt: skip
    """Returns the loss of stage 3: predicts codes, decodes them, and compares images.

    ``code_weight`` is the weight of the loss of stage 2, which is added; the paper has 0. Options
    of ``select_codes`` set the gradient estimator of the choice of codes.
    """
    prediction = model.predict(lr)
    image = model.reconstruct(prediction, lr, **options)
    loss, terms = objective(image, hr)
    if code_weight > 0:
        kept = predictor_losses(model, prediction, hr, lr)
        kept = {name: code_weight * term for name, term in kept.items()}
        loss, terms = loss + sum(kept.values()), terms | kept
    return Step(loss, terms, prediction.logits.argmax(dim=-1), image)


def upscale_bicubic(lr: Tensor) -> Tensor:
    """Upscales by 4 with Pillow's bicubic kernel."""
    return F.interpolate(lr, scale_factor=SCALE, mode="bicubic", antialias=True)
