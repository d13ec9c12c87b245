"""Labelled photos in one folder a class, as `torchvision.datasets.ImageFolder` has them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.training.data.augmentation import VARIATION, generator, random_box
from fxprune.training.data.pictures import DataError

SHORT_SIDE = 256 / 224
"""Of a photo that is evaluated, before its centre is cropped, relative to the crop: torchvision's evaluation."""


@dataclass(frozen=True)
class Photos:
    """Photos that are decoded, by a pool of threads, each time they are read.

    Attributes:
        files: where they are.
        labels: int64 `(N,)`, positions in the sorted names of the classes.
        names: of the classes.
        size: height and width in pixels that every photo is brought to.
    """

    files: tuple[Path, ...]
    labels: Tensor
    names: tuple[str, ...]
    size: int

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return 3, self.size, self.size

    def only(self, chosen: Tensor) -> "Photos":
        """Those of these indices alone."""
        files = tuple(self.files[index] for index in chosen.tolist())
        return Photos(files, self.labels[chosen], self.names, self.size)

    def read(self, chosen: Tensor) -> Tensor:
        """The photos of these indices, resized and centre-cropped, float32 in [0, 1].

        Raises:
            DataError: one cannot be decoded.
        """
        from torchvision.transforms import functional as transforms

        short = round(self.size * SHORT_SIDE)
        return self._decode(
            chosen, lambda photo, index: transforms.center_crop(transforms.resize(photo, short), [self.size] * 2)
        )

    def read_varied(self, chosen: Tensor, seed: int, epoch: int) -> Tensor:
        """The same, each cropped, resized and mirrored at random by seed, epoch and index.

        Raises:
            DataError: one cannot be decoded.
        """
        from torchvision.transforms import functional as transforms

        def vary(photo: Any, index: int) -> Any:
            draw = generator(seed, VARIATION, epoch, index)
            box = random_box(photo.height, photo.width, draw)
            cropped = transforms.resized_crop(photo, *box, [self.size] * 2)
            return transforms.hflip(cropped) if torch.rand(1, generator=draw) < 0.5 else cropped

        return self._decode(chosen, vary)

    def _decode(self, chosen: Tensor, transform: Callable[[Any, int], Any]) -> Tensor:
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        def decode(index: int) -> Tensor:
            file = self.files[index]
            try:
                with Image.open(file) as photo:
                    pixels: Tensor = pil_to_tensor(transform(photo.convert("RGB"), index))
            except Exception as error:  # each decoder of Pillow has errors of its own
                raise DataError(f"{file}: cannot be read as an image ({error}); remove or replace it") from error
            return pixels

        return torch.stack(list(self._pool.map(decode, chosen.tolist()))).float() / 255

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def open_photos(folder: Path, size: int) -> tuple[Photos, Photos]:
    """Find the photos `train/CLASS/*` to train with, and `test/CLASS/*`, or else `val/CLASS/*`, to test with.

    Raises:
        DataError: a folder is missing, has no class or a class without photos, or both have not the same classes.
    """
    training = _find(folder / "train", size)
    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if held_out is None:
        raise DataError(f"{folder}: has neither a folder test nor a folder val; put the photos to test with there")
    test = _find(held_out, size)
    if odd := sorted(set(training.names) ^ set(test.names)):
        raise DataError(
            f"{folder}: train and {held_out.name} must have the same classes; only one of them has {', '.join(odd)}; "
            "add or remove these folders"
        )
    return training, test


def open_caltech101(folder: Path, size: int, download: bool = False) -> Photos:
    """Find the photos of Caltech-101 as torchvision keeps them, `caltech101/101_ObjectCategories/CLASS/*`; the
    background is no class. They come without a split.

    Raises:
        DataError: they are not there, or the download failed.
    """
    from torchvision.datasets import Caltech101

    place = folder / "caltech101" / "101_ObjectCategories"
    if not download and not place.is_dir():
        raise DataError(
            f"{place}: is no folder; unpack caltech-101.zip there, or pass --download where there is a network"
        )
    try:
        found = Caltech101(str(folder), download=download)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read ({error}); unpack caltech-101.zip again") from error
    numbered = zip(found.y, found.index, strict=True)
    files = (place / found.categories[label] / f"image_{number:04d}.jpg" for label, number in numbered)
    return Photos(tuple(files), torch.tensor(found.y), tuple(found.categories), size)


def _find(folder: Path, size: int) -> Photos:
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; photos to train with belong into {folder.name}/CLASS/")
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class, or one without photos; the message says which
        raise DataError(f"{folder}: {error}; remove the empty folders, or put photos into them") from error
    files, labels = zip(*found.samples, strict=True)
    return Photos(tuple(map(Path, files)), torch.tensor(labels), tuple(found.classes), size)
