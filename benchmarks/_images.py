"""Images that accuracy is measured on: CIFAR-10 sheets, and photos named by their ImageNet class."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fxprune.training.data.cifar import SHEET, read_labels, read_sheet, training_sheets


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
