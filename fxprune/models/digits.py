"""A network for the digits of scikit-learn, small enough to train a hundred times."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.models.cifar import CifarBlock

WIDTHS = (16, 32, 48)
"""Filters of the three stages."""


class DigitsResNet(nn.Module):
    """A residual network of 8 layers for `(N, 1, 8, 8)` images; returns logits `(N, num_classes)`.

    It has 54,042 parameters. The networks of He et al. (2016), section 4.2, with one block a stage.
    """

    default_cfg: ClassVar[dict[str, Any]] = {"input_size": (1, 8, 8)}

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = CifarBlock(first, first, 1, "around")
        self.layer2 = CifarBlock(first, second, 2, "around")
        self.layer3 = CifarBlock(second, third, 2, "around")
        self.linear = nn.Linear(third, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


DIGITS_MODELS: dict[str, Callable[..., nn.Module]] = {"digits_resnet": DigitsResNet}
"""What builds each, by its name for `load_model`."""
