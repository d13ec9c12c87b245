"""Several ways to spend a budget, the judge between them, and the number of groups where nobody says it."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import PlanError
from fxprune.calibration.agreement import Agreement
from fxprune.calibration.damage import loss_of
from fxprune.calibration.judging import best
from fxprune.exact.record import record_of
from fxprune.planning import kernels
from fxprune.planning.candidates import between, candidates, uniform
from fxprune.planning.sensitivity import TOLERANCE, LayerSensitivity, Sensitivity
from fxprune.plans.shapes import accurate_groups


class Net(nn.Module):
    """Four convolutions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
    with torch.no_grad():  # one layer reads four channels, and every class is some image's
        model.second.weight[:, 4:] *= 0.01
        model.head.weight.mul_(30)
        model.head.bias.sub_(model(images(256)).mean(0))
    return model


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def table_of(**layers: tuple[int, list[float]]) -> Sensitivity:
    """Cost and damage of each layer; nothing else costs anything."""
    found = tuple(LayerSensitivity(name, 2, cost, cost, tuple(damage)) for name, (cost, damage) in layers.items())
    total = sum(layer.macs for layer in found)
    return Sensitivity(found, total, total)


def remaining(table: Sensitivity, ratios: Mapping[str, float]) -> float:
    return sum(layer.macs * (1 - ratios[layer.name]) for layer in table.layers) / table.macs


def falling(channels: int, scale: float) -> list[float]:
    return [scale * (1 - k / channels) ** 2 for k in range(1, channels + 1)]


UNEVEN = table_of(
    weak=(64_000, falling(256, 0.1)), strong=(32_000, falling(128, 0.9)), wide=(16_000, falling(128, 0.3))
)


# --- the candidates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.9, 0.57, 0.3])
def test_all_candidates_meet_the_budget_and_one_is_uniform(share: float) -> None:
    found = candidates(UNEVEN, {"macs": share}, 1)
    assert list(found) == ["sensitivity", "between", "uniform"]
    for ratios in found.values():
        assert remaining(UNEVEN, ratios) == pytest.approx(share, rel=TOLERANCE)
    assert found["sensitivity"] == UNEVEN.ratios(share)
    even = found["uniform"]
    assert all(abs(ratio - (1 - share)) <= 4 / 128 for ratio in even.values())
    spread = {name: max(ratios.values()) - min(ratios.values()) for name, ratios in found.items()}
    assert spread["uniform"] < spread["between"] < spread["sensitivity"]


def test_candidates_that_are_alike_are_one() -> None:
    assert list(candidates(table_of(only=(640, falling(64, 0.1))), {"macs": 0.5}, 1)) == ["sensitivity"]
    with pytest.raises(PlanError, match="cannot be met"):
        candidates(UNEVEN, {"macs": 0.001}, 1)


def test_the_one_between_has_the_geometric_mean_of_the_losses() -> None:
    even = uniform(UNEVEN, {layer.name: layer.macs for layer in UNEVEN.layers})
    mean = between(UNEVEN, even)
    for a, b, c in zip(UNEVEN.layers, even.layers, mean.layers, strict=True):
        for x, y, z in zip(a.damage, b.damage, c.damage, strict=True):
            assert loss_of(z) == pytest.approx((loss_of(x) * loss_of(y)) ** 0.5, rel=1e-6, abs=1e-9)


def test_a_layer_that_is_lost_whole_is_still_a_legal_table() -> None:
    lost = table_of(a=(6400, falling(64, 1.5)), b=(6400, falling(64, 1.2)), c=(6400, falling(64, 0.1)))
    assert candidates(lost, {"macs": 0.5}, 1).keys() >= {"sensitivity", "uniform"}


# --- the judge ------------------------------------------------------------------------------------------------------


def told(distance: float) -> Agreement:
    return Agreement(0.5, 16, True, True, distance)


def test_the_nearest_is_the_best_and_the_first_of_equals() -> None:
    assert best({"a": told(0.3), "b": told(0.1), "c": None}) == "b"
    assert best({"a": told(0.2), "b": told(0.2)}) == "a"
    assert best({"a": None, "b": None}) == "a"


def misled(table: Sensitivity) -> Sensitivity:
    """The table that went wrong: what reads four channels looks as if it needed all, and nothing else does."""

    def wrong(layer: LayerSensitivity) -> LayerSensitivity:
        return dataclasses.replace(layer, damage=tuple(falling(16, 0.99 if layer.name == "second" else 1e-6)))

    return dataclasses.replace(table, layers=tuple(map(wrong, table.layers)))


def error_of(pruned: nn.Module, model: nn.Module) -> float:
    """On images that nobody has seen."""
    data = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dense, ours = model(data), pruned(data)
    return float((dense.softmax(1) - ours.softmax(1)).abs().sum(1).mean() / 2)


def test_a_misleading_sensitivity_is_not_trusted(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"macs": 0.55, "calibration": images(), "example_inputs": images(2)}
    table = fxprune.measure_sensitivity(net, calibration=images())
    wrong = misled(table)
    even = candidates(wrong, {"macs": 0.55}, 1)["uniform"]
    same: dict[str, Any] = {"calibration": images(), "form": "overlap", "groups": 8}
    plain = error_of(fxprune.compile(net, even, **same), net)
    judged = error_of(fxprune.compile(net, sensitivity=wrong, **options), net)
    assert judged <= 1.1 * plain  # the judge has seen a dozen images
    # Would it be seen? Trusted, the wrong table is worse than the same ratio everywhere.
    monkeypatch.setattr(kernels, "best", lambda found: "sensitivity")
    assert error_of(fxprune.compile(net, sensitivity=wrong, **options), net) > 1.2 * plain


def test_equal_arguments_give_equal_plans(net: Net) -> None:
    plans = [fxprune.make_plan(net, macs=0.6, calibration=images()) for _ in range(2)]
    assert plans[0] == plans[1]
    assert record_of(fxprune.compile(net, macs=0.6, calibration=images())).plan == plans[0]


def test_what_was_chosen_is_refitted_on_all_images(net: Net) -> None:
    plan = fxprune.make_plan(net, macs=0.6, calibration=images())
    masked = fxprune.mask(net, plan, images())
    x = images(3)
    pruned = fxprune.compile(net, macs=0.6, calibration=images())
    assert torch.allclose(pruned(x), masked.eval()(x), rtol=1e-4, atol=1e-5)
    fewer = fxprune.mask(net, plan, images()[:40])
    assert not torch.allclose(pruned(x), fewer.eval()(x), rtol=1e-4, atol=1e-5)


# --- the number of groups -------------------------------------------------------------------------------------------


def groups_of(plan: fxprune.PrunePlan) -> set[int]:
    return {layer.groups for layer in plan.layers.values()}


def test_a_budget_with_data_and_no_target_is_spent_for_accuracy(net: Net) -> None:
    budget: dict[str, Any] = {"macs": 0.6}
    assert groups_of(fxprune.make_plan(net, **budget, calibration=images(16))) == {8}
    table = fxprune.measure_sensitivity(net, calibration=images(16))
    assert {layer.groups for layer in table.layers} == {8}
    others: tuple[dict[str, Any], ...] = (
        {"example_inputs": images(2)},  # nothing is refitted
        {"calibration": images(16), "target": "cpu"},
        {"calibration": images(16), "groups": 2},
    )
    for options in others:
        assert groups_of(fxprune.make_plan(net, **budget, **options)) == {2}
    # A ratio is not a budget.
    assert groups_of(fxprune.make_plan(net, 0.5, calibration=images(16))) == {2}


@pytest.mark.parametrize("filters, groups", [(64, 8), (16, 8), (8, 4), (12, 4), (6, 2), (2, "auto"), (7, "auto")])
def test_groups_that_serve_accuracy(filters: int, groups: int | str) -> None:
    assert accurate_groups(filters) == groups
