"""The priors of the study: where structure comes from, and how it and the codes meet.

All have the same encoder, fusion and decoder. They differ in what passes the quantizer, and in what
goes around it.
"""

import abc
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from study.networks import (
    DIM,
    GRID,
    WIDTH,
    Decoder,
    EncodedStructure,
    Encoder,
    Fusion,
    LowResolutionStructure,
)
from vqprior import ChannelsFirst, Quantizer, QuantizerOutput, TextureQuantizer


class Meeting(nn.Module, abc.ABC):
    """How texture and structure, both ``(b, DIM, H/8, W/8)``, become what the decoder gets."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer: nn.Module = ChannelsFirst(quantizer)

    @property
    def codes(self) -> Quantizer:
        """The quantizer of maps."""
        return self.quantizer

    @abc.abstractmethod
    def prepare(self, texture: Tensor, structure: Tensor) -> Tensor:
        """Returns what is quantized."""

    @abc.abstractmethod
    def decode(self, codes: Tensor, structure: Tensor) -> Tensor:
        """Returns what the decoder gets for chosen codes."""

    def forward(self, texture: Tensor, structure: Tensor) -> QuantizerOutput:
        """Returns what the decoder gets, as ``quantized``."""
        out = self.codes(self.prepare(texture, structure))
        return dataclasses.replace(out, quantized=self.decode(out.quantized, structure))


class Plain(Meeting):
    """Everything is quantized: fine and coarse features together."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.fusion = Fusion()

    def prepare(self, texture: Tensor, structure: Tensor) -> Tensor:
        """Both, fused."""
        return self.fusion(structure, texture)

    def decode(self, codes: Tensor, structure: Tensor) -> Tensor:
        """The codes alone."""
        return codes


class Texture(Meeting):
    """Texture vector-quantization: structure plus codes for what it does not explain."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.quantizer = TextureQuantizer(self.quantizer, fuse=Fusion())

    @property
    def codes(self) -> Quantizer:
        """The quantizer of maps."""
        return self.quantizer.quantizer

    def prepare(self, texture: Tensor, structure: Tensor) -> Tensor:
        """Both, fused."""
        return self.quantizer.fuse(structure, texture)

    def decode(self, codes: Tensor, structure: Tensor) -> Tensor:
        """Their sum."""
        return structure + codes

    def forward(self, texture: Tensor, structure: Tensor) -> QuantizerOutput:
        """Returns structure plus codes, as ``quantized``."""
        return self.quantizer(texture, structure)


class Skip(Meeting):
    """The same structure by a skip connection, past codes that are chosen without knowing it."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.fusion = Fusion()

    def prepare(self, texture: Tensor, structure: Tensor) -> Tensor:
        """The texture alone."""
        return texture

    def decode(self, codes: Tensor, structure: Tensor) -> Tensor:
        """Both, fused."""
        return self.fusion(structure, codes)


class StructureAlone(Meeting):
    """No codes: what the structure gives by itself."""

    def prepare(self, texture: Tensor, structure: Tensor) -> Tensor:
        """The texture alone."""
        return texture

    def decode(self, codes: Tensor, structure: Tensor) -> Tensor:
        """The structure alone."""
        return structure

    def forward(self, texture: Tensor, structure: Tensor) -> QuantizerOutput:
        """Returns the structure, as ``quantized``."""
        nowhere = torch.zeros_like(texture[:, 0], dtype=torch.bool)
        return dataclasses.replace(self.quantizer(texture, nowhere), quantized=structure)


# How structure and codes meet, and whether structure is that of the low-resolution image.
PRIORS: dict[str, tuple[type[Meeting], bool]] = {
    "plain": (Plain, False),
    "skip": (Skip, False),
    "texture": (Texture, False),
    "structure": (StructureAlone, False),
    "texture-lr": (Texture, True),
    "structure-lr": (StructureAlone, True),
}


class Tokenized(NamedTuple):
    """What a tokenizer returns in training."""

    image: Tensor
    quantizer_output: QuantizerOutput
    terms: dict[str, Tensor]


class Described(NamedTuple):
    """What an image is before it is quantized."""

    features: Tensor  # of the structure
    structure: Tensor  # on the grid of codes
    texture: Tensor


class Tokenizer(nn.Module):
    """An image as structure and codes, and back.

    Args:
        prior: A name in ``PRIORS``.
        quantizer: Of maps ``(b, rows, columns, DIM)``.
        stride: Pixels for each vector of an encoded structure, along a side.
    """

    def __init__(self, prior: str, quantizer: Quantizer, *, stride: int) -> None:
        super().__init__()
        meeting, low_resolution = PRIORS[prior]
        self.encoder = Encoder()
        self.texture = nn.Conv2d(WIDTH, DIM, 1)
        self.structure = (
            LowResolutionStructure()
            if low_resolution
            else EncodedStructure(stride, aligned=meeting is not Plain)
        )
        self.meeting = meeting(quantizer)
        self.decoder = Decoder()

    def describe(self, hr: Tensor, lr: Tensor) -> Described:
        """Returns structure and texture of an image."""
        encoded = self.encoder(hr)
        features = self.structure.features(encoded, lr)
        return Described(features, self.structure.expand(features), self.texture(encoded))

    def forward(self, hr: Tensor, lr: Tensor) -> Tokenized:
        """Reconstructs ``(b, 3, H, W)``."""
        described = self.describe(hr, lr)
        out = self.meeting(described.texture, described.structure)
        terms = self.structure.losses(described.features, hr)
        return Tokenized(self.decoder(out.quantized), out, terms)

    @property
    def codebook(self) -> Tensor:
        """The codes ``(k, d)`` of a quantizer that has one codebook."""
        (codebook,) = self.meeting.codes.codebooks
        return codebook.codes()

    @property
    def bits_per_pixel(self) -> float:
        """Of the codes; a structure that is not quantized is not counted."""
        return self.meeting.codes.bits_per_token / GRID**2
