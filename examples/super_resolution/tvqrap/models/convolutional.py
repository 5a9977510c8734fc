"""The networks of the presets ``tiny`` and ``small``, made of residual blocks.

They do not normalize over space, so a pixel of the result depends on a bounded neighborhood only,
and tiles join without seams.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvqrap.images.layouts import Tiling
from tvqrap.models.assembly import SCALE, upscale_bicubic
from vqprior import EmbeddingCodebook, IndexPredictor, VectorQuantizer
from vqprior.losses import alignment_loss
from vqprior.nn import Downsample, ResidualBlock, Upsample


@dataclasses.dataclass(frozen=True)
class ConvolutionalConfig:
    """Sizes of a model of residual blocks; makes its networks.

    Attributes:
        structure: Source of the structure: ``"lowres"`` computes it from the low-resolution image;
            ``"regressed"``, as in the paper, encodes it from the high-resolution image and
            regresses it at inference.
        grid: High-resolution pixels per code along a side: 8 (the paper's) or 4.
        width: Channels at H/4.
        codebook_size: Number of codes.
        structure_blocks: Residual blocks of the structure network.
        texture_blocks: Residual blocks of the texture encoder.
        decoder_blocks: Residual blocks of the decoder.
        predictor_width: Channels of the predictor at H/4.
        predictor_blocks: Residual blocks of the predictor at H/4.
        head_blocks: Residual blocks of the predictor at H/g.
        stride: High-resolution pixels per vector of a regressed structure along a side: 32 (the
            paper's), 16 or 8.
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
    stride: int = 32

    @property
    def fold(self) -> int:
        """Positions at H/4 per code along a side."""
        return self.grid // SCALE

    @property
    def code_dim(self) -> int:
        """Features of a code: those of all its positions at H/4."""
        return self.fold**2 * self.width

    @property
    def tiling(self) -> Tiling:
        """How to cut tiles: nothing beyond ``overlap`` influences a pixel of the result."""
        if self.structure == "regressed":
            # The receptive field is larger than this; the influence beyond it is negligible.
            return Tiling(multiple=self.stride // SCALE, overlap=8 * 16)
        head = 2 * self.fold * self.head_blocks
        path = max(1 + 2 * self.structure_blocks, 1 + 2 * self.predictor_blocks + head)
        # A code or a bicubic kernel may straddle the border.
        overlap = path + 2 * self.decoder_blocks + 1 + 2 * self.fold
        return Tiling(multiple=self.fold, overlap=overlap)

    def make_structure(self) -> nn.Module:
        """Returns the structure network."""
        return STRUCTURES[self.structure](self)

    def make_texture(self) -> nn.Module:
        """Returns the texture encoder: H -> H/g."""
        return nn.Sequential(
            nn.PixelUnshuffle(self.grid),
            nn.Conv2d(3 * self.grid**2, 2 * self.width, 3, padding=1),
            blocks(2 * self.width, self.texture_blocks),
            nn.Conv2d(2 * self.width, self.code_dim, 1),
        )

    def make_fusion(self) -> nn.Module:
        """Returns the map from structure and texture to the quantizer's input."""
        return Fusion(self)

    def make_quantizer(self) -> VectorQuantizer:
        """Returns the quantizer of vectors of ``code_dim`` features."""
        codebook = EmbeddingCodebook(self.codebook_size, self.code_dim)
        return VectorQuantizer(self.code_dim, self.codebook_size, codebook=codebook)

    def make_decoder(self) -> nn.Module:
        """Returns the decoder of structure plus texture."""
        return Decoder(self)

    def make_predictor(self) -> nn.Module:
        """Returns the predictor of codes."""
        return ConvolutionalPredictor(self)


def block(in_channels: int, out_channels: int | None = None) -> ResidualBlock:
    """Returns a residual block without normalization."""
    return ResidualBlock(in_channels, out_channels, norm=nn.Identity)


def blocks(channels: int, count: int) -> nn.Sequential:
    """Returns a stack of residual blocks."""
    return nn.Sequential(*[block(channels) for _ in range(count)])


def reducing(channels: int, halvings: int, out_channels: int) -> list[nn.Module]:
    """Returns layers that halve height and width ``halvings`` times, each with a residual block."""
    if not halvings:
        return [block(channels, out_channels)]
    widths = [channels] * (halvings - 1) + [out_channels]
    return [layer for width in widths for layer in (Downsample(channels), block(channels, width))]


class LowResolutionStructure(nn.Module):
    """Structure computed from the low-resolution image, the same in training and at inference."""

    regressed = False

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, config.width, 3, padding=1),
            blocks(config.width, config.structure_blocks),
            nn.PixelUnshuffle(config.fold),
        )

    def features(self, hr: Tensor, lr: Tensor, texture: Tensor) -> Tensor:
        """Returns the low-resolution image; the rest is not used."""
        return lr

    def expand(self, features: Tensor) -> Tensor:
        """Returns the structure on the grid of codes."""
        return self.network(features)

    def losses(self, features: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Returns no losses: the low-resolution image has no texture to keep out."""
        return {}


class RegressedStructure(nn.Module):
    """The paper's structure: at H/s (s = 32 in the paper), kept free of texture by alignment with
    the latent of a small image.
    """

    regressed = True
    channels = 64

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        width, channels = 2 * config.width, self.channels
        halvings = (config.stride // 8).bit_length() - 1
        self.encoder = nn.Sequential(  # H -> H/s
            nn.PixelUnshuffle(8),
            nn.Conv2d(192, width, 3, padding=1),
            blocks(width, config.structure_blocks),
            *reducing(width, halvings, channels),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.expander = nn.Sequential(  # H/s -> H/8
            nn.Conv2d(channels, width, 3, padding=1),
            *[layer for _ in range(halvings) for layer in (block(width), Upsample(width))],
            block(width, config.code_dim),
        )
        pixels = 3 * 4**halvings
        self.small_encoder = nn.Sequential(  # H/8 -> H/s
            nn.PixelUnshuffle(2**halvings),
            nn.Conv2d(pixels, channels, 3, padding=1),
            blocks(channels, 2),
        )
        self.small_decoder = nn.Sequential(  # H/s -> H/8
            blocks(channels, 2),
            nn.Conv2d(channels, pixels, 3, padding=1),
            nn.PixelShuffle(2**halvings),
        )

    def features(self, hr: Tensor, lr: Tensor, texture: Tensor) -> Tensor:
        """Returns the features to regress, ``(b, 64, H/s, W/s)``, from ``hr`` alone."""
        return self.encoder(hr)

    def expand(self, features: Tensor) -> Tensor:
        """Returns the structure on the grid of codes."""
        return self.expander(features)

    def losses(self, features: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Returns the losses that align the features with a small version of ``hr``."""
        small = F.interpolate(hr, scale_factor=1 / 8, mode="area")
        latent = self.small_encoder(small)
        return {
            "alignment": alignment_loss(features, latent),
            "small": F.mse_loss(self.small_decoder(latent), small),
        }


STRUCTURES = {"lowres": LowResolutionStructure, "regressed": RegressedStructure}


class Fusion(nn.Module):
    """Maps structure and texture to the quantizer's input."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        dim = config.code_dim
        self.network = nn.Sequential(
            nn.Conv2d(2 * dim, 2 * config.width, 1),
            block(2 * config.width),
            nn.Conv2d(2 * config.width, dim, 1),
        )

    def forward(self, structure: Tensor, texture: Tensor) -> Tensor:
        """Returns ``(b, d, H/g, W/g)``."""
        return self.network(torch.cat([structure, texture], dim=1))


class Decoder(nn.Module):
    """Decodes structure plus texture to an image."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        self.adds_to_lr = config.structure == "lowres"
        self.network = nn.Sequential(
            nn.PixelShuffle(config.fold),
            blocks(config.width, config.decoder_blocks),
            nn.Conv2d(config.width, 3 * SCALE**2, 3, padding=1),
            nn.PixelShuffle(SCALE),
        )

    @property
    def last_layer(self) -> nn.Conv2d:
        """The last convolution, at whose weight adversarial gradients are balanced."""
        return self.network[-2]

    def forward(self, features: Tensor, lr: Tensor) -> Tensor:
        """Returns the image ``(b, 3, H, W)``.

        With structure from the low-resolution image, the network predicts the difference from
        bicubic upscaling; with the paper's structure, the image itself.
        """
        image = self.network(features)
        return image + upscale_bicubic(lr) if self.adds_to_lr else image


class ConvolutionalPredictor(nn.Module):
    """Predicts the code of each place from the low-resolution image and the structure."""

    def __init__(self, config: ConvolutionalConfig) -> None:
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
            halvings = (config.stride // SCALE).bit_length() - 1
            self.regressor = nn.Sequential(  # H/4 -> H/s
                *reducing(width, halvings, channels),
                nn.Conv2d(channels, channels, 3, padding=1),
            )

    def forward(self, trunk: Tensor, structure: Tensor) -> Tensor:
        """Returns the logits of each code, ``(b, H/g, W/g, k)``."""
        seen = torch.cat([F.pixel_unshuffle(trunk, self.fold), structure.detach()], dim=1)
        return self.head(self.gather(seen).movedim(1, -1))
