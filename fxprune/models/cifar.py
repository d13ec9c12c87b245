"""Networks for CIFAR-10 and CIFAR-100: narrow residual ones, and two wide ones.

ResNet-20, 32, 56, 110: He et al., Deep Residual Learning for Image Recognition (2016), section 4.2, with shortcut
option A: where the size halves, every second pixel is taken and the new channels are zero. Published weights differ in
where those go.

VGG-16 and ResNet-18 are ImageNet networks in the form in which papers on pruning train them on CIFAR-10.

`default_cfg` of a network says for what images it is, as in timm.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = {"input_size": (3, 32, 32)}
Zeros = Literal["around", "after"]
"""Where a shortcut puts its zero channels: half before and half after the others, or all after them."""


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, zeros: Zeros) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        new = out_channels - in_channels
        self.before = new // 2 if zeros == "around" else 0
        self.after = new - self.before

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        shortcut = x
        if self.stride > 1:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(nn.Module):
    """A residual network of `depth = 6n + 2` layers for `(N, 3, 32, 32)` images; returns logits `(N, num_classes)`."""

    default_cfg: ClassVar[dict[str, Any]] = CONFIG

    def __init__(self, depth: int, zeros: Zeros = "around", num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth {depth}: must be 6n + 2, as in 20, 32, 56")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, 1, zeros)
        self.layer2 = _stage(blocks, 16, 32, 2, zeros)
        self.layer3 = _stage(blocks, 32, 64, 2, zeros)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, zeros: Zeros) -> nn.Sequential:
    first = CifarBlock(in_channels, out_channels, stride, zeros)
    return nn.Sequential(first, *(CifarBlock(out_channels, out_channels, 1, zeros) for _ in range(blocks - 1)))


class CifarVGG16(nn.Module):
    """VGG-16 for `(N, 3, 32, 32)` images; returns logits `(N, num_classes)`.

    The 13 convolutions of Simonyan & Zisserman (2015), table 1 D, each with BatchNorm in place of a bias, and one
    linear layer. Li et al., Pruning Filters for Efficient ConvNets (2017), section 4.1, have a second linear layer.
    """

    default_cfg: ClassVar[dict[str, Any]] = CONFIG

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def cifar_resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 for `(N, 3, 32, 32)` images; returns logits `(N, num_classes)`.

    That of torchvision, but the first convolution is 3x3 of stride 1 and nothing is pooled behind it.
    """
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as all others there
    model.maxpool = nn.Identity()
    model.default_cfg = CONFIG  # type: ignore[assignment]  # torch declares that of tensors and modules alone
    return model


CIFAR_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": partial(CifarResNet, 20),
    "resnet32": partial(CifarResNet, 32),
    "resnet56": partial(CifarResNet, 56),
    "resnet110": partial(CifarResNet, 110),
    "resnet20_zeros_after": partial(CifarResNet, 20, "after"),
    "cifar_vgg16": CifarVGG16,
    "cifar_resnet18": cifar_resnet18,
}
"""What builds each, by its name for `load_model`."""
