"""Pictures in files, to calibrate with and to look at the result with, at any depth of folders."""

import csv
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fxprune.errors import CalibrationError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FROM_NAMES = "names"
"""What `labels` says where the names of files begin with the number of their class: `207_golden_retriever.jpg`."""


@dataclass(frozen=True)
class Gallery:
    """Pictures in files.

    Attributes:
        folder: where they are, at any depth.
        files: theirs, in order.
        labels: the class of each, from 0; None if it is not known.
        source: where the labels come from, in words.
    """

    folder: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def take(self, chosen: Sequence[int]) -> "Gallery":
        """Some of them, by number."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in chosen)
        return replace(self, files=tuple(self.files[i] for i in chosen), labels=labels)

    def drawn(self, count: int, seed: int) -> tuple["Gallery", "Gallery"]:
        """So many of them, drawn at random, and the rest, both in order."""
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        return self.take(sorted(order[:count])), self.take(sorted(order[count:]))

    def read(self, transform: Callable[[Any], Tensor], progress: bool = False) -> Tensor:
        """All of them `(N, C, H, W)`, each through `transform`, which is given what Pillow opens.

        Raises:
            CalibrationError: one cannot be decoded.
        """
        from PIL import Image

        def decode(file: Path) -> Tensor:
            try:
                with Image.open(file) as picture:
                    return transform(picture)
            except Exception as error:  # each decoder of Pillow has errors of its own
                raise CalibrationError(
                    f"{file}: cannot be read as a picture ({error}); remove or replace it"
                ) from error

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = tqdm(
                pool.map(decode, self.files),
                total=len(self),
                desc="pictures",
                disable=not progress,
                leave=False,
            )
            return torch.stack(list(decoded))


def find_pictures(folder: Path) -> Gallery:
    """The pictures in a folder, at any depth; hidden files and folders are passed over.

    Raises:
        CalibrationError: there are none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise CalibrationError(f"{folder}: has no picture in it, at any depth ({', '.join(SUFFIXES)})")
    return Gallery(folder, tuple(found))


def with_labels(gallery: Gallery, labels: str | None, classes: int, categories: Sequence[str] = ()) -> Gallery:
    """The pictures with the class of each.

    Args:
        gallery: the pictures.
        labels: `"names"` where names of files begin with the number of the class; or a file, JSON that maps names of
            pictures to classes, or lines `name,class`. None looks at the folders that the pictures are in: if these are
            numbers, or names of the classes, or as many as the model has classes, they are the classes.
        classes: how many the model tells apart.
        categories: the names of its classes, if they are known.

    Raises:
        CalibrationError: a picture has no label, or one that the model does not have.
    """
    if labels is None:
        return _labelled_by_folders(gallery, classes, categories)
    if labels == FROM_NAMES:
        found = {file: match[0] for file in gallery.files if (match := re.match(r"\d+", file.name))}
        source = "the numbers that names begin with"
    else:
        found, source = _read_labels(gallery, Path(labels)), labels
    if absent := [file for file in gallery.files if file not in found]:
        raise CalibrationError(
            f"{source}: {len(absent)} of {len(gallery)} pictures have no label, such as {absent[0].name}; add them, or "
            "leave --labels out"
        )
    numbers = [_number(found[file], classes, categories, source) for file in gallery.files]
    return replace(gallery, labels=tuple(numbers), source=source)


def _labelled_by_folders(gallery: Gallery, classes: int, categories: Sequence[str]) -> Gallery:
    """Labels by the folders right below the first, if they can be told."""
    inner = [file.relative_to(gallery.folder).parts for file in gallery.files]
    if any(len(parts) < 2 for parts in inner):
        return gallery
    names = sorted({parts[0] for parts in inner})
    known = {_plain(category): i for i, category in enumerate(categories)}
    if all(name.isdecimal() and int(name) < classes for name in names):
        number = {name: int(name) for name in names}
    elif all(_plain(name) in known for name in names):
        number = {name: known[_plain(name)] for name in names}
    elif len(names) == classes:
        number = {name: i for i, name in enumerate(names)}
    else:
        return gallery
    return replace(gallery, labels=tuple(number[parts[0]] for parts in inner), source="a folder for each class")


def _read_labels(gallery: Gallery, path: Path) -> dict[Path, str]:
    """What a file says of the pictures, by name, by path below the folder, or by name without ending."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read: {error}; give JSON, or lines name,class") from error
    try:
        parsed = json.loads(text) if path.suffix == ".json" else None
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}: is no JSON: {error}") from error
    if path.suffix == ".json":
        if not isinstance(parsed, dict):
            raise CalibrationError(f"{path}: must map names of pictures to classes")
        said = {str(name): str(label) for name, label in parsed.items()}
    else:
        rows = csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ";" if ";" in text else ",")
        said = {row[0].strip(): row[1].strip() for row in rows if len(row) > 1}
    found = {}
    for file in gallery.files:
        names = (file.relative_to(gallery.folder).as_posix(), file.name, file.stem)
        label = next((said[name] for name in names if name in said), None)
        if label is not None:
            found[file] = label
    return found


def _number(label: str, classes: int, categories: Sequence[str], source: str) -> int:
    known = {_plain(category): i for i, category in enumerate(categories)}
    number = int(label) if label.isdecimal() else known.get(_plain(label), -1)
    if not 0 <= number < classes:
        what = "names of the model's classes or " if categories else ""
        raise CalibrationError(f"{source}: {label!r} is no class; give {what}numbers from 0 to {classes - 1}")
    return number


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().lower()
