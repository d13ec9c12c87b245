"""Labelled pictures, and how a network wants their pixels."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxprune.errors import FxpruneError


class DataError(FxpruneError):
    """Images or their labels are damaged, or do not fit together."""


class Pictures(Protocol):
    """Labelled pictures of one size."""

    @property
    def labels(self) -> Tensor:
        """Int64 `(N,)`, from 0 to `classes - 1`."""

    @property
    def classes(self) -> int:
        """How many there are."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""

    def read(self, chosen: Tensor) -> Tensor:
        """Those of the indices `chosen`, int64 `(B,)`, as float32 `(B, C, H, W)` in [0, 1]."""

    def read_varied(self, chosen: Tensor, seed: int, epoch: int) -> Tensor:
        """The same, varied at random; how is a function of seed, epoch and index."""


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each of C colour channels, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalize `(N, C, H, W)` pixels in [0, 1]."""
        shape = (1, -1, 1, 1)
        return (pixels - torch.tensor(self.mean).reshape(shape)) / torch.tensor(self.std).reshape(shape)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR100 = Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
"""Mean and deviation of the 50,000 training images."""
CIFAR10 = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))

NORMALIZATIONS = {
    "resnet20": IMAGENET,  # these three have published weights, trained with the statistics of ImageNet
    "resnet32": IMAGENET,
    "resnet56": IMAGENET,
    "resnet20_zeros_after": CIFAR10,
    "cifar_vgg16": CIFAR10,
    "cifar_resnet18": CIFAR10,
}
"""Of the networks for CIFAR-10, by name; others take that of the images, or of ImageNet."""
