"""Small data sets in the formats of their authors."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image, ImageDraw


def write_photo(path: Path, colour: int, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 60, width)[None, :, None] + np.linspace(0, 90, height)[:, None, None]
    Image.fromarray((ramp + np.array([colour, 20, 90])).astype(np.uint8)).save(path)


def write_batches(folder: Path) -> None:
    """What the authors of CIFAR-10 distribute, with 20 images a file; the label is the first pixel's red."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.full((20, 3072), number, dtype=np.uint8)
        pixels[:, 0] = np.arange(20) % 10
        (batches / name).write_bytes(pickle.dumps({"data": pixels, "labels": (np.arange(20) % 10).tolist()}))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def write_hundred(folder: Path) -> None:
    """What the authors of CIFAR-100 distribute, with 200 images to train with and 100 to test with."""
    place = folder / "cifar-100-python"
    place.mkdir()
    for name, count in (("train", 200), ("test", 100)):
        labels = (np.arange(count) % 100).tolist()
        pixels = np.repeat(np.array(labels, dtype=np.uint8)[:, None], 3072, 1)
        record = {"data": pixels, "fine_labels": labels, "coarse_labels": [0] * count}
        (place / name).write_bytes(pickle.dumps(record))
    (place / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(number) for number in range(100)]}))


def accept_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what is written here for whole, which is not what the authors distribute."""
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *arguments: True)


def write_drawn(folder: Path, count: int) -> None:
    """Pictures with a disc and a bar of random colours, places and sizes, in folders of any depth."""
    draw = np.random.default_rng(0)
    for number in range(count):
        picture = Image.new("RGB", (64, 48), tuple(draw.integers(0, 256, 3).tolist()))
        pen = ImageDraw.Draw(picture)
        x, y, size = draw.integers(4, 30, 3).tolist()
        pen.ellipse((x, y, x + size, y + size), fill=tuple(draw.integers(0, 256, 3).tolist()))
        pen.rectangle((y, x, y + 3, x + size), fill=tuple(draw.integers(0, 256, 3).tolist()))
        place = folder / ("more" if number % 3 else "") / f"picture_{number}.{('png', 'jpg', 'webp')[number % 3]}"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)
