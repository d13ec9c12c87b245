"""Filters chosen for the error, budgets spread by it, and the judge between ways to spread them."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import PlanError
from fxprune.calibration.subject import Subject
from fxprune.planning import candidates, filters
from fxprune.planning.filters import FilterPlanner, removable_of
from fxprune.planning.requests import Request
from fxprune.planning.selection import choose_units
from fxprune.planning.sensitivity import Cost
from fxprune.planning.unit_sensitivity import UnitSensitivity, measure_readers, measure_units
from fxprune.plans import PrunePlan
from fxprune.vocabulary import CriterionChoice


class Net(nn.Module):
    """A residual block with a wide branch, and a layer whose channels hardly matter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 16, 3, padding=1)
        self.idle = nn.Conv2d(16, 24, 3, padding=1)
        self.last = nn.Conv2d(24, 12, 1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(self.last(self.idle(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
    with torch.no_grad():  # most of `idle` does next to nothing, and every class is some image's
        model.last.weight[:, 6:] *= 0.01
        model.head.weight.mul_(30)
        model.head.bias.sub_(model(images(256)).mean(0))
    return model


def images(count: int = 96) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def request(**asked: Any) -> Request:
    return Request(granularity="filter", **{"round_to": 1, **asked})


def removed_from(plan: PrunePlan, name: str) -> int:
    return len(plan.removed[name].outputs) if name in plan.removed else 0


def macs_left(model: nn.Module, plan: PrunePlan) -> float:
    report = fxprune.report(fxprune.rewrite(fxprune.mask(model, plan), plan, images(2)))
    assert report.macs_pruned is not None
    assert report.macs_dense is not None
    return report.macs_pruned / report.macs_dense


def measured(net: Net) -> tuple[UnitSensitivity, Any]:
    subject = Subject(net, None, images())
    units = removable_of(subject).units
    return measure_units(measure_readers(subject, units), units, np.zeros(units.count, dtype=np.bool_)), units


# --- scores ---------------------------------------------------------------------------------------------------------


def test_spaces_and_what_their_units_cost(net: Net) -> None:
    found, units = measured(net)
    assert [space.name for space in found.table.layers] == list(units.names) == ["stem", "inner", "idle", "last"]
    assert [len(space.damage) for space in found.table.layers] == [16, 32, 24, 12]
    every = np.ones(units.count, dtype=np.bool_)
    for cost in ("macs", "params"):
        saved = units.costs_of_one(cost)
        for unit in (0, 20, 60, units.count - 1):
            without = every.copy()
            without[unit] = False
            assert saved[unit] == pytest.approx(getattr(units, cost)(every) - getattr(units, cost)(without))


def test_scores_rise_in_the_order_of_elimination(net: Net) -> None:
    found, units = measured(net)
    costs: tuple[Cost | None, ...] = ("macs", "params", None)
    for cost in costs:
        scores = found.scores(found.table, None if cost is None else found.prices(cost))
        assert (scores > 0).all()
        for space in range(len(units.names)):
            mine = found.order[units.space[found.order] == space]
            assert (np.diff(scores[mine]) > 0).all()


def test_a_unit_is_worth_the_loss_for_each_unit_of_cost(net: Net) -> None:
    found, units = measured(net)
    plain = found.scores(found.table, None)
    by_macs = found.scores(found.table, found.prices("macs"))
    for space, layer in enumerate(found.table.layers):
        mine = units.space == space
        np.testing.assert_allclose(by_macs[mine] * layer.macs / mine.sum(), plain[mine], rtol=1e-3, atol=1e-7)


def test_an_idle_layer_is_emptied_first(net: Net) -> None:
    plan = fxprune.make_plan(net, macs=0.7, granularity="filter", scope="global", round_to=1, calibration=images())
    assert removed_from(plan, "idle") >= 15
    assert removed_from(plan, "stem") < 5
    control = fxprune.make_plan(
        net, macs=0.7, granularity="filter", scope="global", round_to=1, calibration=images(), criterion="l2"
    )
    assert removed_from(control, "idle") < 12


def test_comparable_scores_are_ranked_as_they_are(net: Net) -> None:
    _, units = measured(net)
    scores = np.where(units.space == 1, 1.0, 100.0) + np.arange(units.count) / 1e6
    asked = request(ratio=0.2, scope="global")
    assert set(units.space[choose_units(units, scores, asked, comparable=True)]) == {1}
    assert set(units.space[choose_units(units, scores, asked)]) != {1}


# --- which criterion ------------------------------------------------------------------------------------------------


def test_the_error_is_what_counts_with_data_and_nothing_said(net: Net) -> None:
    def criterion(**asked: Any) -> str:
        return fxprune.make_plan(net, 0.25, granularity="filter", example_inputs=images(2), **asked).criterion

    assert criterion(calibration=images()) == criterion(calibration=images(), criterion="reconstruction")
    assert criterion(calibration=images()) == "reconstruction"
    assert criterion() == "l2"
    assert criterion(calibration=images(), criterion="l1") == "l1"
    assert criterion(calibration=images(), variety="soft") == "l2, variety soft"
    assert criterion(calibration=images(), criterion="reconstruction", variety="soft").startswith("reconstruction, va")


def test_the_error_needs_data(net: Net) -> None:
    with pytest.raises(PlanError, match="'reconstruction' measures the error on data; pass calibration="):
        fxprune.make_plan(net, 0.25, granularity="filter", criterion="reconstruction", example_inputs=images(2))


def test_both_granularities_are_chosen_for_the_error(net: Net) -> None:
    plan = fxprune.make_plan(
        net, granularity={"filter": 0.25, "kernel": 0.25}, criterion="reconstruction", calibration=images()
    )
    assert plan.method == "filter, local; reconstruction"


def test_the_error_is_smaller_than_with_norms(net: Net) -> None:
    def error(criterion: CriterionChoice) -> float:
        plan = fxprune.make_plan(net, 0.5, granularity="filter", criterion=criterion, calibration=images())
        masked = fxprune.mask(net, plan, images())
        with torch.no_grad():
            return float((masked(images(400)[96:]) - net(images(400)[96:])).square().mean())

    assert error("reconstruction") < 0.9 * error("l2")


# --- ways to spread a budget, and the judge -------------------------------------------------------------------------


def test_a_budget_with_data_is_planned_in_three_ways(net: Net) -> None:
    plans = FilterPlanner(Subject(net, None, images())).plans(request(macs=0.6))
    assert list(plans) == ["global", "between", "local"]
    for way, plan in plans.items():
        assert plan.method == f"filter, {way}"
        assert macs_left(net, plan) == pytest.approx(0.6, rel=0.01)
    shares = [removed_from(plans["local"], name) / width for name, width in (("stem", 16), ("inner", 32), ("idle", 24))]
    assert max(shares) - min(shares) <= 2 / 16  # whole units, and those that make the budget fit
    idle = [removed_from(plan, "idle") for plan in plans.values()]
    assert idle[0] > idle[1] > idle[2]


@pytest.mark.parametrize(
    "asked, data, ways",
    [
        ({"macs": 0.6, "scope": "global"}, True, ["global"]),
        ({"macs": 0.6, "scope": "local"}, True, ["local"]),
        ({"macs": 0.6}, False, ["local"]),
        ({"ratio": 0.3}, True, ["local"]),
        ({"params": 0.6, "criterion": "l1"}, True, ["global", "local"]),
        ({"macs": 1.0}, True, ["global"]),
    ],
    ids=str,
)
def test_where_nothing_is_open_there_is_one_way(net: Net, asked: dict[str, Any], data: bool, ways: list[str]) -> None:
    subject = Subject(net, images(2), images() if data else None)
    assert list(FilterPlanner(subject).plans(request(**asked))) == ways


def test_misleading_scores_are_not_trusted(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says that the stream may go and the idle layer must stay loses against the same share everywhere."""

    def misled(*given: Any) -> UnitSensitivity:
        found = measure_units(*given)
        worth = {"stem": 0.0, "inner": 1e-3, "idle": 0.99, "last": 0.99}
        layers = tuple(
            replace(
                space,
                damage=tuple(worth[space.name] * (1 - k / len(space.damage)) for k in range(1, 1 + len(space.damage))),
            )
            for space in found.table.layers
        )
        return replace(found, table=replace(found.table, layers=layers))

    monkeypatch.setattr(filters, "measure_units", misled)
    asked = request(macs=0.5)
    plan = filters.plan_filters(Subject(net, None, images()), asked)
    assert plan.method == "filter, local"
    monkeypatch.setattr(candidates, "best", lambda found: next(iter(found)))  # control: the scores alone
    assert filters.plan_filters(Subject(net, None, images()), asked).method == "filter, global"


def test_equal_arguments_give_equal_plans(net: Net) -> None:
    first, second = (fxprune.make_plan(net, macs=0.5, granularity="filter", calibration=images()) for _ in range(2))
    assert first == second


def test_what_was_removed_before_stays_so(net: Net) -> None:
    first = fxprune.make_plan(net, 0.25, granularity="filter", calibration=images())
    subject = Subject(net, None, images())
    second = filters.plan_filters(subject, request(macs=0.4, after=first))
    assert second.method.startswith("filter, ")
    for name, channels in first.removed.items():
        assert set(channels.outputs) <= set(second.removed[name].outputs)


def test_a_budget_out_of_reach_says_how_near_one_comes(net: Net) -> None:
    with pytest.raises(PlanError, match=r"macs=0\.0001 cannot be reached by removing filters: .* remains"):
        fxprune.make_plan(net, macs=0.0001, granularity="filter", calibration=images())


def test_compile_is_exact_and_tells_the_agreement(net: Net) -> None:
    small = fxprune.compile(net, macs=0.7, granularity="filter", calibration=images())
    report = fxprune.report(small)
    assert report.agreement is not None
    assert report.agreement.held_out
    for output in ("graph", "module"):
        plan = fxprune.compile(net, macs=0.7, granularity="filter", calibration=images(), output=output)
        torch.testing.assert_close(plan(images(4)), small(images(4)))
