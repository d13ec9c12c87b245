"""Labelled images for the benchmarks: CIFAR-10 sheets, and folders of photos named by their class."""

import functools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fxprune.errors import FxpruneError


class DataError(FxpruneError):
    """Images or their labels are damaged, or do not fit together."""


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
CIFAR10 = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        count: how many.
        read: gives those of the given indices: float32 pixels in [0, 1], `(N, 3, H, W)`, and int64 labels, `(N,)`.
    """

    count: int
    read: Callable[[Sequence[int]], tuple[Tensor, Tensor]]

    def take(self, chosen: Sequence[int]) -> "Images":
        """Return those of the indices `chosen`, in that order. Nothing is read yet."""
        return Images(len(chosen), lambda indices: self.read([chosen[i] for i in indices]))

    def first(self, limit: int | None) -> "Images":
        """Return the first `limit` images, or all."""
        return self if limit is None else self.take(range(min(limit, self.count)))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels and labels, `size` images at a time."""
        for start in range(0, self.count, size):
            yield self.read(range(start, min(start + size, self.count)))

    def pixels(self) -> Tensor:
        """Read the pixels of all images."""
        return self.read(range(self.count))[0]


def open_images(source: str) -> Images:
    """Open `cifar10:DIR`, `cifar10-train:DIR` or `photos:DIR`.

    Raises:
        ValueError: another kind of source, or a folder without images.
        FileNotFoundError: the folder or one of its files is absent.
        DataError: a file is damaged, or does not fit the others; some are only noticed when images are read.
    """
    kind, folder = _parse(source)
    return READERS[kind](folder)


def open_disjoint(evaluation: str, calibration: str, count: int, seed: int) -> tuple[Images, Images]:
    """Open the images to evaluate on, and `count` others, drawn at random, to calibrate with.

    Where both sources are the same, all that are not drawn are evaluated. The images to calibrate with come in the
    order in which they were drawn, so that each part of them is a fair sample too.

    Raises:
        ValueError: the source has not that many; and the errors of `open_images`.
        FileNotFoundError: see `open_images`.
    """
    evaluated, source = open_images(evaluation), open_images(calibration)
    same = _parse(evaluation) == _parse(calibration)
    if count > source.count - same:
        rest = ", of which some must remain to evaluate" if same else ""
        kind = calibration.partition(":")[0]
        raise ValueError(f"{count} images to calibrate with: {kind} has {source.count}{rest}; ask for fewer")
    order = np.random.default_rng(seed).permutation(source.count).tolist()
    if same:
        evaluated = source.take(sorted(order[count:]))
    return evaluated, source.take(order[:count])


def _parse(source: str) -> tuple[str, Path]:
    kind, _, folder = source.partition(":")
    if kind not in READERS or not folder:
        raise ValueError(f"{source!r}: must be {':DIR, '.join(READERS)}:DIR")
    return kind, Path(folder).resolve()


SHEET = 5000
"""Images on a CIFAR-10 sheet, a lossless picture of 50 rows x 100 columns of images of 32x32 pixels."""


def cifar10_test(folder: Path) -> Images:
    """The first 5,000 test images of CIFAR-10, in the official order.

    The folder holds `cifar10_test_00.webp`, one sheet, and `labels.npz` with `y_test`.
    """
    images = read_sheet(folder / "cifar10_test_00.webp")
    labels = read_labels(folder, "y_test", SHEET)
    return Images(SHEET, lambda chosen: (images[list(chosen)].float() / 255, labels[list(chosen)]))


def cifar10_train(folder: Path) -> Images:
    """The training images of CIFAR-10, in the official order; a sheet is decoded when an image of it is read.

    The folder holds the sheets `cifar10_train_00.webp` and on, or the first few of them, and `labels.npz` with
    `y_train`.
    """
    sheets = training_sheets(folder)
    labels = read_labels(folder, "y_train", SHEET * len(sheets))
    decode = functools.lru_cache(maxsize=1)(read_sheet)

    def read(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(chosen)
        pixels = torch.empty(len(index), 3, 32, 32, dtype=torch.uint8)
        for number in sorted({i // SHEET for i in chosen}):
            here = index // SHEET == number
            pixels[here] = decode(sheets[number])[index[here] % SHEET]
        return pixels.float() / 255, labels[index]

    return Images(SHEET * len(sheets), read)


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

    def read(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        these = [files[i] for i in chosen]
        return torch.stack([pixels(file) for file in these]), torch.tensor([int(file.name[:3]) for file in these])

    return Images(len(files), read)


READERS = {"cifar10": cifar10_test, "cifar10-train": cifar10_train, "photos": photos}
"""How each kind of source is read from its folder."""
