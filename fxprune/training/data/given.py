"""Datasets of one's own, by the name of a function: whatever `torch.utils.data.Dataset` can be."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.models.by_name import ModelNameError, call_by_name
from fxprune.training.data.pictures import DataError, Normalization

AS_THEY_ARE = Normalization((0.0,), (1.0,))
"""Of datasets that normalize by themselves."""


@dataclass(frozen=True)
class Given:
    """A dataset of pairs of image and label, whose own transform makes tensors of one shape of images, and varies them.

    Attributes:
        dataset: of a length, and a pair for each index.
        name: of the function that gave it.
        labels: int64 `(N,)`.
        classes: how many there are.
        shape: of an image.
    """

    dataset: Any
    name: str
    labels: Tensor
    classes: int
    shape: tuple[int, int, int]

    def read(self, chosen: Tensor) -> Tensor:
        """Images of these indices, float32 `(B, C, H, W)`.

        Raises:
            DataError: an image has another shape than the first, or is no tensor.
        """
        images = [_image(self.name, self.dataset, index) for index in chosen.tolist()]
        for index, image in zip(chosen.tolist(), images, strict=True):
            if tuple(image.shape) != self.shape:
                raise DataError(
                    f"{self.name}: image {index} has shape {tuple(image.shape)} and image 0 {self.shape}; resize them "
                    "in the transform of the dataset"
                )
        return torch.stack(images)

    def read_varied(self, chosen: Tensor, seed: int, epoch: int) -> Tensor:
        """The same: how they vary is the dataset's own business."""
        return self.read(chosen)


def open_given(source: str) -> tuple[Given, Given]:
    """Call `MODULE:CALLABLE`, found on the path or in the working directory, for datasets to train and to test with.

    Raises:
        DataError: there is no such function, it raises, or what it gives is no pair of datasets with labels.
    """
    try:
        made = call_by_name(source)
    except ModelNameError as error:
        said = error.__cause__ or error
        raise DataError(
            f"{source}: is no source of that name and no function that gives datasets ({type(said).__name__}: {said})"
        ) from error
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise DataError(f"{source}: gave {type(made).__name__}; it must give two datasets, to train and to test with")
    training, test = (_labels(source, dataset) for dataset in made)
    classes = int(max(training.max(), test.max())) + 1
    shape = tuple(_image(source, made[0], 0).shape)
    if len(shape) != 3:
        raise DataError(f"{source}: image 0 has shape {shape}; it must be (channels, height, width)")
    first, second = (
        Given(dataset, source, labels, classes, shape) for dataset, labels in zip(made, (training, test), strict=True)
    )
    return first, second


def _labels(source: str, dataset: Any) -> Tensor:
    """Labels of all images: `dataset.targets` where there are some, else one by one."""
    try:
        found = getattr(dataset, "targets", None)
        labels = torch.as_tensor(found if found is not None else [int(dataset[i][1]) for i in range(len(dataset))])
    except Exception as error:
        raise DataError(
            f"{source}: its datasets must have a length and give pairs of image and label ({type(error).__name__}: "
            f"{error})"
        ) from error
    if len(labels) == 0 or labels.dim() != 1 or labels.is_floating_point() or int(labels.min()) < 0:
        raise DataError(f"{source}: labels must be integers from 0, one an image; there are {tuple(labels.shape)}")
    return labels.long()


def _image(source: str, dataset: Any, index: int) -> Tensor:
    image = dataset[index][0]
    if not isinstance(image, Tensor):
        raise DataError(
            f"{source}: image {index} is a {type(image).__name__}; let the transform of the dataset make tensors, as "
            "torchvision.transforms.ToTensor does"
        )
    return image.float()
