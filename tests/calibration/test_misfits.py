"""Calibration data that a model does not take: a sentence that names the shape and the way out, which is one."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.calibration.subject import Subject
from fxprune.errors import CalibrationError


class Classes(nn.Module):
    """Takes batches alone, as most do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.second(self.first(x).relu())
        return features.mean((2, 3))


class Maps(Classes):
    """Runs on an image without its batch, too."""

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.second(self.first(x).relu())
        return features


class Bytes(Classes):
    """Prepares pictures itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255)


class Sounds(Classes):
    """Takes `(N, H, W)`, and makes channels itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1).expand(-1, 3, -1, -1))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def data() -> TensorDataset:
    return TensorDataset(images(), torch.zeros(8).long())


BATCHED = r"no batch dimension in shape \(3, 10, 10\); pass DataLoader\(data, batch_size=32\), or each as x\[None\]"
LABELS = r"shape \(8,\) of int64 looks like labels; .* \(images, labels\)"
BYTES = r"it is of uint8, the model of float32; prepare them .* images\.float\(\) / 255"
GREY = r"shape \(8, 1, 10, 10\) has 1 channels, and the model takes 3; .* images\.repeat_interleave\(3, 1\)"
MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "single images": (lambda: [*images()], BATCHED),
    "single images with labels": (lambda: [(x, 1) for x in images()], BATCHED),
    "a loader of single images": (lambda: DataLoader(data(), batch_size=None), BATCHED),
    "one image": (lambda: images()[0], BATCHED),
    "labels alone": (lambda: [(torch.zeros(8).long(),)], LABELS),
    "labels first": (lambda: [(torch.zeros(8).long(), images())], LABELS),
    "bytes": (lambda: images().abs().to(torch.uint8), BYTES),
    "single bytes": (lambda: [*images().abs().to(torch.uint8)], f"{BATCHED}; {BYTES}"),
    "doubles": (lambda: images().double(), r"it is of float64, .* pass images\.to\(torch\.float32\)"),
    "grey": (lambda: images()[:, :1], GREY),
    "transparent": (lambda: images()[:, [0, 1, 2, 0]], "has 4 channels, and the model takes 3; drop the others"),
    "channels last": (lambda: images().permute(0, 2, 3, 1), r"channels last; pass images\.movedim\(-1, 1\)"),
    "arrays": (lambda: [images().numpy()], "batch 0 is a ndarray; .*; torch.from_numpy makes a tensor"),
    "a data set": (data, r"is a TensorDataset; .* DataLoader\(data, batch_size=32\)"),
    "too small": (lambda: images()[..., :2], "Calculated padded input size per channel"),
}


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize("kind", [Classes, Maps])
@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_told_with_the_way_out(name: str, kind: type[nn.Module], with_example: bool) -> None:
    given, said = MISFITS[name]
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=said):
        fxprune.compile(model, 0.5, example_inputs=images(2) if with_example else None, calibration=given())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "name, mended",
    [
        ("single images", lambda given: [x[None] for x in given]),
        ("a data set", lambda given: DataLoader(given, batch_size=4)),
        ("labels first", lambda given: [(batch[1], batch[0]) for batch in given]),
        ("bytes", lambda given: given.float() / 255),
        ("doubles", lambda given: given.to(torch.float32)),
        ("grey", lambda given: given.repeat_interleave(3, 1)),
        ("channels last", lambda given: given.movedim(-1, 1)),
        ("arrays", lambda given: [torch.from_numpy(np.asarray(x)) for x in given]),
    ],
)
def test_control_the_way_out_is_one(name: str, mended: Callable[[Any], Any]) -> None:
    for kind in (Classes, Maps):
        fxprune.compile(kind().eval(), 0.5, calibration=mended(MISFITS[name][0]()))


@pytest.mark.parametrize(
    "kind, given",
    [
        (Bytes, images().abs().to(torch.uint8)),
        (Bytes, [images()]),
        (Sounds, images()[:, 0]),
        (Maps, [images(), images(1)]),
    ],
)
def test_control_what_a_model_takes_gets_in(kind: type[nn.Module], given: Any) -> None:
    for example in (None, images(2) if kind is not Sounds else images()[:2, 0]):
        Subject(kind().eval(), example, given)


def test_a_later_batch_is_looked_at_too() -> None:
    with pytest.raises(CalibrationError, match=f"calibration batch 1 does not fit the model: .*{BATCHED}"):
        Subject(Classes().eval(), None, [images(), images()[0]])


def test_what_is_alike_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Tensor] = []

    def output_of(subject: Subject, model: nn.Module, batch: tuple[Tensor]) -> object:
        tried.append(batch[0])
        return model(batch[0])

    monkeypatch.setattr(Subject, "output_of", output_of)
    Subject(Bytes().eval(), images(2), [images(3), images(5), images(2)])
    assert tried == [], "they are like the example"
    Subject(Bytes().eval(), images(2), [images(), images().double()])
    once = [x.dtype for x in tried]
    assert once
    assert set(once) == {torch.float64}
    tried.clear()
    Subject(Bytes().eval(), images(2), [images(), images().double(), images(3).double()])
    assert [x.dtype for x in tried] == once
