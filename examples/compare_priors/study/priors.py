"""The priors of the study, made of the networks of the super-resolution example.

All have the same texture encoder, fusion and decoder. They differ in what is quantized, and in what
reaches the decoder unquantized:

  texture    structure, plus the quantized residual given the structure
  skip       structure, plus codes chosen without it
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
        """Returns the structure network; zeros for ``plain``."""
        return NoStructure(self) if self.prior == "plain" else super().make_structure()

    def make_texture(self) -> nn.Module:
        """Returns the texture encoder; for ``plain`` it encodes coarse features, too."""
        texture = super().make_texture()
        return CoarseAndFine(self, texture) if self.prior == "plain" else texture

    def make_fusion(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the quantizer's input: the texture alone for ``plain`` and ``skip``."""
        return texture_alone if self.prior in ("plain", "skip") else super().make_fusion()

    def make_quantizer(self) -> Quantizer:
        """Returns the quantizer of the row."""
        return QUANTIZERS[self.quantizer].make(self.code_dim, self.codebook_size)


ARCHITECTURES["prior"] = PriorConfig  # so that weights can be saved and loaded


class NoStructure(convolutional.LowResolutionStructure):
    """Zeros in place of a structure."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.network = nn.PixelUnshuffle(config.fold)
        self.copies = config.code_dim // 4

    def expand(self, features: Tensor) -> Tensor:
        """Returns zeros on the grid of codes."""
        zeros = torch.zeros_like(features[:, :1])
        return self.network(zeros).repeat(1, self.copies, 1, 1)


class CoarseAndFine(nn.Module):
    """Encodes coarse and fine features and fuses them, where other priors keep them apart."""

    def __init__(self, config: PriorConfig, texture: nn.Module) -> None:
        super().__init__()
        structure = convolutional.RegressedStructure(config)
        self.coarse = nn.Sequential(structure.encoder, structure.expander)
        self.fine = texture
        self.fusion = convolutional.Fusion(config)

    def forward(self, hr: Tensor) -> Tensor:
        """Maps ``(b, 3, H, W)`` to ``(b, d, H/8, W/8)``."""
        return self.fusion(self.coarse(hr), self.fine(hr))


def texture_alone(structure: Tensor, texture: Tensor) -> Tensor:
    """Returns the texture, in place of a fusion."""
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
    """Returns the mask of codes: all False for a structure alone, None for codes everywhere."""
    if not row.prior.startswith("structure"):
        return None
    return torch.zeros_like(lr[:, 0, ::2, ::2], dtype=torch.bool)
