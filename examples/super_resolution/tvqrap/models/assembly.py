"""TVQ&RAP, assembled from vqprior blocks: a texture tokenizer and a super-resolver over it.

The tokenizer (stage 1) describes an image by a continuous *structure* and by codes for the
*texture* that the structure does not explain. The super-resolver (stages 2 and 3) has only the
low-resolution image: it gets the structure from it, predicts the codes, and decodes both.

What networks these are made of is up to an ``Architecture``: convolutional.py has a small one,
paper.py the authors'.

Images are RGB in [0, 1]. Sizes in comments: H x W is the high-resolution image, the
low-resolution one is H/4 x W/4, codes live on the grid H/g x W/g with g = 8 or 4.

Method: Li et al., "Texture Vector-Quantization and Reconstruction Aware Prediction for Generative
Super-Resolution", ICLR 2026, arXiv 2509.23774.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior import ChannelsFirst, QuantizerOutput, TextureQuantizer, VectorQuantizer
from vqprior.functional import select_codes

SCALE = 4  # high-resolution pixels for each low-resolution pixel, along a side


class Architecture(Protocol):
    """A configuration that makes the networks of a model; saved with its weights.

    Attributes:
        codebook_size: Number of codes.
        grid: High-resolution pixels for each code, along a side.
        fold: Low-resolution pixels for each code, along a side.
        multiple: A side of a low-resolution image is padded to a multiple of this.
        overlap: Low-resolution pixels at the border of a tile that are not used.
        blend: Low-resolution pixels on either side of a border over which tiles are mixed.
        default_tile: Side of a tile in low-resolution pixels.
    """

    codebook_size: int
    grid: int
    fold: int
    multiple: int
    overlap: int
    blend: int
    default_tile: int

    def make_structure(self) -> nn.Module:
        """Has ``features(hr, lr, texture)``, ``expand(features)``, ``losses(features, hr)``, and
        ``regressed``: whether features have to be predicted, or are the low-resolution image.
        """

    def make_texture(self) -> nn.Module:
        """``hr`` to texture ``(b, t, H/g, W/g)``."""

    def make_fusion(self) -> nn.Module:
        """``(structure, texture)`` to what is quantized, ``(b, d, H/g, W/g)``."""

    def make_quantizer(self) -> VectorQuantizer:
        """Of vectors of ``d`` features."""

    def make_decoder(self) -> nn.Module:
        """``(structure + codes, lr)`` to an image; has a ``last_layer``."""

    def make_predictor(self) -> nn.Module:
        """Has ``trunk(lr)`` and, for regressed structure, ``regressor(trunk)`` to its features;
        called with ``(trunk, structure)`` it gives logits ``(b, H/g, W/g, k)``.
        """


def enlarge(lr: Tensor) -> Tensor:
    """Bicubic enlargement by 4, with the kernel that Pillow uses."""
    return F.interpolate(
        lr, scale_factor=SCALE, mode="bicubic", align_corners=False, antialias=True
    )


class Tokenized(NamedTuple):
    """What the tokenizer returns in training."""

    image: Tensor
    quantizer_output: QuantizerOutput
    terms: dict[str, Tensor]


class Description(NamedTuple):
    """What a predictor has to get from the low-resolution image."""

    features: Tensor  # of the structure
    indices: Tensor  # (b, H/g, W/g)


class TextureTokenizer(nn.Module):
    """Stage 1: an image as structure and texture codes, and back."""

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
        """Reconstructs ``hr`` from structure and codes; where ``mask`` is False, without codes."""
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


class Prediction(NamedTuple):
    """What the super-resolver knows before it decides on codes."""

    features: Tensor  # of the structure: the low-resolution image itself, or what was regressed
    structure: Tensor  # (b, d, H/g, W/g)
    logits: Tensor  # (b, H/g, W/g, k)


class SuperResolver(nn.Module):
    """A frozen tokenizer and a predictor of its codes: 4 times larger images.

    Without a predictor (``predictor=None``, as after stage 1) the texture is left out and the
    structure is decoded alone; that needs a structure from the low-resolution image.

    Attributes:
        texture: How much of the predicted texture is added to the structure, from 0 to 1. A guess
            that is not certain costs fidelity; less of it costs less, and shows less. CodeFormer
            (Zhou et al., 2022) calls such a weight that of fidelity.
    """

    scale = SCALE

    def __init__(self, tokenizer: TextureTokenizer, predictor: nn.Module | None) -> None:
        super().__init__()
        if predictor is None and tokenizer.structure.regressed:
            raise ValueError(
                "`predictor` must be given for a tokenizer with regressed structure: what it "
                "regresses the structure from is the predictor. Train `--stage predictor` first."
            )
        self.tokenizer = tokenizer.requires_grad_(requires_grad=False)
        self.predictor = predictor
        self.texture = 1.0

    @property
    def config(self) -> Architecture:
        """The architecture."""
        return self.tokenizer.config

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    @property
    def multiple(self) -> int:
        """A side of a low-resolution image is padded to a multiple of this."""
        return self.config.multiple

    @property
    def overlap(self) -> int:
        """Low-resolution pixels at the border of a tile that are not used."""
        return self.config.overlap

    @property
    def blend(self) -> int:
        """Low-resolution pixels on either side of a border over which tiles are mixed."""
        return self.config.blend

    @property
    def default_tile(self) -> int:
        """Side of a tile in low-resolution pixels."""
        return self.config.default_tile

    def predict(self, lr: Tensor) -> Prediction:
        """Returns structure and logits for sides that are multiples of ``multiple``."""
        if self.predictor is None:
            raise ValueError("`predict` needs a predictor, got none. Train `--stage predictor`.")
        trunk = self.predictor.trunk(lr)
        features = self.predictor.regressor(trunk) if self.tokenizer.structure.regressed else lr
        structure = self.tokenizer.structure.expand(features)
        return Prediction(features, structure, self.predictor(trunk, structure))

    def reconstruct(
        self,
        prediction: Prediction,
        lr: Tensor,
        *,
        estimator: str = "straight_through",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decodes predicted codes so that a loss on the image trains the predictor."""
        texture, _ = select_codes(
            prediction.logits,
            self.tokenizer.codes.detach(),
            estimator=estimator,
            temperature=temperature,
            generator=generator,
        )
        features = prediction.structure + self.texture * texture.movedim(-1, 1)
        return self.tokenizer.decoder(features, lr)

    def forward(self, lr: Tensor) -> Tensor:
        """Enlarges images ``(b, 3, h, w)`` of any size to ``(b, 3, 4h, 4w)``; not clamped."""
        height, width = lr.shape[-2:]
        lr = reflect(lr, self.multiple)
        if self.predictor is None:
            image = self.tokenizer.decoder(self.tokenizer.structure.expand(lr), lr)
        else:
            image = self.reconstruct(self.predict(lr), lr)
        return image[..., : SCALE * height, : SCALE * width]

    @torch.no_grad()
    def indices(self, lr: Tensor) -> Tensor:
        """Returns the predicted indices ``(b, H/g, W/g)``, rounded up; -1 without a predictor."""
        fold = self.config.fold
        rows, columns = (-(-side // fold) for side in lr.shape[-2:])
        if self.predictor is None:
            return torch.full((len(lr), rows, columns), -1, device=lr.device)
        logits = self.predict(reflect(lr, self.multiple)).logits
        return logits.argmax(dim=-1)[:, :rows, :columns]


def reflect(image: Tensor, multiple: int) -> Tensor:
    """Mirrors ``(..., h, w)`` at the bottom and on the right, up to multiples of ``multiple``.

    The last row is not repeated; an image smaller than what it lacks is mirrored several times.
    """
    for dim in (-2, -1):
        side = image.shape[dim]
        if missing := -side % multiple:
            order = np.pad(np.arange(side), (0, missing), mode="reflect")
            order = torch.from_numpy(order).to(image.device)
            image = image.index_select(dim, order)
    return image
