"""Training data: every image once an epoch, the same whoever asks for it, and faults that are named."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.model_selection
import torch
import torchvision
from datasets_harness import accept_small, write_batches, write_hundred, write_photo
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import transforms

from benchmarks._images import open_images
from fxprune.training.data import augmentation, sources
from fxprune.training.data.augmentation import generator, random_box, shift_and_flip
from fxprune.training.data.cifar import SHEET
from fxprune.training.data.pictures import CIFAR10, IMAGENET, DataError, Normalization
from fxprune.training.data.sources import Data, Held, fetch, open_data

CLASSES = ("ant", "bee", "cat")
PLAIN = Normalization((0, 0, 0), (1, 1, 1))


def held(count: int = 40) -> Data:
    """Random images of 3 channels, moved by up to 2 pixels and mirrored."""
    pixels = torch.randint(0, 256, (count, 3, 6, 8), dtype=torch.uint8)
    pictures = Held(pixels, torch.arange(count) % 4, 4, white=255, shift=2, flip=True)
    training = torch.arange(count).flip(0)[: count - 8]
    return Data("held", PLAIN, pictures, training, torch.arange(8), pictures, seed=3, augment=True)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of four photos to train with, one each to test with."""
    for label, name in enumerate(CLASSES):
        for number, kind in enumerate(("png", "jpg", "webp", "png")):
            write_photo(tmp_path / "train" / name / f"{number}.{kind}", 40 * label + number, 40 - number, 30 + number)
        write_photo(tmp_path / "val" / name / "0.png", 40 * label)
    return tmp_path


def write_sheet(path: Path, colours: Tensor) -> None:
    """Write 5,000 images of one colour each, `(5000, 3)` uint8."""
    sheet = colours.reshape(50, 100, 3).repeat_interleave(32, 0).repeat_interleave(32, 1)
    Image.fromarray(sheet.numpy()).save(path, lossless=True, quality=0, method=0)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sheets to train with whose colours say where an image is: sheet, hundreds, rest."""
    folder = tmp_path_factory.mktemp("cifar")
    number = torch.arange(SHEET)
    for sheet in range(2):
        colours = torch.stack([torch.full_like(number, 200 + sheet), number // 100, number % 100], 1).byte()
        write_sheet(folder / f"cifar10_train_0{sheet}.webp", colours)
    (folder / "cifar10_test_00.webp").write_bytes((folder / "cifar10_train_01.webp").read_bytes())
    np.savez(folder / "labels.npz", y_train=np.arange(50_000) // 3 % 10, y_test=np.arange(SHEET) % 10)
    return folder


def is_same_in_any_batch(data: Data, epoch: int = 2) -> bool:
    together = data.training_batch(torch.arange(data.train_count), epoch)[0]
    order = data.order(epoch)
    alone = torch.cat([data.training_batch(order[i : i + 1], epoch)[0] for i in range(len(order))])
    return torch.equal(alone, together[order])


@pytest.mark.parametrize("source", ["held", "digits", "folder"])
def test_an_image_is_the_same_in_any_batch(source: str, photos: Path) -> None:
    if source == "held":
        data = held()
    else:
        data = open_data("digits" if source == "digits" else f"folder:{photos}?size=16", validation=0, seed=1)
    assert is_same_in_any_batch(data)


def test_the_check_sees_what_was_drawn_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = generator(0)

    def fresh(count: int, shift: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, 2 * shift + 1, (count, 2), generator=draw), torch.rand(count, generator=draw) < 0.5

    monkeypatch.setattr(sources, "_draw", fresh)
    assert not is_same_in_any_batch(held())


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_images_vary_with_seed_and_epoch_only(source: str, photos: Path) -> None:
    where = "digits" if source == "digits" else f"folder:{photos}?size=16"
    positions = torch.arange(9)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]

    def batch(seed: int, epoch: int, augment: bool = True) -> Tensor:
        return open_data(where, validation=3 if source == "folder" else 10, seed=seed, augment=augment).training_batch(
            positions, epoch
        )[0]

    first = batch(0, 0)
    assert torch.equal(first, batch(0, 0))
    assert not torch.equal(first, batch(1, 0))
    assert not torch.equal(first, batch(0, 1))
    assert torch.equal(batch(0, 0, augment=False), batch(1, 1, augment=False))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert numpy_state == np.random.get_state()[1].tolist()  # type: ignore[index]


def covers_all(data: Data, epoch: int) -> bool:
    return data.order(epoch).sort().values.tolist() == list(range(data.train_count))


def test_an_epoch_has_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = held()
    assert all(covers_all(data, epoch) for epoch in range(5))
    assert torch.equal(data.order(0), data.order(0))
    assert len({tuple(data.order(epoch).tolist()) for epoch in range(5)}) == 5
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, generator: torch.randint(0, n, (n,), generator=generator))
        assert not covers_all(data, 0)


def test_streams_of_different_purpose_differ() -> None:
    paths = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0), (1, 0, 1)]
    seen = {tuple(torch.rand(4, generator=generator(seed, *path)).tolist()) for seed in (0, 1) for path in paths}
    assert len(seen) == 2 * len(paths)


def cropped_one_by_one(pixels: Tensor, corners: Tensor, flips: Tensor, shift: int) -> Tensor:
    _, channels, height, width = pixels.shape
    out = torch.zeros_like(pixels)
    for i, (top, left) in enumerate(corners.tolist()):
        padded = torch.zeros(channels, height + 2 * shift, width + 2 * shift, dtype=pixels.dtype)
        padded[:, shift : shift + height, shift : shift + width] = pixels[i]
        for x in range(width):
            out[i, :, :, width - 1 - x if flips[i] else x] = padded[:, top : top + height, left + x]
    return out


def test_crops_and_flips_are_those_of_each_image_alone() -> None:
    pixels = torch.randint(1, 256, (50, 2, 5, 7), dtype=torch.uint8)
    corners, flips = torch.randint(0, 7, (50, 2)), torch.rand(50) < 0.5
    found = shift_and_flip(pixels, corners, flips, 3)
    assert torch.equal(found, cropped_one_by_one(pixels, corners, flips, 3))
    assert not torch.equal(found, cropped_one_by_one(pixels, corners.flip(1), flips, 3))
    assert not torch.equal(found, cropped_one_by_one(pixels, corners, ~flips, 3))
    still = torch.full((50, 2), 3)
    assert torch.equal(shift_and_flip(pixels, still, torch.zeros(50, dtype=torch.bool), 3), pixels)


def test_every_corner_and_both_sides_are_drawn() -> None:
    corners, flips = sources._draw(5000, 4, 0, 0)
    assert len(set(map(tuple, corners.tolist()))) == 81
    assert corners.min() == 0
    assert corners.max() == 8
    assert flips.float().mean() == pytest.approx(0.5, abs=0.03)


def boxes_differ(height: int, width: int) -> bool:
    crop = transforms.RandomResizedCrop(8)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = crop.get_params(torch.empty(3, height, width), list(crop.scale), list(crop.ratio))
        if random_box(height, width, torch.Generator().manual_seed(seed)) != expected:
            return True
    return False


@pytest.mark.parametrize("size", [(30, 40), (224, 224), (5, 400), (400, 5), (1, 1)])
def test_random_crops_are_those_of_torchvision(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not boxes_differ(*size)
    monkeypatch.setattr(augmentation, "ASPECT", (1 / 2, 2))
    assert boxes_differ(*size) or size == (1, 1)


def shares_differ(data: Data) -> int:
    """By how many images a class has more or fewer to validate with than its share."""
    labels = data.pictures.labels
    counts, all_counts = (labels[data.validation].bincount(), labels.bincount())
    return int((counts - all_counts * data.validation_count / len(labels)).abs().max().ceil())


def test_each_class_is_validated_with_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data("digits", validation=200)
    assert shares_differ(data) <= 1
    assert torch.cat([data.training, data.validation]).sort().values.tolist() == list(range(len(data.pictures.labels)))
    split = sklearn.model_selection.train_test_split
    monkeypatch.setattr(
        sklearn.model_selection,
        "train_test_split",
        lambda *args, **options: split(*args, **options | {"stratify": None}),
    )
    assert shares_differ(open_data("digits", validation=200)) > 1


def test_the_split_is_the_same_for_every_seed() -> None:
    first, second = (open_data("digits", validation=100, seed=seed) for seed in (0, 5))
    assert torch.equal(first.validation, second.validation)
    assert isinstance(first.test, Held)
    assert isinstance(second.test, Held)
    assert torch.equal(first.test.pixels, second.test.pixels)
    assert not torch.equal(first.order(0), second.order(0))


def test_digits_are_all_there() -> None:
    data = open_data("digits", validation=100)
    parts = [*data.validation_batches(64), *data.test_batches(64), data.plain_batch(torch.arange(data.train_count))]
    rows = sorted(
        (int(label), *(x * 0.376 + 0.305).mul(16).round().int().flatten().tolist())
        for inputs, labels in parts
        for x, label in zip(inputs, labels, strict=True)
    )
    digits = load_digits()
    assert rows == sorted((int(y), *x.astype(int).tolist()) for x, y in zip(digits.data, digits.target, strict=True))
    assert (data.train_count, data.validation_count, data.test_count) == (1337, 100, 360)
    assert (data.name, data.classes, data.shape) == ("digits", 10, (1, 8, 8))


def test_batches_of_nothing() -> None:
    assert list(open_data("digits", validation=0).validation_batches(8)) == []


def test_cifar(cifar: Path) -> None:
    data = open_data(f"cifar10:{cifar}", validation=1000, normalize=PLAIN)
    assert (data.name, data.classes, data.shape) == ("cifar10", 10, (3, 32, 32))
    assert (data.train_count, data.validation_count, data.test_count) == (9000, 1000, 5000)
    positions = data.order(0)[:20]
    inputs, labels = data.training_batch(positions, 0)
    assert inputs.dtype == torch.float32
    sheet, hundreds, rest = (inputs[:, :, 16, 16] * 255).round().long().unbind(1)  # no shift reaches the middle
    index = (sheet - 200) * SHEET + hundreds * 100 + rest
    assert torch.equal(index, data.training[positions])
    assert torch.equal(labels, index // 3 % 10)
    assert (inputs == 0).all(dim=1).any(dim=(1, 2)).sum() > 15  # black moved in
    plain, _ = data.plain_batch(positions)
    assert torch.equal(plain, inputs[:, :, 16:17, 16:17].expand_as(plain))
    assert torch.equal(next(data.test_batches(10))[1], torch.arange(10))
    usual = open_data(f"cifar10:{cifar}", validation=1000)
    assert usual.normalize is CIFAR10
    assert torch.equal(usual.plain_batch(positions)[0], CIFAR10(plain))


def test_cifar_as_its_authors_distribute_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_batches(tmp_path)
    with pytest.raises(DataError, match=r"cifar-10-batches-py: incomplete or damaged; unpack cifar-10-python\.tar\.gz"):
        open_data(f"cifar10:{tmp_path}", validation=0)  # these are not the files of its authors
    accept_small(monkeypatch)
    data = open_data(f"cifar10:{tmp_path}", validation=10, augment=False, normalize=PLAIN)
    assert (data.train_count, data.validation_count, data.test_count) == (90, 10, 20)
    images, labels = data.training_batch(torch.arange(90), 0)
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
    batch = (images[:, 2, 31, 31] * 255).round().long()
    assert torch.equal(batch, data.training // 20)
    ((test, _),) = data.test_batches(20)
    assert set((test[:, 1] * 255).round().flatten().tolist()) == {5}


def test_cifar_100_has_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no folder cifar-100-python; unpack cifar-100-python\.tar\.gz"):
        open_data(f"cifar100:{tmp_path}", validation=0)
    write_hundred(tmp_path)
    with pytest.raises(DataError, match="cifar-100-python: incomplete or damaged"):
        open_data(f"cifar100:{tmp_path}", validation=0)
    accept_small(monkeypatch)
    data = open_data(f"cifar100:{tmp_path}", validation=100, augment=False, normalize=PLAIN)
    assert (data.name, data.classes, data.train_count, data.test_count) == ("cifar100", 100, 100, 100)
    images, labels = data.training_batch(torch.arange(100), 0)
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)


def test_caltech_has_no_background_and_a_split_of_every_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"101_ObjectCategories: is no folder; unpack caltech-101\.zip there, or pass"):
        open_data(f"caltech101:{tmp_path}", validation=0)
    assert not list(tmp_path.iterdir()), "nothing is made where nothing was found"
    place = tmp_path / "caltech101" / "101_ObjectCategories"
    for label, name in enumerate(("BACKGROUND_Google", *CLASSES)):
        for number in range(1, 6):
            write_photo(place / name / f"image_{number:04d}.jpg", 40 * label)
    data = open_data(f"caltech101:{tmp_path}?size=8", validation=3, augment=False, normalize=PLAIN)
    assert (data.classes, data.shape) == (3, (3, 8, 8))
    assert (data.train_count, data.validation_count, data.test_count) == (9, 3, 3)
    (images, labels), *_ = data.test_batches(3)
    assert labels.tolist() == [0, 1, 2]
    reds = images[:, 0].mean((1, 2)) * 255
    assert (reds.diff() - 40).abs().max() < 6, "the photos of each class are those of its label"
    again = open_data(f"caltech101:{tmp_path}?size=8", validation=3, seed=5)
    assert torch.equal(again.test.labels, data.test.labels)
    assert again.test.files == data.test.files  # type: ignore[attr-defined]


def module_of(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """A module whose function `data` gives what `body` says."""
    name = f"datasets_{abs(hash(body))}"
    (folder / f"{name}.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n\n\ndef data():\n    " + body + "\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return f"{name}:data"


PAIRS = "TensorDataset(torch.arange(24.0).reshape(6, 1, 2, 2), torch.arange(6) % 3)"


def test_datasets_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(module_of(tmp_path, monkeypatch, f"return {PAIRS}, {PAIRS}"), validation=0)
    assert (data.name, data.classes, data.shape) == ("given", 3, (1, 2, 2))
    images, labels = data.training_batch(torch.tensor([4, 1]), 0)
    assert images.flatten(1).tolist() == [[16, 17, 18, 19], [4, 5, 6, 7]]
    assert labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    "body, message",
    [
        ("raise OSError('no disk')", "no function that gives datasets (OSError: no disk)"),
        ("return 7", "gave int; it must give two datasets"),
        ("import nothing_of_this_name", "no source of that name and no function that gives datasets (ModuleNotFound"),
        (f"return {PAIRS}, []", "labels must be integers from 0, one an image"),
        (f"return [(1, 2)], {PAIRS}", "image 0 is a int; let the transform of the dataset make tensors"),
        ("return [(torch.ones(4), 0)], [(torch.ones(4), 0)]", "image 0 has shape (4,); it must be"),
        ("return [(torch.ones(1, 2, 2), 0.5)] * 2, [(torch.ones(1, 2, 2), -1)]", "labels must be integers from 0"),
    ],
)
def test_what_is_no_dataset(body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as caught:
        open_data(module_of(tmp_path, monkeypatch, body), validation=0)
    assert message in str(caught.value)


def test_images_of_several_shapes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "return [(torch.ones(1, 2, 2 + n), n) for n in range(3)], [(torch.ones(1, 2, 2), 0)]"
    data = open_data(module_of(tmp_path, monkeypatch, body), validation=0)
    with pytest.raises(DataError, match=r"image 2 has shape \(1, 2, 4\) and image 0 \(1, 2, 2\); resize them"):
        data.plain_batch(torch.tensor([0, 2]))


@pytest.mark.parametrize("source", ["digits", "folder:x", "module:callable", "cifar10"])
def test_what_cannot_be_downloaded(source: str) -> None:
    with pytest.raises(DataError, match="only cifar10, cifar100, caltech101 can be downloaded; leave --download out"):
        fetch(source)


def test_a_download_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        torchvision.datasets.CIFAR100, "__init__", lambda self, root, train, download: asked.append((root, download))
    )
    with pytest.raises(AttributeError):  # this one has no images
        fetch(f"cifar100:{tmp_path}")
    assert asked == [(str(tmp_path), True)]


def test_a_folder_that_is_no_cifar_says_what_it_should_have(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a folder cifar-10-batches-py nor cifar10_train_00\.webp"):
        open_data(f"cifar10:{tmp_path}", validation=0)


def test_photos(photos: Path) -> None:
    data = open_data(f"folder:{photos}?size=16", validation=3)
    assert (data.name, data.classes, data.shape) == ("folder", 3, (3, 16, 16))
    assert (data.train_count, data.validation_count, data.test_count) == (9, 3, 3)
    assert open_data(f"folder:{photos}", validation=0).shape == (3, 224, 224)
    inputs, labels = data.training_batch(torch.arange(9), 0)
    assert inputs.shape == (9, 3, 16, 16)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    steps: list[Callable[[Any], Any]] = [transforms.Resize(18), transforms.CenterCrop(16), transforms.ToTensor()]
    usual = transforms.Compose([*steps, transforms.Normalize(IMAGENET.mean, IMAGENET.std)])
    (found, tested), *others = data.test_batches(10)
    assert not others
    assert tested.tolist() == [0, 1, 2]
    for image, name in zip(found, CLASSES, strict=True):
        torch.testing.assert_close(image, usual(Image.open(photos / "val" / name / "0.png").convert("RGB")))


def test_photos_are_varied_as_torchvision_does(photos: Path) -> None:
    data = open_data(f"folder:{photos}?size=16", validation=0, seed=4, normalize=PLAIN)
    assert not isinstance(data.pictures, Held)
    vary = transforms.Compose(
        [transforms.RandomResizedCrop(16), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    found, _ = data.training_batch(torch.arange(12), 6)
    mirrored = 0
    for index, file in enumerate(data.pictures.files):  # type: ignore[attr-defined]
        torch.set_rng_state(generator(4, augmentation.VARIATION, 6, index).get_state())
        expected = vary(Image.open(file).convert("RGB"))
        torch.testing.assert_close(found[index], expected)
        mirrored += not torch.allclose(found[index], expected.flip(2))
    assert mirrored == 12  # a ramp and its mirror image differ, so flips are compared


def test_modes_of_photos(photos: Path) -> None:
    Image.new("L", (20, 20), 77).save(photos / "train" / "ant" / "0.png")
    Image.new("RGBA", (20, 20), (1, 2, 3, 4)).save(photos / "train" / "ant" / "00.png")
    data = open_data(f"folder:{photos}?size=8", validation=0, normalize=PLAIN)
    inputs, _ = data.plain_batch(torch.arange(2))
    assert (inputs[0] * 255).round().eq(77).all()
    assert (inputs[1, :, 0, 0] * 255).round().tolist() == [1, 2, 3]


def test_where_there_is_a_test_folder_it_is_taken(photos: Path) -> None:
    for name in CLASSES:
        for number in range(2):
            write_photo(photos / "test" / name / f"{number}.png", 0)
    assert open_data(f"folder:{photos}", validation=0).test_count == 6


@pytest.mark.parametrize("damage", ["cut", "text", "nothing"])
@pytest.mark.parametrize("file", ["train/bee/0.png", "train/bee/1.jpg", "train/bee/2.webp", "val/bee/0.png"])
def test_a_broken_photo_is_named(photos: Path, file: str, damage: str) -> None:
    path = photos / file
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "text": b"not found", "nothing": b""}[damage])
    data = open_data(f"folder:{photos}?size=8", validation=0)

    def read() -> None:
        data.training_batch(data.order(0), 0)
        list(data.test_batches(2))

    with pytest.raises(DataError, match=rf"{file}: cannot be read as an image \(.*\); remove or replace it"):
        read()
    path.write_bytes(content)
    read()


def empty_class(folder: Path) -> None:
    (folder / "train" / "dog").mkdir()


def no_classes(folder: Path) -> None:
    for path in sorted((folder / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def no_train(folder: Path) -> None:
    (folder / "train").rename(folder / "training")


def no_test(folder: Path) -> None:
    (folder / "val").rename(folder / "validation")


def another_class(folder: Path) -> None:
    write_photo(folder / "train" / "dog" / "0.png", 0)


def renamed_class(folder: Path) -> None:
    (folder / "val" / "ant").rename(folder / "val" / "Ant")


@pytest.mark.parametrize(
    "damage,message",
    [
        (empty_class, "train: .*dog.*; remove the empty folders"),
        (no_classes, "train: Couldn't find any class"),
        (no_train, "train: is no folder"),
        (no_test, "neither a folder test nor a folder val"),
        (another_class, "only one of them has dog;"),
        (renamed_class, "only one of them has Ant, ant;"),
    ],
)
def test_faults_of_folders(photos: Path, damage: Callable[[Path], None], message: str) -> None:
    open_data(f"folder:{photos}", validation=0)
    damage(photos)
    with pytest.raises(DataError, match=message):
        open_data(f"folder:{photos}", validation=0)


@pytest.mark.parametrize("source", ["", "digits:", "cifar10", "cifar10:", "folder:", "photos:x/y", "x"])
def test_sources_that_do_not_exist(source: str) -> None:
    with pytest.raises(DataError, match="must be cifar10:DIR, cifar100:DIR, caltech101:DIR, folder:DIR, digits or"):
        open_data(source, validation=0)


@pytest.mark.parametrize("size", ["0", "-1", "x", ""])
def test_sizes_that_do_not_exist(photos: Path, size: str) -> None:
    with pytest.raises(DataError):
        open_data(f"folder:{photos}?size={size}", validation=0)


@pytest.mark.parametrize("validation", [-1, 1, 9, 1430, 1437, 10_000])
def test_splits_that_cannot_be(validation: int) -> None:
    with pytest.raises(DataError, match=f"{validation} images to validate with of 1437: .*; ask for another number"):
        open_data("digits", validation=validation)


def test_negative_seeds() -> None:
    with pytest.raises(DataError, match="seed -1"):
        open_data("digits", validation=0, seed=-1)


def linked(cifar: Path, folder: Path, *but: str) -> Path:
    """A folder with links to all files of `cifar` but those named."""
    for file in cifar.iterdir():
        if file.name not in but:
            (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize("name", ["cifar10_train_01.webp", "cifar10_test_00.webp", "labels.npz"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_truncated_file_is_named(cifar: Path, tmp_path: Path, name: str, keep: float) -> None:
    content = (cifar / name).read_bytes()
    length = int(keep * len(content)) if keep < 1 else int(keep)
    (linked(cifar, tmp_path, name) / name).write_bytes(content[:length])
    with pytest.raises(DataError, match=rf"{name}: cannot be read .*; replace it"):
        open_data(f"cifar10:{tmp_path}", validation=0)


@pytest.mark.parametrize("name", ["cifar10_test_00.webp", "labels.npz"])
def test_a_missing_file_is_named(cifar: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        open_data(f"cifar10:{linked(cifar, tmp_path, name)}", validation=0)


def test_no_sheet_is_missing_in_between(cifar: Path, tmp_path: Path) -> None:
    linked(cifar, tmp_path, "cifar10_train_00.webp")
    for source in (
        lambda: open_data(f"cifar10:{tmp_path}", validation=0),
        lambda: open_images(f"cifar10-train:{tmp_path}"),
    ):
        with pytest.raises(DataError, match=r"cifar10_train_01.webp but no cifar10_train_00.webp"):
            source()


def test_sheets_of_another_size(cifar: Path, tmp_path: Path) -> None:
    name = "cifar10_test_00.webp"
    Image.new("RGB", (320, 160)).save(linked(cifar, tmp_path, name) / name)
    with pytest.raises(DataError, match=r"has 320x160 pixels; a sheet of 5000 images has 3200x1600"):
        open_data(f"cifar10:{tmp_path}", validation=0)


@pytest.mark.parametrize(
    "train,message",
    [
        (None, "has no array y_train"),
        (np.zeros(9999), r"y_train has shape \(9999,\); 10000 labels are needed"),
        (np.zeros((10_000, 1)), r"y_train has shape \(10000, 1\)"),
        (np.full(10_000, 10), "labels from 10 to 10"),
        (np.full(10_000, -1), "labels from -1 to -1"),
        (np.array(["cat"] * 10_000), "cannot be read as arrays of labels"),
        (np.array([None] * 10_000), "cannot be read as arrays of labels"),
    ],
)
def test_labels_that_do_not_fit(cifar: Path, tmp_path: Path, train: Any, message: str) -> None:
    linked(cifar, tmp_path, "labels.npz")
    arrays = {"y_test": np.zeros(SHEET)} | ({} if train is None else {"y_train": train})
    np.savez(tmp_path / "labels.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_data(f"cifar10:{tmp_path}", validation=0)
