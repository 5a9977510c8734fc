"""The priors of the study, of the networks of the super-resolution example.

All have the same texture encoder, fusion and decoder. They differ in what passes the quantizer, and
in what goes around it:

  texture    structure plus codes for what it does not explain
  skip       structure plus codes that are chosen without knowing it
  plain      codes alone: coarse and fine features are fused and quantized together
  structure  no codes

The structure is encoded, as in the paper; that of ``texture-lr`` and ``structure-lr`` is computed
from the low-resolution image.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from study.quantizers import QUANTIZERS
from study.table import TokenizerRow
from tvqrap.models import convolutional
from tvqrap.models.assembly import TextureTokenizer
from tvqrap.models.presets import ARCHITECTURES
from vqprior import Quantizer

PRIORS = ("plain", "skip", "texture", "structure", "texture-lr", "structure-lr")


@dataclasses.dataclass(frozen=True)
class PriorConfig(convolutional.ConvolutionalConfig):
    """Makes the networks of one prior, all of the same size."""

    width: int = 48
    structure_blocks: int = 2
    texture_blocks: int = 2
    decoder_blocks: int = 3
    predictor_blocks: int = 4
    prior: str = "texture"
    quantizer: str = "vq"

    def make_structure(self) -> nn.Module:
        """None for ``plain``."""
        return NoStructure(self) if self.prior == "plain" else super().make_structure()

    def make_texture(self) -> nn.Module:
        """The texture encoder; that of ``plain`` has to see what is coarse, too."""
        texture = super().make_texture()
        return CoarseAndFine(self, texture) if self.prior == "plain" else texture

    def make_fusion(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What is quantized: the texture alone, unless codes know the structure."""
        return texture_alone if self.prior in ("plain", "skip") else super().make_fusion()

    def make_quantizer(self) -> Quantizer:
        """That of the row."""
        return QUANTIZERS[self.quantizer].make(self.code_dim, self.codebook_size)


ARCHITECTURES["prior"] = PriorConfig  # so that weights are saved and loaded


class NoStructure(convolutional.LowResolutionStructure):
    """Zeros in place of a structure."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.network = nn.PixelUnshuffle(config.fold)
        self.copies = config.code_dim // 4

    def expand(self, features: Tensor) -> Tensor:
        """Zeros on the grid of codes."""
        zeros = torch.zeros_like(features[:, :1])
        return self.network(zeros).repeat(1, self.copies, 1, 1)


class CoarseAndFine(nn.Module):
    """The features that others split into structure and texture, fused."""

    def __init__(self, config: PriorConfig, texture: nn.Module) -> None:
        super().__init__()
        structure = convolutional.RegressedStructure(config)
        self.coarse = nn.Sequential(structure.encoder, structure.expander)
        self.fine = texture
        self.fusion = convolutional.Fusion(config)

    def forward(self, hr: Tensor) -> Tensor:
        """``(b, 3, H, W)`` to ``(b, d, H/8, W/8)``."""
        return self.fusion(self.coarse(hr), self.fine(hr))


def texture_alone(structure: Tensor, texture: Tensor) -> Tensor:
    """In place of a fusion."""
    return texture


def build_tokenizer(row: TokenizerRow) -> TextureTokenizer:
    """Makes the untrained tokenizer of a row."""
    torch.manual_seed(row.seed)
    encoded = "none" if row.prior == "plain" else "regressed"
    config = PriorConfig(
        prior=row.prior, quantizer=row.quantizer, codebook_size=row.codebook_size,
        structure="lowres" if row.prior.endswith("-lr") else encoded, stride=row.stride,
    )  # fmt: skip
    return TextureTokenizer(config)


def mask_of(row: TokenizerRow, lr: Tensor) -> Tensor | None:
    """Returns where codes are used: nowhere for a structure alone, else None for everywhere."""
    if not row.prior.startswith("structure"):
        return None
    return torch.zeros_like(lr[:, 0, ::2, ::2], dtype=torch.bool)
