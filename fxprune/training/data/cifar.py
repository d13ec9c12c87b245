"""CIFAR-10 and CIFAR-100 as their authors distribute them, and lossless sheets of images with an archive of labels."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fxprune.training.data.pictures import DataError

BATCHES = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
"""The folders in the archives of their authors, <https://www.cs.toronto.edu/~kriz/cifar.html>, by number of classes."""
SHEET = 5000
"""Images on a CIFAR-10 sheet, a lossless picture of 50 rows x 100 columns of images of 32x32 pixels."""


def read_batches(folder: Path, training: bool, classes: int = 10, download: bool = False) -> tuple[Tensor, Tensor]:
    """All training or test images of a folder in `BATCHES`: uint8 `(N, 3, 32, 32)`, and int64 labels `(N,)`, of
    CIFAR-100 the fine ones.

    Raises:
        DataError: a file is absent or not as its authors made it: torchvision compares checksums before it opens one.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {10: CIFAR10, 100: CIFAR100}[classes]
    try:
        found = kind(str(folder), train=training, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{folder / BATCHES[classes]}: incomplete or damaged; unpack cifar-{classes}-python.tar.gz again ({error})"
        ) from error
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


def training_sheets(folder: Path) -> list[Path]:
    """Files of the training images of CIFAR-10, `cifar10_train_00.webp` and on.

    Raises:
        FileNotFoundError: there is none.
        DataError: one in between is missing, so that the labels would belong to other images.
    """
    sheets = sorted(folder.glob("cifar10_train_[0-9][0-9].webp"))
    if not sheets:
        raise FileNotFoundError(f"{folder}: has no cifar10_train_00.webp")
    for number, sheet in enumerate(sheets):
        if sheet.stem != f"cifar10_train_{number:02d}":
            missing = f"cifar10_train_{number:02d}.webp"
            raise DataError(f"{folder}: has {sheet.name} but no {missing}; add it, or remove those that follow it")
    return sheets


def read_sheet(path: Path) -> Tensor:
    """The images of a sheet, `(5000, 3, 32, 32)` uint8.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is damaged, or of another size.
    """
    from PIL import Image

    try:
        with Image.open(path) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises depends on where a file ends
        raise DataError(f"{path}: cannot be read as an image ({error}); replace it") from error
    if pixels.shape != (1600, 3200, 3):
        height, width, _ = pixels.shape
        raise DataError(f"{path}: has {width}x{height} pixels; a sheet of {SHEET} images has 3200x1600; replace it")
    # (row, y, column, x, colour) -> (row, column, colour, y, x)
    return torch.tensor(pixels.reshape(50, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(SHEET, 3, 32, 32))


def read_labels(folder: Path, name: str, count: int) -> Tensor:
    """The first `count` labels of the array `name` in `labels.npz`, int64.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is damaged, or has no such array, too few labels or ones that are no CIFAR-10 class.
    """
    path = folder / "labels.npz"
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # given a path, numpy leaves a damaged file open
            labels = torch.tensor(arrays[name].astype(np.int64))
    except FileNotFoundError:
        raise
    except KeyError:
        raise DataError(f"{path}: has no array {name}; replace it") from None
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as arrays of labels ({error}); replace it") from error
    if labels.ndim != 1 or len(labels) < count:
        raise DataError(f"{path}: {name} has shape {tuple(labels.shape)}; {count} labels are needed; replace it")
    if labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{path}: {name} has labels from {labels.min()} to {labels.max()}; CIFAR-10 has 0 to 9")
    return labels[:count]
