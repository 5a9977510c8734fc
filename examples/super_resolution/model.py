"""TVQ&RAP, assembled from vqprior blocks: a texture tokenizer and a super-resolver over it.

The tokenizer (stage 1) describes a picture by a continuous *structure* and by codes for the
*texture* that the structure does not explain. The super-resolver (stages 2 and 3) has only the
low-resolution picture: it gets the structure from it, predicts the codes, and decodes both.

Pictures are RGB in [0, 1]. Sizes in comments: H x W is the high-resolution picture, the
low-resolution one is H/4 x W/4, codes live on the grid H/g x W/g with g = 8 or 4.

Method: Li et al., "Texture Vector-Quantization and Reconstruction Aware Prediction for Generative
Super-Resolution", ICLR 2026, arXiv 2509.23774. Where the presets here differ from the paper, the
model card (weights/README.md) says so.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior import (
    ChannelFirst,
    IndexPredictor,
    QuantizerOutput,
    TextureQuantizer,
    VectorQuantizer,
)
from vqprior.functional import select_codes
from vqprior.losses import alignment_loss
from vqprior.nn import Downsample, ResidualBlock, Upsample

SCALE = 4  # high-resolution pixels for each low-resolution pixel, along a side


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to build a model; saved with its weights.

    Attributes:
        structure: Where the structure comes from: ``"lowres"``, computed from the low-resolution
            picture, or ``"regressed"``, the paper's: encoded at H/32 from the high-resolution
            picture and regressed when that is not there.
        grid: High-resolution pixels for each code, along a side: 8 (the paper's) or 4.
        width: Channels at H/4.
        codebook_size: Number of codes.
        structure_blocks: Residual blocks of the structure network.
        texture_blocks: Residual blocks of the texture encoder.
        decoder_blocks: Residual blocks of the decoder.
        predictor_width: Channels of the predictor at H/4.
        predictor_blocks: Residual blocks of the predictor at H/4.
        head_blocks: Residual blocks of the predictor at H/g.
    """

    structure: str = "lowres"
    grid: int = 8
    width: int = 64
    codebook_size: int = 512
    structure_blocks: int = 3
    texture_blocks: int = 3
    decoder_blocks: int = 6
    predictor_width: int = 64
    predictor_blocks: int = 6
    head_blocks: int = 2

    @property
    def fold(self) -> int:
        """Positions at H/4 for each code, along a side."""
        return self.grid // SCALE

    @property
    def code_dim(self) -> int:
        """Features of one code: those of all its positions at H/4."""
        return self.fold**2 * self.width


PRESETS = {
    # Trains on one CPU thread in about an hour.
    "tiny": ModelConfig(),
    # For a GPU and half an hour.
    "small": ModelConfig(
        width=72,
        codebook_size=1024,
        structure_blocks=5,
        texture_blocks=4,
        decoder_blocks=10,
        predictor_width=88,
        predictor_blocks=12,
        head_blocks=3,
    ),
}


def block(in_channels: int, out_channels: int | None = None) -> ResidualBlock:
    """A residual block without normalization: what a pixel becomes depends on its surroundings
    alone, not on the size of the picture, so tiles join without seams.
    """
    return ResidualBlock(in_channels, out_channels, norm=nn.Identity)


def blocks(channels: int, count: int) -> nn.Sequential:
    """A stack of residual blocks."""
    return nn.Sequential(*[block(channels) for _ in range(count)])


class LowResolutionStructure(nn.Module):
    """Structure that the receiver computes itself: nothing of the low-resolution picture is lost,
    and training and inference see the same thing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.multiple = config.fold  # of low-resolution pixels that a side must have
        self.network = nn.Sequential(
            nn.Conv2d(3, config.width, 3, padding=1),
            blocks(config.width, config.structure_blocks),
            nn.PixelUnshuffle(config.fold),
        )

    def forward(self, hr: Tensor, lr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the structure on the grid of codes; it adds no loss. ``hr`` is not used."""
        return self.network(lr), {}


class RegressedStructure(nn.Module):
    """The paper's structure: H/32, kept free of texture by alignment to a low-resolution latent."""

    multiple = 32 // SCALE
    channels = 64

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.encoder = nn.Sequential(  # H -> H/32
            nn.PixelUnshuffle(8),
            nn.Conv2d(192, 2 * width, 3, padding=1),
            blocks(2 * width, config.structure_blocks),
            Downsample(2 * width),
            block(2 * width),
            Downsample(2 * width),
            block(2 * width, self.channels),
            nn.Conv2d(self.channels, self.channels, 3, padding=1),
        )
        self.expander = nn.Sequential(  # H/32 -> H/8
            nn.Conv2d(self.channels, 2 * width, 3, padding=1),
            block(2 * width),
            Upsample(2 * width),
            block(2 * width),
            Upsample(2 * width),
            block(2 * width, config.code_dim),
        )
        self.small_encoder = nn.Sequential(  # H/8 -> H/32
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, self.channels, 3, padding=1),
            blocks(self.channels, 2),
        )
        self.small_decoder = nn.Sequential(  # H/32 -> H/8
            blocks(self.channels, 2),
            nn.Conv2d(self.channels, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def features(self, hr: Tensor) -> Tensor:
        """Returns what a predictor regresses: ``(b, 64, H/32, W/32)``."""
        return self.encoder(hr)

    def expand(self, features: Tensor) -> Tensor:
        """Brings regressed features to the grid of codes."""
        return self.expander(features)

    def forward(self, hr: Tensor, lr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the structure and the losses that make it one. ``lr`` is not used."""
        features = self.features(hr)
        small = F.interpolate(hr, scale_factor=1 / 8, mode="area")
        latent = self.small_encoder(small)
        terms = {
            "alignment": alignment_loss(features, latent),
            "small": F.mse_loss(self.small_decoder(latent), small),
        }
        return self.expand(features), terms


STRUCTURES = {"lowres": LowResolutionStructure, "regressed": RegressedStructure}


class Fusion(nn.Module):
    """Decides, from structure and texture, what is quantized."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.code_dim
        self.network = nn.Sequential(
            nn.Conv2d(2 * dim, 2 * config.width, 1),
            block(2 * config.width),
            nn.Conv2d(2 * config.width, dim, 1),
        )

    def forward(self, structure: Tensor, texture: Tensor) -> Tensor:
        """Returns what is left to code: ``(b, d, H/g, W/g)``."""
        return self.network(torch.cat([structure, texture], dim=1))


class Decoder(nn.Module):
    """Structure plus texture to a picture."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.adds_to_lr = config.structure == "lowres"
        self.network = nn.Sequential(
            nn.PixelShuffle(config.fold),
            blocks(config.width, config.decoder_blocks),
            nn.Conv2d(config.width, 3 * SCALE**2, 3, padding=1),
            nn.PixelShuffle(SCALE),
        )

    def forward(self, features: Tensor, lr: Tensor) -> Tensor:
        """Returns the picture ``(b, 3, H, W)``.

        With structure from the low-resolution picture the network predicts what bicubic
        enlargement misses; the paper's structure has to carry everything.
        """
        picture = self.network(features)
        return picture + enlarge(lr) if self.adds_to_lr else picture


def enlarge(lr: Tensor) -> Tensor:
    """Bicubic enlargement by 4, with the kernel that Pillow uses."""
    return F.interpolate(
        lr, scale_factor=SCALE, mode="bicubic", align_corners=False, antialias=True
    )


class Tokenized(NamedTuple):
    """What the tokenizer returns in training."""

    picture: Tensor
    quantizer_output: QuantizerOutput
    terms: dict[str, Tensor]


class TextureTokenizer(nn.Module):
    """Stage 1: a picture as structure and texture codes, and back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.width, config.code_dim
        self.structure = STRUCTURES[config.structure](config)
        self.texture = nn.Sequential(  # H -> H/g
            nn.PixelUnshuffle(config.grid),
            nn.Conv2d(3 * config.grid**2, 2 * width, 3, padding=1),
            blocks(2 * width, config.texture_blocks),
            nn.Conv2d(2 * width, dim, 1),
        )
        self.quantizer = TextureQuantizer(
            ChannelFirst(VectorQuantizer(dim, config.codebook_size)), fuse=Fusion(config)
        )
        self.decoder = Decoder(config)

    def forward(self, hr: Tensor, lr: Tensor, mask: Tensor | None = None) -> Tokenized:
        """Reconstructs ``hr`` from structure and codes; where ``mask`` is False, without codes."""
        structure, terms = self.structure(hr, lr)
        out = self.quantizer(self.texture(hr), structure, mask)
        return Tokenized(self.decoder(out.quantized, lr), out, terms)

    @torch.no_grad()
    def encode(self, hr: Tensor, lr: Tensor) -> Tensor:
        """Returns the true indices ``(b, H/g, W/g)``."""
        structure, _ = self.structure(hr, lr)
        return self.quantizer.encode(self.texture(hr), structure)

    @property
    def codes(self) -> Tensor:
        """The codebook ``(k, d)``."""
        return self.quantizer.codebooks[0].vectors()


class Prediction(NamedTuple):
    """What the super-resolver knows before it decides on codes."""

    structure: Tensor  # (b, d, H/g, W/g)
    features: Tensor | None  # regressed structure (b, 64, H/32, W/32), for the paper's structure
    logits: Tensor  # (b, H/g, W/g, k)


class CodePredictor(nn.Module):
    """Stages 2 and 3: what belongs at each place, given the low-resolution picture."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, dim = config.predictor_width, config.code_dim
        self.fold = config.fold
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), blocks(width, config.predictor_blocks)
        )
        self.gather = nn.Sequential(
            nn.Conv2d(config.fold**2 * width + dim, 2 * width, 1),
            blocks(2 * width, config.head_blocks),
        )
        self.head = IndexPredictor(2 * width, config.codebook_size)
        if config.structure == "regressed":
            channels = RegressedStructure.channels
            self.regressor = nn.Sequential(  # H/4 -> H/32
                Downsample(width), block(width),
                Downsample(width), block(width),
                Downsample(width), block(width, channels),
                nn.Conv2d(channels, channels, 3, padding=1),
            )  # fmt: skip

    def forward(self, trunk: Tensor, structure: Tensor) -> Tensor:
        """Returns the logits of each code, ``(b, H/g, W/g, k)``."""
        seen = torch.cat([F.pixel_unshuffle(trunk, self.fold), structure.detach()], dim=1)
        return self.head(self.gather(seen).movedim(1, -1))


class SuperResolver(nn.Module):
    """A frozen tokenizer and a predictor of its codes: 4 times larger pictures.

    Without a predictor (``predictor=None``, as after stage 1) the texture is left out and the
    structure is decoded alone; that needs a structure from the low-resolution picture.
    """

    scale = SCALE

    def __init__(self, tokenizer: TextureTokenizer, predictor: CodePredictor | None) -> None:
        super().__init__()
        if predictor is None and tokenizer.config.structure != "lowres":
            raise ValueError(
                "`predictor` must be given for a tokenizer with regressed structure: what it "
                "regresses the structure from is the predictor. Train `--stage predictor` first."
            )
        self.tokenizer = tokenizer.requires_grad_(requires_grad=False)
        self.predictor = predictor

    @property
    def config(self) -> ModelConfig:
        """The sizes."""
        return self.tokenizer.config

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    @property
    def multiple(self) -> int:
        """A side of a low-resolution picture is padded to a multiple of this."""
        return self.tokenizer.structure.multiple

    @property
    def overlap(self) -> int:
        """Low-resolution pixels beyond which nothing influences a pixel of the result."""
        config = self.config
        if config.structure == "regressed":
            return 8 * 16  # two levels deeper: practically, not exactly
        path = 1 + 2 * config.structure_blocks
        if self.predictor is not None:
            head = 2 * config.fold * config.head_blocks
            path = max(path, 1 + 2 * config.predictor_blocks) + head
        # A code or a bicubic kernel may straddle the border.
        return path + 2 * config.decoder_blocks + 1 + 2 * self.multiple

    def predict(self, lr: Tensor) -> Prediction:
        """Returns structure and logits for sides that are multiples of ``multiple``."""
        if self.predictor is None:
            raise ValueError("`predict` needs a predictor, got none. Train `--stage predictor`.")
        trunk = self.predictor.trunk(lr)
        features = None
        if self.config.structure == "regressed":
            features = self.predictor.regressor(trunk)
            structure = self.tokenizer.structure.expand(features)
        else:
            structure, _ = self.tokenizer.structure(lr, lr)
        return Prediction(structure, features, self.predictor(trunk, structure))

    def reconstruct(
        self,
        prediction: Prediction,
        lr: Tensor,
        *,
        estimator: str = "straight_through",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decodes predicted codes so that a loss on the picture trains the predictor."""
        texture, _ = select_codes(
            prediction.logits,
            self.tokenizer.codes.detach(),
            estimator=estimator,
            temperature=temperature,
            generator=generator,
        )
        return self.tokenizer.decoder(prediction.structure + texture.movedim(-1, 1), lr)

    def forward(self, lr: Tensor) -> Tensor:
        """Enlarges pictures ``(b, 3, h, w)`` of any size to ``(b, 3, 4h, 4w)``; not clamped."""
        height, width = lr.shape[-2:]
        lr = self._pad(lr)
        if self.predictor is None:
            structure, _ = self.tokenizer.structure(lr, lr)
            picture = self.tokenizer.decoder(structure, lr)
        else:
            picture = self.reconstruct(self.predict(lr), lr)
        return picture[..., : SCALE * height, : SCALE * width]

    @torch.no_grad()
    def indices(self, lr: Tensor) -> Tensor:
        """Returns the predicted indices ``(b, H/g, W/g)``, rounded up; -1 without a predictor."""
        fold = self.config.fold
        rows, columns = (-(-side // fold) for side in lr.shape[-2:])
        lr = self._pad(lr)
        if self.predictor is None:
            return torch.full((len(lr), rows, columns), -1, device=lr.device)
        return self.predict(lr).logits.argmax(dim=-1)[:, :rows, :columns]

    def _pad(self, lr: Tensor) -> Tensor:
        """Repeats the last row and column, up to a multiple of what the networks need."""
        below, right = (-lr.shape[-2]) % self.multiple, (-lr.shape[-1]) % self.multiple
        return F.pad(lr, (0, right, 0, below), mode="replicate") if below or right else lr
