"""How a model wants its pictures: what its weights were trained and evaluated with."""

import inspect
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import FxpruneError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue over ImageNet's training images: what nearly all published weights are for."""
SHORT_SIDE = 256 / 224
"""The short side before the centre is cropped, relative to the crop, where nothing else is known: the usual evaluation
on ImageNet."""


class PreprocessingError(FxpruneError):
    """It is not known how a model wants its pictures, or what was said of it makes no sense."""


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to a tensor: the short side is resized, the centre cropped, each colour normalized.

    Attributes:
        height, width: of the crop, in pixels.
        short: the short side before the crop; None resizes to the crop as a whole.
        mean, std: of each colour channel, of pixels in [0, 1]; one entry is for grey pictures.
        interpolation: `"bilinear"`, `"bicubic"` or `"nearest"`.
        source: whose it is, in words.
    """

    height: int
    width: int
    short: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    source: str = ""

    def __post_init__(self) -> None:
        """See that mean and deviation fit together.

        Raises:
            PreprocessingError: they do not.
        """
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or min(self.std) <= 0:
            raise PreprocessingError(
                f"mean {self.mean} and standard deviation {self.std}: give one positive deviation for each mean, three "
                "for colour, one for grey"
            )

    def __call__(self, picture: Any) -> Tensor:
        """The tensor `(C, height, width)`, float32, of a picture of Pillow."""
        from PIL import ImageOps
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as transforms

        upright = ImageOps.exif_transpose(picture).convert("RGB" if len(self.mean) == 3 else "L")
        target = [self.height, self.width] if self.short is None else self.short
        resized = transforms.resize(upright, target, InterpolationMode(self.interpolation), antialias=True)
        pixels = transforms.pil_to_tensor(transforms.center_crop(resized, [self.height, self.width])).float() / 255
        shape = (-1, 1, 1)
        normalized: Tensor = (pixels - torch.tensor(self.mean).reshape(shape)) / torch.tensor(self.std).reshape(shape)
        return normalized

    def __str__(self) -> str:
        resized = "resized to" if self.short is None else f"short side {self.short}, centre"
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"{resized} {self.height}x{self.width}, mean {mean}, deviation {std} ({self.source})"

    def changed(
        self, *, size: tuple[int, int] | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
    ) -> "Preprocessing":
        """The same with what the user says instead."""
        if size is None and mean is None and std is None:
            return self
        asked = " and ".join(
            name for name, value in (("size", size), ("mean", mean), ("deviation", std)) if value is not None
        )
        source = f"{asked} as asked for" + ("" if mean and std else f", else {self.source}")
        result = replace(self, source=source, mean=mean or self.mean, std=std or self.std)
        if size is None:
            return result
        scale = None if self.short is None else self.short / min(self.height, self.width)
        return replace(result, height=size[0], width=size[1], short=None if scale is None else round(min(size) * scale))


def preprocessing_of(name: str, model: nn.Module, weights: Path | None, shape: tuple[int, ...]) -> Preprocessing:
    """What the weights of a model want.

    Args:
        name: of the model, see `load_model`.
        model: the model.
        weights: its file, or the name of published weights.
        shape: of a batch of inputs, `(N, C, H, W)`, where nothing else is known.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and "mean" in config:
        return _of_timm(config)
    published = None if isinstance(config, dict) else _of_torchvision(name, weights)
    if published is not None:
        return published
    channels, height, width = shape[-3:]
    short = None if height != width or height < 96 else round(height * SHORT_SIDE)
    mean, std = ((0.5,), (0.5,)) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    statistics = "statistics of ImageNet for want of others" if channels == 3 else "mean and deviation are a guess"
    named = isinstance(config, dict) and "input_size" in config
    size = f"{height}x{width} is what {name} is made for" if named else f"{height}x{width} is the usual size"
    source = f"{size}, {statistics}; --size, --mean and --std say it"
    return Preprocessing(height, width, short, mean, std, source=source)


def _of_timm(config: dict[str, Any]) -> Preprocessing:
    _, height, width = config["input_size"]
    short = math.floor(min(height, width) / config.get("crop_pct", 1 / SHORT_SIDE))
    interpolation = config.get("interpolation", "bilinear")
    return Preprocessing(
        height,
        width,
        short,
        tuple(config["mean"]),
        tuple(config["std"]),
        interpolation if interpolation in ("bilinear", "bicubic", "nearest") else "bilinear",
        source="timm's for these weights",
    )


def _of_torchvision(name: str, weights: Path | None) -> Preprocessing | None:
    """What torchvision says of published weights: of those that are named or whose file this is, else of the first."""
    import torchvision

    name = name.partition("?")[0]
    if name not in torchvision.models.list_models():
        return None
    published = list(torchvision.models.get_model_weights(name))
    asked = "" if weights is None else weights.name
    if asked == "DEFAULT":
        asked = torchvision.models.get_model_weights(name).DEFAULT.name
    found = next((entry for entry in published if asked in (entry.name, Path(entry.url).name)), None)
    chosen = found or next(iter(published), None)
    given = {} if chosen is None else getattr(chosen.transforms, "keywords", {})
    if chosen is None or "crop_size" not in given:
        return None
    usual = inspect.signature(chosen.transforms.func).parameters
    values = {key: parameter.default for key, parameter in usual.items()} | given
    crop = values["crop_size"]
    return Preprocessing(
        crop,
        crop,
        values["resize_size"],
        tuple(values["mean"]),
        tuple(values["std"]),
        values["interpolation"].value,
        source=f"torchvision's for {chosen.name}" + ("" if found else ", as the weights are not known"),
    )


def categories_of(name: str) -> tuple[str, ...]:
    """Names of the classes of torchvision's weights of a model; empty if there are none."""
    import torchvision

    if name not in torchvision.models.list_models():
        return ()
    published = next(iter(torchvision.models.get_model_weights(name)), None)
    return () if published is None else tuple(published.meta.get("categories", ()))
