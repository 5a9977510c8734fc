"""The networks of the preset ``paper``: the architecture that the authors of TVQ&RAP released.

Structure is at H/32, texture and codes are at H/8. Inputs and outputs are images in [0, 1], as
everywhere here; inside, the networks use [-1, 1]. Modules are numbered as in the release, so that
convert_checkpoint.py has little to translate.

Reference: Li et al., ICLR 2026, arXiv 2509.23774, and the code at
https://github.com/CVL-UESTC/TVQ-RAP. Two properties are kept because checkpoints rely on them: a
group of Swin layers without a convolution doubles its input, because a second skip connection goes
around layers that have one already; and the weights of the quantizer's loss are 1 for commitment
and 0.25 for the codebook.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvqrap.images.layouts import Tiling
from vqprior import EmbeddingCodebook, IndexPredictor, VectorQuantizer
from vqprior.losses import alignment_loss
from vqprior.nn import ResidualBlock, SwinLayer, Upsample, group_norm

WINDOW = 8  # positions along the side of an attention window
HEADS = 8
Res = ResidualBlock


@dataclasses.dataclass(frozen=True)
class PaperConfig:
    """Sizes of a model of the paper's architecture; makes its networks.

    Attributes:
        width: Channels at H; a multiple of 8. All others are multiples of it.
        codebook_size: Number of codes.
        predictor_depth: Swin layers in each of the predictor's five groups.
    """

    width: int = 64
    codebook_size: int = 1024
    predictor_depth: int = 6

    # Not annotated, so that they are constants and not settings.
    grid = 8
    tiling = Tiling(
        # As the authors pad. A multiple of 32 would fill all windows as well, but the statistics
        # of the normalizations would then differ from those of the release.
        multiple=64,
        # Normalization and attention reach across a tile, so no overlap makes tiles join exactly.
        # Convolutions see zeros at the border of a tile; these pixels are discarded.
        overlap=2,
        default_tile=244,  # with the overlap, a tile sees 256 pixels
    )

    @property
    def code_dim(self) -> int:
        """Features of a code."""
        return 4 * self.width

    def make_structure(self) -> nn.Module:
        """Returns the structure networks."""
        return PaperStructure(self.width)

    def make_texture(self) -> nn.Module:
        """Returns the texture encoder."""
        return texture_encoder(self.width)

    def make_fusion(self) -> nn.Module:
        """Returns the map from structure and texture to the quantizer's input."""
        return PaperFusion(self.width)

    def make_quantizer(self) -> VectorQuantizer:
        """Returns the quantizer of vectors of ``code_dim`` features."""
        return VectorQuantizer(
            self.code_dim,
            self.codebook_size,
            codebook=EmbeddingCodebook(self.codebook_size, self.code_dim),
            commitment_weight=1.0,
            codebook_weight=0.25,
            unused_weight=0.0,
        )

    def make_decoder(self) -> nn.Module:
        """Returns the decoder of structure plus texture."""
        return PaperDecoder(self.width)

    def make_predictor(self) -> nn.Module:
        """Returns the predictor of structure and codes."""
        return PaperPredictor(self)


class Skip(nn.Module):
    """A skip connection around any body."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x + body(x)``."""
        return x + self.body(x)


def conv(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv2d:
    """Returns a 3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def down(channels: int, *, bias: bool = False) -> nn.Sequential:
    """Returns layers that halve height and width and double the channels."""
    return nn.Sequential(conv(channels, channels // 2, bias=bias), nn.PixelUnshuffle(2))


def swin(channels: int, depth: int) -> list[nn.Module]:
    """Returns Swin layers; the windows of every other layer are shifted."""
    return [
        SwinLayer(channels, num_heads=HEADS, window_size=WINDOW, shift=i % 2 * (WINDOW // 2))
        for i in range(depth)
    ]


def attention(channels: int, depth: int, groups: int = 1) -> nn.Sequential:
    """Returns groups of Swin layers, each inside a second skip connection."""
    return nn.Sequential(*[Skip(*swin(channels, depth)) for _ in range(groups)])


def convolved_attention(channels: int, depth: int, groups: int = 1) -> nn.Sequential:
    """Returns such groups with a convolution at the end of each: the RSTB of SwinIR."""
    return nn.Sequential(
        *[Skip(*swin(channels, depth), conv(channels, channels)) for _ in range(groups)]
    )


def to_signed(image: Tensor) -> Tensor:
    """Maps [0, 1] to [-1, 1]."""
    return 2 * image - 1


def from_signed(image: Tensor) -> Tensor:
    """Maps [-1, 1] to [0, 1]."""
    return (image + 1) / 2


class OnSigned(nn.Module):
    """Layers on an image in [0, 1], which they see in [-1, 1]."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """Returns the features of an image in [0, 1]."""
        return self.network(to_signed(image))


def texture_encoder(w: int) -> OnSigned:
    """Returns the texture encoder, H -> H/8. The structure is encoded from its output."""
    return OnSigned(
        conv(3, w), Res(w), Res(w),
        down(w), Res(2 * w), Res(2 * w),
        down(2 * w), Res(4 * w, 2 * w), Res(2 * w),
        down(2 * w), Res(4 * w), attention(4 * w, depth=4), Res(4 * w),
    )  # fmt: skip


class PaperStructure(nn.Module):
    """Structure at H/32, kept free of texture by alignment with the latent of a small image."""

    regressed = True

    def __init__(self, w: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(  # H/8 -> H/32
            down(4 * w), Res(8 * w, 4 * w), attention(4 * w, depth=2), Res(4 * w),
            down(4 * w), Res(8 * w, 4 * w), Res(4 * w), Res(4 * w, 2 * w), Res(2 * w),
            Res(2 * w, w), Res(w), Res(w), group_norm(w), conv(w, w),
        )  # fmt: skip
        self.expander = nn.Sequential(  # H/32 -> H/8
            conv(w, w), *[Res(w) for _ in range(5)],
            Upsample(w), Res(w, 2 * w), attention(2 * w, depth=2), Res(2 * w),
            attention(2 * w, depth=2), Res(2 * w),
            Upsample(2 * w), Res(2 * w, 4 * w), Res(4 * w),
        )  # fmt: skip
        self.small_encoder = nn.Sequential(  # H/8 -> H/32
            conv(3, w // 2), Res(w // 2), Res(w // 2),
            down(w // 2, bias=True), Res(w), Res(w),
            down(w, bias=True), Res(2 * w, w), Res(w),
        )  # fmt: skip
        self.small_decoder = nn.Sequential(  # H/32 -> H/8
            conv(w, w), Res(w), Res(w),
            Upsample(w), Res(w), Res(w),
            Upsample(w), Res(w, w // 2), Res(w // 2), group_norm(w // 2), conv(w // 2, 3),
        )  # fmt: skip

    def features(self, hr: Tensor, lr: Tensor, texture: Tensor) -> Tensor:
        """Returns the features to regress, ``(b, w, H/32, W/32)``, from ``texture`` alone."""
        return self.encoder(texture)

    def expand(self, features: Tensor) -> Tensor:
        """Returns the structure on the grid of codes, ``(b, 4w, H/8, W/8)``."""
        return self.expander(features)

    def losses(self, features: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Returns the losses that align the features with a small version of ``hr``."""
        small = F.interpolate(hr, scale_factor=1 / 8, mode="area")
        return self.align(features, to_signed((small * 255).round() / 255))

    def align(self, features: Tensor, small: Tensor) -> dict[str, Tensor]:
        """Returns the losses for a small image ``(b, 3, H/8, W/8)`` in [-1, 1]."""
        latent = self.small_encoder(small)
        return {
            "alignment": alignment_loss(features, latent),
            "small": F.mse_loss(self.small_decoder(latent), small),
        }


class PaperFusion(nn.Module):
    """Maps structure and texture to the quantizer's input."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            Res(8 * w, 4 * w), Res(4 * w), group_norm(4 * w), conv(4 * w, 4 * w)
        )

    def forward(self, structure: Tensor, texture: Tensor) -> Tensor:
        """Returns ``(b, 4w, H/8, W/8)``."""
        return self.network(torch.cat([structure, texture], dim=1))


class PaperDecoder(nn.Module):
    """Decodes structure plus texture to an image."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.network = nn.Sequential(  # H/8 -> H
            Res(4 * w), attention(4 * w, depth=2), Res(4 * w), attention(4 * w, depth=2),
            Res(4 * w),
            Upsample(4 * w), Res(4 * w, 2 * w), Res(2 * w), Res(2 * w),
            Upsample(2 * w), Res(2 * w), Res(2 * w), Res(2 * w),
            Upsample(2 * w), Res(2 * w, w), Res(w), Res(w), group_norm(w), conv(w, 3),
        )  # fmt: skip

    @property
    def last_layer(self) -> nn.Conv2d:
        """The last convolution, at whose weight adversarial gradients are balanced."""
        return self.network[-1]

    def forward(self, features: Tensor, lr: Tensor) -> Tensor:
        """Returns the image ``(b, 3, H, W)``. ``lr`` is not used."""
        return from_signed(self.network(features))


class PaperPredictor(nn.Module):
    """Predicts structure and codes from the low-resolution image."""

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        w, depth = config.width, config.predictor_depth
        self.trunk = OnSigned(  # H/4 -> H/8
            conv(3, w), Res(w, 2 * w), Res(2 * w), Res(2 * w),
            down(2 * w), Res(4 * w), Res(4 * w), convolved_attention(4 * w, depth, groups=2),
            Res(4 * w), Res(4 * w),
        )  # fmt: skip
        self.regressor = nn.Sequential(  # H/8 -> H/32
            nn.Sequential(
                down(4 * w), Res(8 * w, 4 * w), Res(4 * w, 2 * w),
                down(2 * w), Res(4 * w), Res(4 * w, 2 * w),
            ),
            nn.Sequential(Res(2 * w), Res(2 * w, w), Res(w), Res(w)),
        )  # fmt: skip
        self.gather = nn.Sequential(
            nn.Sequential(Res(8 * w, 4 * w), convolved_attention(4 * w, depth), Res(4 * w)),
            attention(4 * w, depth, groups=2),
        )
        self.head = IndexPredictor(4 * w, config.codebook_size)

    def forward(self, trunk: Tensor, structure: Tensor) -> Tensor:
        """Returns the logits of each code, ``(b, H/8, W/8, k)``.

        No gradient passes to the structure, which only its own loss trains.
        """
        seen = torch.cat([structure.detach(), trunk], dim=1)
        return self.head(self.gather(seen).movedim(1, -1))
