"""Training data: what is trained on, what chooses between epochs, and what is only looked at in the end.

    data = open_data("cifar10:DIR", validation=5000, seed=0)
    for epoch in range(epochs):
        for positions in data.order(epoch).split(64):
            inputs, labels = data.training_batch(positions, epoch)

Everything random is a function of the seed, the epoch and the image alone.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fxprune.training.data.augmentation import ORDER, VARIATION, generator, shift_and_flip
from fxprune.training.data.cifar import BATCHES, SHEET, read_batches, read_labels, read_sheet, training_sheets
from fxprune.training.data.folders import Photos, open_caltech101, open_photos
from fxprune.training.data.given import AS_THEY_ARE, open_given
from fxprune.training.data.pictures import CIFAR10, CIFAR100, IMAGENET, DataError, Normalization, Pictures

SPLIT_SEED = 0
"""Of the images that are split off. It is the same for every run: a network that one seed has trained and another
fine-tunes has then never seen the images that choose its best epoch."""
DIGITS_TEST = 360
"""Test images of the digits, a fifth; they come without a split of their own."""
CALTECH_TEST = 5
"""One in so many photos of Caltech-101 is to test with, as Hubens et al. 2022 split it."""
DIGITS = Normalization((0.305,), (0.376,))
"""Of the pixels of the digits that are not tested with."""


@dataclass(frozen=True)
class Data:
    """Images in three parts: to train with, to validate with, and to test with.

    Attributes:
        name: a name in `SOURCES`, or `"given"`.
        normalize: what the pixels go through last.
        pictures: those of the first two parts.
        training: indices of `pictures` to train with, int64 `(train_count,)`. A *position* is one in this list.
        validation: indices of `pictures` to validate with, int64 `(validation_count,)`.
        test: pictures to test with.
        seed: of order and augmentation.
        augment: whether images to train with are varied at random.
    """

    name: str
    normalize: Normalization
    pictures: Pictures
    training: Tensor
    validation: Tensor
    test: Pictures
    seed: int
    augment: bool

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.pictures.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.pictures.shape

    @property
    def train_count(self) -> int:
        """How many images there are to train with."""
        return len(self.training)

    @property
    def validation_count(self) -> int:
        """How many images there are to validate with."""
        return len(self.validation)

    @property
    def test_count(self) -> int:
        """How many images there are to test with."""
        return len(self.test.labels)

    def order(self, epoch: int) -> Tensor:
        """The shuffled positions of an epoch, int64 `(train_count,)`, each once."""
        return torch.randperm(self.train_count, generator=generator(self.seed, ORDER, epoch))

    def training_batch(self, positions: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The images to train with at these positions, varied as they are in this epoch.

        Returns:
            Normalized float32 `(B, C, H, W)`, and labels, int64 `(B,)`.

        Raises:
            DataError: an image is damaged.
        """
        if not self.augment:
            return self.plain_batch(positions)
        chosen = self.training[positions]
        pixels = self.pictures.read_varied(chosen, self.seed, epoch)
        return self.normalize(pixels), self.pictures.labels[chosen]

    def plain_batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same as they are, as to calibrate with."""
        return self._plain(self.pictures, self.training[positions])

    def validation_batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images to validate with and their labels, as `training_batch` gives them but not varied."""
        return self._plain_batches(self.pictures, self.validation, batch)

    def test_batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images to test with and their labels, not varied."""
        return self._plain_batches(self.test, torch.arange(self.test_count), batch)

    def _plain_batches(self, pictures: Pictures, indices: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(indices), batch):
            yield self._plain(pictures, indices[start : start + batch])

    def _plain(self, pictures: Pictures, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return self.normalize(pictures.read(chosen)), pictures.labels[chosen]


def usual_validation(source: str) -> int:
    """How many images of a source are held back if nobody says it: 5,000, of the digits 200."""
    return 200 if source == "digits" else 5000


def open_data(
    source: str,
    *,
    validation: int,
    seed: int = 0,
    augment: bool = True,
    normalize: Normalization | None = None,
    download: bool = False,
) -> Data:
    """Open training data, as its authors or torchvision leave it on disk.

    Args:
        source: one of

            - `cifar10:DIR` and `cifar100:DIR`, where DIR has the folder of their authors, or of CIFAR-10 sheets and
              labels as `fxprune.training.data.cifar` reads them, with half of the test images; moved by up to 4 pixels
              and mirrored.
            - `caltech101:DIR`, where DIR has `caltech101/101_ObjectCategories`; a fifth of the photos, of each class
              equally and the same for every seed, are to test with, for it comes without a split.
            - `folder:DIR`, photos in `train/CLASS/` and in `test/CLASS/` or, where there is no `test`, in `val/CLASS/`,
              as ImageNet is kept too. Photos are cropped, resized and mirrored, and brought to 224x224 pixels, or as
              many as in `folder:DIR?size=96`.
            - `digits`, the 8x8 digits of scikit-learn; moved by up to 1 pixel.
            - `MODULE:CALLABLE`, which gives two datasets, to train and to test with; see `fxprune.training.data.given`.
        validation: how many of the images to train with are held back to choose by, equally of each class, the same
            for every seed.
        seed: of order and augmentation, from 0.
        augment: whether images to train with are varied at random.
        normalize: how the network in question wants its inputs; None for the statistics of the source (of ImageNet
            for photos; a dataset of one's own is taken as it is).
        download: fetch CIFAR-10, CIFAR-100 or Caltech-101 into DIR first, if they are not there.

    Raises:
        DataError: another kind of source, or a damaged one, see `cifar`, `folders` and `given`; or it cannot be split
            so.
        FileNotFoundError: a file of the source is absent.
    """
    if seed < 0:
        raise DataError(f"seed {seed}: must not be negative")
    match = re.fullmatch(r"(\w+)(?::(.+?))?(?:\?size=([1-9]\d*))?", source)
    kind, place, pixels = match.groups() if match else ("", None, None)
    parts: tuple[Pictures, Pictures]
    if kind in SOURCES and (kind == "digits") == (place is None):
        name, usual = kind, SOURCES[kind].normalize
        parts = SOURCES[kind].read(Path(place or ""), int(pixels or 224), download)
    elif kind not in SOURCES and re.fullmatch(r"[\w.]+:[\w.]+", source):
        name, parts, usual = "given", open_given(source), AS_THEY_ARE
    else:
        raise DataError(f"{source!r}: must be {SOURCE_WORDS}")
    pictures, test = parts
    if normalize is not None and len(normalize.mean) != pictures.shape[0]:  # or each would be broadcast over the other
        raise DataError(
            f"{source}: has pictures of {pictures.shape[0]} channels, and the network is for {len(normalize.mean)}; "
            "choose data or network to fit (digits_resnet is for the digits)"
        )
    training, held_back = _split(pictures.labels, validation, f"{name}: {validation} images to validate with")
    return Data(name, normalize or usual, pictures, training, held_back, test, seed, augment)


def fetch(source: str) -> None:
    """Download the images of a source into its folder, where they are not there yet.

    Raises:
        DataError: it is none that can be fetched, or the download failed.
    """
    kind, _, place = source.partition(":")
    if kind not in FETCHED or not place:
        raise DataError(f"{source!r}: only {', '.join(FETCHED)} can be downloaded; leave --download out")
    open_data(source, validation=0, download=True)


def _split(labels: Tensor, count: int, what: str) -> tuple[Tensor, Tensor]:
    """Sorted indices of all but `count` images, and of these; both have the same shares of the classes."""
    from sklearn.model_selection import train_test_split

    every = torch.arange(len(labels))
    if count == 0:
        return every, every[:0]
    try:
        parts = train_test_split(every.numpy(), test_size=count, random_state=SPLIT_SEED, stratify=labels.numpy())
    except ValueError as error:  # a class would have no image in one of the parts
        raise DataError(
            f"{what} of {len(labels)}: each class must have images in both parts; ask for another number with "
            "--validation, or for 0"
        ) from error
    rest, drawn = (torch.from_numpy(part).sort().values for part in parts)
    return rest, drawn


@dataclass(frozen=True)
class Held:
    """Pictures held in memory.

    Attributes:
        pixels: uint8 `(N, C, H, W)`.
        labels: int64 `(N,)`.
        classes: how many there are.
        white: the largest pixel.
        shift: largest number of pixels by which a varied picture is moved; zeros move in.
        flip: whether every other varied picture is mirrored.
    """

    pixels: Tensor
    labels: Tensor
    classes: int
    white: int
    shift: int
    flip: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def read(self, chosen: Tensor) -> Tensor:
        """Those of the indices `chosen`, int64 `(B,)`, as float32 `(B, C, H, W)` in [0, 1]."""
        return self.pixels[chosen].float() / self.white

    def read_varied(self, chosen: Tensor, seed: int, epoch: int) -> Tensor:
        """The same, moved and mirrored at random: He et al. 2016, Deep Residual Learning, section 4.2."""
        corners, flips = _draw(len(self.labels), self.shift, seed, epoch)
        flips = flips[chosen] & self.flip
        return shift_and_flip(self.pixels[chosen], corners[chosen], flips, self.shift).float() / self.white


@lru_cache(maxsize=2)
def _draw(count: int, shift: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Corners and flips of all pictures of an epoch, for `shift_and_flip`."""
    draw = generator(seed, VARIATION, epoch)
    corners = torch.randint(0, 2 * shift + 1, (count, 2), generator=draw)
    return corners, torch.rand(count, generator=draw) < 0.5


def _cifar(folder: Path, classes: int, download: bool) -> tuple[Held, Held]:
    parts = (read_batches(folder, training, classes, download) for training in (True, False))
    training, test = (Held(pixels, labels, classes, white=255, shift=4, flip=True) for pixels, labels in parts)
    return training, test


def _cifar10(folder: Path, download: bool) -> tuple[Held, Held]:
    if download or (folder / BATCHES[10]).is_dir():
        return _cifar(folder, 10, download)
    if not any(folder.glob("cifar10_train_*.webp")):
        raise FileNotFoundError(f"{folder}: has neither a folder {BATCHES[10]} nor cifar10_train_00.webp")
    sheets = training_sheets(folder)
    labels, test_labels = read_labels(folder, "y_train", SHEET * len(sheets)), read_labels(folder, "y_test", SHEET)
    pixels = torch.empty(SHEET * len(sheets), 3, 32, 32, dtype=torch.uint8)
    for number, sheet in enumerate(sheets):
        pixels[SHEET * number : SHEET * (number + 1)] = read_sheet(sheet)
    test = read_sheet(folder / "cifar10_test_00.webp")
    return (
        Held(pixels, labels, 10, white=255, shift=4, flip=True),
        Held(test, test_labels, 10, white=255, shift=4, flip=True),
    )


def _cifar100(folder: Path, download: bool) -> tuple[Held, Held]:
    if not download and not (folder / BATCHES[100]).is_dir():
        raise FileNotFoundError(f"{folder}: has no folder {BATCHES[100]}; unpack cifar-100-python.tar.gz there")
    return _cifar(folder, 100, download)


def _caltech101(folder: Path, size: int, download: bool) -> tuple[Photos, Photos]:
    photos = open_caltech101(folder, size, download)
    rest, test = _split(photos.labels, len(photos.labels) // CALTECH_TEST, "caltech101: test images")
    return photos.only(rest), photos.only(test)


def _digits() -> tuple[Held, Held]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels, labels = torch.tensor(digits.images).byte().unsqueeze(1), torch.tensor(digits.target)
    rest, test = _split(labels, DIGITS_TEST, "digits: test images")
    parts = (Held(pixels[part], labels[part], 10, white=16, shift=1, flip=False) for part in (rest, test))
    training, held_out = parts
    return training, held_out


@dataclass(frozen=True)
class Source:
    """Where data come from.

    Attributes:
        words: how it is asked for.
        normalize: its statistics.
        read: folder, pixels and whether to download, to pictures to train and to test with.
    """

    words: str
    normalize: Normalization
    read: Callable[[Path, int, bool], tuple[Pictures, Pictures]]


SOURCES = {
    "cifar10": Source("cifar10:DIR", CIFAR10, lambda folder, _, download: _cifar10(folder, download)),
    "cifar100": Source("cifar100:DIR", CIFAR100, lambda folder, _, download: _cifar100(folder, download)),
    "caltech101": Source("caltech101:DIR", IMAGENET, _caltech101),
    "folder": Source("folder:DIR", IMAGENET, lambda folder, size, _: open_photos(folder, size)),
    "digits": Source("digits", DIGITS, lambda *_: _digits()),
}
FETCHED = ("cifar10", "cifar100", "caltech101")
SOURCE_WORDS = ", ".join(source.words for source in SOURCES.values()) + " or MODULE:CALLABLE; photos with ?size=PIXELS"
"""What `open_data` takes, for a line of help."""
