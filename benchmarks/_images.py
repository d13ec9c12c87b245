"""Labelled images for the accuracy benchmark: CIFAR-10 sheets, and folders of photos named by their class."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each colour channel, of pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalize `(N, 3, H, W)` pixels in [0, 1]."""
        shape = (1, 3, 1, 1)
        return (pixels - torch.tensor(self.mean).reshape(shape)) / torch.tensor(self.std).reshape(shape)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        count: how many.
        read: `read(start, stop)` gives float32 pixels in [0, 1], `(N, 3, H, W)`, and int64 labels, `(N,)`.
    """

    count: int
    read: Callable[[int, int], tuple[Tensor, Tensor]]

    def first(self, limit: int | None) -> "Images":
        """Return the first `limit` images, or all."""
        return Images(self.count if limit is None else min(limit, self.count), self.read)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels and labels, `size` images at a time."""
        for start in range(0, self.count, size):
            yield self.read(start, min(start + size, self.count))


def open_images(source: str) -> Images:
    """Open `cifar10:DIR` or `photos:DIR`.

    Raises:
        ValueError: another kind of source, or a folder without images.
        FileNotFoundError: the folder or one of its files is absent.
    """
    kind, _, folder = source.partition(":")
    readers = {"cifar10": cifar10_test, "photos": photos}
    if kind not in readers or not folder:
        raise ValueError(f"{source!r}: must be cifar10:DIR or photos:DIR")
    return readers[kind](Path(folder))


def cifar10_test(folder: Path) -> Images:
    """The first 5,000 test images of CIFAR-10, 32x32 pixels, in the official order.

    The folder holds `cifar10_test_00.webp`, one lossless sheet of 50 rows x 100 columns of images, and `labels.npz`
    with `y_test`.
    """
    from PIL import Image

    with Image.open(folder / "cifar10_test_00.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # (row, y, column, x, colour) -> (row, column, colour, y, x)
    images = torch.tensor(pixels.reshape(50, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(5000, 3, 32, 32))
    with np.load(folder / "labels.npz") as arrays:
        labels = torch.tensor(arrays["y_test"][:5000].astype(np.int64))
    return Images(5000, lambda start, stop: (images[start:stop].float() / 255, labels[start:stop]))


def photos(folder: Path) -> Images:
    """JPEG files whose names begin with the three digits of their ImageNet class; short side 256, centre crop 224.

    That is the usual evaluation of torchvision's first ImageNet weights.
    """
    from PIL import Image
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    files = sorted(folder.glob("[0-9][0-9][0-9]*.jp*g"))
    if not files:
        raise ValueError(f"{folder}: no photo in it has a name such as 207_golden_retriever.jpg")

    def pixels(file: Path) -> Tensor:
        with Image.open(file) as photo:
            cropped: Tensor = pil_to_tensor(center_crop(resize(photo.convert("RGB"), 256), 224))
        return cropped.float() / 255

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        chosen = files[start:stop]
        return torch.stack([pixels(file) for file in chosen]), torch.tensor([int(file.name[:3]) for file in chosen])

    return Images(len(files), read)
