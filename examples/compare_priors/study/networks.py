"""The networks of all models of the study, the same for every prior.

Sizes in comments: an image is H x W, codes live on the grid H/8 x W/8, the low-resolution image
is H/4 x W/4.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior import IndexPredictor
from vqprior.losses import alignment_loss
from vqprior.nn import Downsample, ResidualBlock, Upsample

GRID = 8  # pixels for each code, along a side
SCALE = 4  # pixels for each low-resolution pixel, along a side
FINE = 48  # channels at H/4
WIDTH = 96  # channels at H/8 and below
DIM = 64  # features of one code
CHANNELS = 64  # of an encoded structure


def block(in_channels: int, out_channels: int | None = None) -> ResidualBlock:
    """A residual block without normalization: a place does not depend on far ones."""
    return ResidualBlock(in_channels, out_channels, norm=nn.Identity)


class Encoder(nn.Sequential):
    """``(b, 3, H, W)`` to ``(b, WIDTH, H/8, W/8)``."""

    def __init__(self) -> None:
        super().__init__(
            nn.PixelUnshuffle(SCALE),
            nn.Conv2d(3 * SCALE**2, FINE, 3, padding=1),
            block(FINE),
            Downsample(FINE, WIDTH),
            block(WIDTH),
            block(WIDTH),
        )


class EncodedStructure(nn.Module):
    """Structure as in the paper: coarse features of the image itself.

    They are pulled to the latent of an autoencoder of the image made 8 times smaller, which
    keeps texture out of them.

    Args:
        stride: Pixels for each feature vector, along a side: 8, 16 or 32.
        aligned: Whether they are pulled; a prior that quantizes everything has no need to.
    """

    regressed = True

    def __init__(self, stride: int, *, aligned: bool) -> None:
        super().__init__()
        halvings = (stride // GRID).bit_length() - 1
        self.stride = stride
        self.aligned = aligned
        self.encoder = nn.Sequential(
            *(nn.Sequential(Downsample(WIDTH), block(WIDTH)) for _ in range(halvings)),
            nn.Conv2d(WIDTH, CHANNELS, 3, padding=1),
        )
        self.expander = nn.Sequential(
            nn.Conv2d(CHANNELS, WIDTH, 3, padding=1),
            *(nn.Sequential(Upsample(WIDTH), block(WIDTH)) for _ in range(halvings)),
            nn.Conv2d(WIDTH, DIM, 3, padding=1),
        )
        if aligned:
            self.small_encoder = nn.Sequential(
                nn.Conv2d(3, FINE, 3, padding=1),
                *(nn.Sequential(Downsample(FINE), block(FINE)) for _ in range(halvings)),
                nn.Conv2d(FINE, CHANNELS, 3, padding=1),
            )
            self.small_decoder = nn.Sequential(
                nn.Conv2d(CHANNELS, FINE, 3, padding=1),
                *(nn.Sequential(Upsample(FINE), block(FINE)) for _ in range(halvings)),
                nn.Conv2d(FINE, 3, 3, padding=1),
            )

    def features(self, encoded: Tensor, lr: Tensor) -> Tensor:
        """Returns ``(b, CHANNELS, H/s, W/s)``, from what the encoder made of the image."""
        return self.encoder(encoded)

    def expand(self, features: Tensor) -> Tensor:
        """Brings features to the grid of codes, ``(b, DIM, H/8, W/8)``."""
        return self.expander(features)

    def losses(self, features: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Returns what makes features the structure of ``hr``."""
        if not self.aligned:
            return {}
        small = F.interpolate(hr, scale_factor=1 / 8, mode="area")
        latent = self.small_encoder(small)
        return {
            "alignment": alignment_loss(features, latent),
            "small": F.mse_loss(self.small_decoder(latent).float(), small),
        }


class LowResolutionStructure(nn.Module):
    """Structure that the receiver computes from the low-resolution image, as it does later on."""

    regressed = False

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, FINE, 3, padding=1),
            block(FINE),
            Downsample(FINE, WIDTH),
            block(WIDTH),
            block(WIDTH),
            nn.Conv2d(WIDTH, DIM, 3, padding=1),
        )

    def features(self, encoded: Tensor, lr: Tensor) -> Tensor:
        """The low-resolution image itself."""
        return lr

    def expand(self, features: Tensor) -> Tensor:
        """Brings it to the grid of codes, ``(b, DIM, H/8, W/8)``."""
        return self.network(features)

    def losses(self, features: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """None: it cannot hold more than the low-resolution image."""
        return {}


class Fusion(nn.Module):
    """Joins two maps on the grid of codes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(2 * DIM, WIDTH, 1), block(WIDTH), nn.Conv2d(WIDTH, DIM, 1)
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """``(b, DIM, H/8, W/8)`` twice to once."""
        return self.network(torch.cat([first, second], dim=1))


class Decoder(nn.Sequential):
    """``(b, DIM, H/8, W/8)`` to ``(b, 3, H, W)``."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(DIM, WIDTH, 3, padding=1),
            block(WIDTH),
            block(WIDTH),
            Upsample(WIDTH, FINE),
            block(FINE),
            block(FINE),
            nn.Conv2d(FINE, 3 * SCALE**2, 3, padding=1),
            nn.PixelShuffle(SCALE),
        )


class Predictor(nn.Module):
    """What belongs at each place, given the low-resolution image.

    Args:
        outputs: Numbers for each place: logits of so many codes.
        stride: Of the structure that is to be regressed; None if there is none.
    """

    def __init__(self, outputs: int, stride: int | None) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, padding=1), *(block(WIDTH) for _ in range(4))
        )
        self.coarse = nn.Sequential(Downsample(WIDTH), block(WIDTH))
        self.gather = nn.Sequential(nn.Conv2d(WIDTH + DIM, WIDTH, 1), block(WIDTH), block(WIDTH))
        self.head = IndexPredictor(WIDTH, outputs)
        if stride is not None:
            halvings = (stride // GRID).bit_length() - 1
            self.regressor = nn.Sequential(
                block(WIDTH),
                *(nn.Sequential(Downsample(WIDTH), block(WIDTH)) for _ in range(halvings)),
                nn.Conv2d(WIDTH, CHANNELS, 3, padding=1),
            )

    def look(self, lr: Tensor) -> Tensor:
        """``(b, 3, H/4, W/4)`` to ``(b, WIDTH, H/8, W/8)``."""
        return self.coarse(self.trunk(lr))

    def forward(self, seen: Tensor, structure: Tensor) -> Tensor:
        """Returns the logits ``(b, H/8, W/8, k)``."""
        gathered = self.gather(torch.cat([seen, structure.detach()], dim=1))
        return self.head(gathered.movedim(1, -1))
