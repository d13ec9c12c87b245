"""Several budgets at once: each is kept, the loss is the least, and what cannot be reached is said."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clock_harness import image, net, wind
from torch import Tensor, nn

import fxprune
from fxprune import LatencyTable, PlanError
from fxprune.calibration.damage import loss_of
from fxprune.planning.knapsack import Way, least_damage
from fxprune.planning.latency.budget import damages
from fxprune.planning.latency.table import Limit
from fxprune.planning.sensitivity import Cost, LayerSensitivity, Sensitivity
from fxprune.planning.several_budgets import ratios_within
from fxprune.vocabulary import Granularity


def layer(name: str, channels: int, macs: int, params: int, steepness: float) -> LayerSensitivity:
    damage = tuple(steepness * (1 - k / channels) ** 2 for k in range(1, channels + 1))
    return LayerSensitivity(name, 2, macs, params, damage)


EARLY, LATE = layer("early", 8, 6000, 100, 0.3), layer("late", 8, 1000, 3000, 0.2)
"""One costs multiply-accumulates, the other parameters."""
TABLE = Sensitivity((EARLY, LATE, layer("middle", 8, 2000, 800, 0.9)), macs=10_000, params=4_000)


def left(ratios: Mapping[str, float], cost: Cost, table: Sensitivity = TABLE) -> float:
    total = getattr(table, cost)
    return 1 - sum(getattr(layer, cost) * ratios[layer.name] for layer in table.layers) / total


def loss(ratios: Mapping[str, float]) -> float:
    return sum(loss_of(layer.damage[round(8 * (1 - ratios[layer.name])) - 1]) for layer in TABLE.layers)


def brute_force(budgets: Mapping[Cost, float]) -> float:
    """The least loss of all ratios that keep the budgets."""
    names = [layer.name for layer in TABLE.layers]
    found = [
        loss(ratios)
        for kept in itertools.product(range(1, 9), repeat=3)
        if all(
            left(ratios := {name: 1 - k / 8 for name, k in zip(names, kept, strict=True)}, cost) <= share + 1e-9
            for cost, share in budgets.items()
        )
    ]
    return min(found)


@pytest.mark.parametrize("macs", [0.9, 0.6, 0.4, 0.25])
@pytest.mark.parametrize("params", [0.8, 0.5, 0.3])
def test_both_are_kept_at_the_least_loss(macs: float, params: float) -> None:
    budgets: dict[Cost, float] = {"macs": macs, "params": params}
    ratios = ratios_within(TABLE, budgets, 1)
    assert all(left(ratios, cost) <= share + 1e-9 for cost, share in budgets.items())
    assert loss(ratios) == pytest.approx(brute_force(budgets), rel=0.01)


def test_control_one_of_them_alone_misses_the_other() -> None:
    assert left(ratios_within(TABLE, {"macs": 0.6}, 1), "params") > 0.5
    assert left(ratios_within(TABLE, {"params": 0.5}, 1), "macs") > 0.6


def test_one_budget_is_spent_as_ever() -> None:
    assert ratios_within(TABLE, {"macs": 0.6}, 1) == TABLE.ratios(0.6, "macs", 1)
    assert ratios_within(TABLE, {"params": 0.5}, 1) == TABLE.ratios(0.5, "params", 1)


def test_blocks_are_kept_whole() -> None:
    for ratio in ratios_within(TABLE, {"macs": 0.5, "params": 0.5}, 2).values():
        assert ratio * 8 % 2 == 0


def test_what_cannot_be_reached_says_how_near_one_comes() -> None:
    with pytest.raises(
        PlanError,
        match=r"macs=0\.05, params=0\.9 cannot be met together .* the 3 convolutions .*; at least 0\.2125 of the macs "
        r"and 0\.1469 of the params must remain",
    ):
        ratios_within(TABLE, {"macs": 0.05, "params": 0.9}, 1)
    assert left(ratios_within(TABLE, {"macs": 0.2126, "params": 0.9}, 1), "macs") <= 0.2126  # it is in reach


def test_the_program_takes_one_way_of_each_layer_within_all_limits() -> None:
    ways = [
        Way("a", "dense", 0.0, (4.0, 1.0)),
        Way("a", "small", 5.0, (1.0, 1.0)),
        Way("b", "dense", 0.0, (1.0, 4.0)),
        Way("b", "small", 1.0, (1.0, 1.0)),
    ]
    assert least_damage(ways, (5.0, 5.0)) == {"a": "dense", "b": "dense"}
    assert least_damage(ways, (5.0, 4.9)) == {"a": "dense", "b": "small"}
    assert least_damage(ways, (4.9, 4.9)) == {"a": "small", "b": "small"}
    assert isinstance(least_damage(ways, (1.9, 9.0)), str)


# --- whole compilations -----------------------------------------------------------------------------------------------


class Uneven(nn.Module):
    """A wide picture with few channels, then a small one with many: MACs in front, parameters at the back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.front = nn.Conv2d(32, 32, 1)
        self.down = nn.Conv2d(32, 32, 3, stride=4, padding=1)
        self.back = nn.Conv2d(32, 96, 1)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.front(self.stem(x).relu()).relu()).relu()
        return self.head(self.back(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def uneven() -> Uneven:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Uneven().eval()


def shares(small: nn.Module) -> dict[str, float]:
    report = fxprune.report(small)
    assert report.macs_pruned is not None
    assert report.macs_dense is not None
    return {"macs": report.macs_pruned / report.macs_dense, "params": report.params_pruned / report.params_dense}


FRONT, BACK = {"macs": 0.5, "params": 0.8}, {"macs": 0.7, "params": 0.5}


@pytest.mark.parametrize(
    "granularity, budgets",
    [("kernel", FRONT), ("kernel", BACK), ("filter", FRONT), ("filter", BACK), ("auto", BACK)],
    ids=str,
)
def test_all_budgets_are_kept_and_one_is_used_up(uneven: Uneven, granularity: Any, budgets: dict[str, float]) -> None:
    data = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {} if granularity == "filter" else {"method": "cocluster"}  # which takes less time
    options |= budgets
    found = shares(fxprune.compile(uneven, granularity=granularity, calibration=data, **options))
    relative = {name: found[name] / share for name, share in budgets.items()}
    assert max(relative.values()) == pytest.approx(1, abs=0.04)
    assert max(relative.values()) <= 1.01 + 1e-9


def test_without_data_too(uneven: Uneven) -> None:
    both: tuple[Granularity, ...] = ("kernel", "filter")
    for granularity in both:
        found = shares(fxprune.compile(uneven, granularity=granularity, macs=0.6, params=0.6, example_inputs=image()))
        assert max(found.values()) <= 0.6 * 1.01
    with pytest.raises(PlanError, match=r"params=0\.0001 cannot be reached by removing filters"):
        fxprune.make_plan(uneven, granularity="filter", macs=0.9, params=0.0001, example_inputs=image())


# --- with a latency ---------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LatencyTable:
    wind(monkeypatch, tmp_path / "cache")
    return fxprune.measure_latency(net(), example_inputs=image(), target="cpu", groups=2)


def test_time_and_parameters_of_kernels_are_kept_together(table: LatencyTable) -> None:
    options: dict[str, Any] = {"target": "cpu", "example_inputs": image(), "latency_table": table, "groups": 2}
    alone = fxprune.compile(net(), latency=0.7, **options)
    both = fxprune.compile(net(), latency=0.7, params=0.5, **options)
    assert shares(alone)["params"] > 0.5  # control
    assert shares(both)["params"] <= 0.5
    for fast in (alone, both):
        assert fxprune.acceleration_report(fast).relative <= 0.7 * 1.05
    dense_time = fxprune.compile(net(), latency=1.0, params=0.5, **options)  # the time alone would ask for nothing
    assert shares(dense_time)["params"] <= 0.5


def test_limits_are_counted_in_kernels(table: LatencyTable) -> None:
    model = net()
    sensitivity = fxprune.measure_sensitivity(model, groups=2)
    damage = damages(model, table, sensitivity)
    dense = {layer.name: layer.params / sensitivity.params for layer in sensitivity.layers}
    for share in (0.8, 0.5, 0.3):
        limit = Limit("params", share, dense)
        choice = table.choose(0.9, damage, [limit])
        assert limit.of(table, choice) <= share + 1e-9
        assert table.predicted(choice) <= 0.9 + 1e-9
        assert limit.of(table, choice) > share - 0.1
    assert np.isclose(Limit("params", 0.5, dense).of(table, {}), 1.0)
    with pytest.raises(
        PlanError,
        match=r"latency=0\.9, params=0\.01 cannot be met together by kernels .* the least that each alone can reach is "
        r"latency 0\.\d+, params 0\.\d+",
    ):
        table.choose(0.9, damage, [Limit("params", 0.01, dense)])
