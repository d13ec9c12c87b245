"""Warnings name the line of whoever called fxprune."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import warn_user

IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    ).eval()


def rewritten_with_an_empty_plan() -> object:
    return fxprune.rewrite(net(), fxprune.PrunePlan({}), IMAGES[:2])


@pytest.mark.parametrize(
    "call",
    [
        lambda: fxprune.compile(net(), 0.5, calibration=IMAGES),
        lambda: fxprune.compile(net(), 0.5, calibration=IMAGES, recover={"steps": 1}),
        lambda: fxprune.compile(net(), macs=0.6, granularity="filter", calibration=IMAGES),
        lambda: fxprune.mask(net(), fxprune.make_plan(net(), 0.5, example_inputs=IMAGES[:2]), IMAGES),
        lambda: fxprune.make_plan(net(), 0.5, example_inputs=IMAGES[:2], ignore=nn.ReLU),
        rewritten_with_an_empty_plan,
    ],
    ids=["compile", "recover", "filters", "mask", "ignore", "rewrite"],
)
def test_the_line_is_that_of_the_caller(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.calibration.agreement.GOOD", 1.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [warning for warning in caught if "torch.jit" not in str(warning.message)]
    assert ours
    assert {Path(warning.filename).name for warning in ours} == {Path(__file__).name}


def test_code_of_the_package_is_passed_over_and_no_other() -> None:
    with pytest.warns(UserWarning, match="seen") as caught:
        warn_user("seen", UserWarning)
    assert Path(caught[0].filename).name == Path(__file__).name
    with pytest.warns(UserWarning, match="seen") as caught:
        exec(
            compile("warn_user('seen', UserWarning)", "inside.py", "exec"),
            {"__name__": "fxprune.x", "warn_user": warn_user},
        )
    assert Path(caught[0].filename).name == Path(__file__).name
