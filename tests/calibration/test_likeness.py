"""Calibration data that a model takes, though it was trained on others: a warning, and a preparation that would fit."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.calibration.likeness import likeness
from fxprune.errors import UnlikeTrainingWarning
from fxprune.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def pictures(count: int = 32, seed: int = 0) -> Tensor:
    """Smooth, in 0..1, with about the mean and deviation of photos."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=16, mode="bilinear")
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (mean + 1.5 * std * smooth).clamp(0, 1)


def normalized(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def trained(prepare: Callable[[Tensor], Tensor], norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A network whose statistics are of pictures, prepared so."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), norm(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()
    ).train()
    for _ in range(40):
        model(prepare(pictures(64, seed=1)))
    return model.eval()


def said(model: nn.Module, images: Tensor) -> list[str]:
    """What is warned of when a plan is made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnlikeTrainingWarning)
        fxprune.make_plan(model, calibration=images)
    return [str(each.message) for each in caught if each.category is UnlikeTrainingWarning]


@pytest.mark.parametrize(
    "wrong, way_out",
    [
        (lambda x: x, r"\(images - mean\) / std with mean \(0.485"),
        (lambda x: 255 * x, r"\(images / 255 - mean\) / std with mean"),
        (lambda x: normalized(normalized(x)), r"images \* std \+ mean, undoing mean \(0.485"),
        (lambda x: torch.zeros_like(x), "prepare them as for evaluation"),
    ],
)
def test_images_prepared_otherwise_are_told(wrong: Callable[[Tensor], Tensor], way_out: str) -> None:
    model = trained(normalized)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UnlikeTrainingWarning, match=rf"not look like what the network was trained on; {way_out}"):
        fxprune.make_plan(model, calibration=wrong(pictures()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_way_out_is_one() -> None:
    """What the warning says to do is done: it is silent."""
    model, images = trained(lambda x: 2 * x - 1), 255 * pictures()
    (text,) = said(model, images)
    assert "2 * images / 255 - 1 would" in text
    assert "What reaches 1, its first BatchNorm" in text
    assert not said(model, 2 * images / 255 - 1)


@pytest.mark.parametrize("count", [1, 32])
def test_images_prepared_rightly_are_not_told(count: int) -> None:
    assert not said(trained(normalized), normalized(pictures(count)))


def test_other_colours_are_no_other_preparation() -> None:
    assert not said(trained(normalized), normalized(pictures()).flip(1))


def test_nothing_is_said_where_nothing_remembers() -> None:
    """Statistics that never saw data, of single samples, or none."""
    fresh = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3)).eval()
    none = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3)).eval()
    single = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, track_running_stats=True), nn.ReLU(), nn.Conv2d(16, 32, 3)
    )
    single(pictures())
    for model in (fresh, none, single.eval()):
        assert not said(model, 255 * pictures())


def test_frozen_statistics_remember_too() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model = trained(normalized)
    frozen = FrozenBatchNorm2d(16)
    assert isinstance(model, nn.Sequential)
    frozen.load_state_dict(model[1].state_dict())
    model[1] = frozen
    assert said(model, pictures())
    assert not said(model, normalized(pictures()))


def test_too_few_values_tell_nothing() -> None:
    """The variance of a handful of numbers is not known."""
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).train()
    model(100 * torch.randn(64, 8))
    model.eval()
    assert likeness(model, (torch.randn(8, 8),), lambda m, batch: m(*batch)) is None
    found = likeness(model, (torch.randn(64, 8),), lambda m, batch: m(*batch))
    assert found is not None
    assert found.variance < 0.01


def test_a_batch_of_several_arguments_gets_no_advice_for_images() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = trained(normalized)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            features: Tensor = self.body(x + y)
            return features

    with pytest.warns(UnlikeTrainingWarning, match=r"trained on; prepare them as for evaluation. What reaches body.1,"):
        fxprune.make_plan(Both().eval(), calibration=[(255 * pictures(), torch.zeros(32, 3, 16, 16))])
