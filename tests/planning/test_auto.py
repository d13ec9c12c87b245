"""One budget over filters and kernels: what is tried, what is taken, what is told, and what is refused."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from products_harness import fewer
from torch import Tensor, nn

import fxprune
from fxprune import PlanError
from fxprune.calibration.agreement import Agreement
from fxprune.calibration.judging import best
from fxprune.exact.record import record_of
from fxprune.planning import auto
from fxprune.planning.requests import Request
from fxprune.plans import PrunePlan

NAMES = ["kernels alone", "filters alone", *auto.SPLITS, "branches alone", auto.PROGRAM, auto.WITHOUT_BRANCHES]


class Net(nn.Module):
    """A residual block between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.inner = nn.Conv2d(32, 48, 1)
        self.outer = nn.Conv2d(48, 32, 1)
        self.last = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(self.last(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
    with torch.no_grad():  # every class is some image's
        model.head.weight.mul_(30)
        model.head.bias.sub_(model(images(256)).mean(0))
    return model


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def made(net: nn.Module, **asked: Any) -> PrunePlan:
    return fxprune.make_plan(net, granularity="auto", calibration=images(), **({"macs": 0.5} | asked))


class Judgement:
    """Takes the division of a name, and remembers what it was asked."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.agreements: dict[str, Agreement | None] = {}

    def __call__(self, found: Mapping[str, Agreement | None]) -> str:
        if "kernels alone" not in found:
            return best(found)
        self.agreements = dict(found)
        return self.name or best(found)


def take(monkeypatch: pytest.MonkeyPatch, name: str | None = None) -> Judgement:
    judgement = Judgement(name)
    monkeypatch.setattr(auto, "best", judgement)
    return judgement


@pytest.mark.parametrize("name", fewer(NAMES, [NAMES[2], *NAMES[4:]]))
def test_every_division_meets_the_budget_and_is_exact(net: Net, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judgement = take(monkeypatch, name)
    small = fxprune.compile(net, macs=0.5, granularity="auto", calibration=images(), verify=True)
    assert list(judgement.agreements) == NAMES
    report, plan = fxprune.report(small), record_of(small).plan
    assert report.macs_dense is not None
    assert report.macs_pruned is not None
    left = report.macs_pruned / report.macs_dense
    if name in ("branches alone", auto.PROGRAM):  # the only one, and more than half of the network
        assert left < 0.45
        assert plan.branches == {"outer": ("inner", "outer")}
    elif name == auto.WITHOUT_BRANCHES:
        assert 0.45 < left <= 0.5
        assert not plan.branches
        assert plan.removed
        assert plan.layers
    else:
        assert left == pytest.approx(0.5, rel=0.01)
    assert f"{name} (taken)" in plan.remarks[0]  # control: whatever the judge says is done
    if name not in (auto.PROGRAM, auto.WITHOUT_BRANCHES):
        assert bool(plan.layers) == (name not in ("filters alone", "branches alone"))
        assert bool(plan.removed) == (name not in ("kernels alone", "branches alone"))
    assert any(
        remark.startswith(f"{auto.BRANCHES_FIRST}: ") and "nothing to do for the rest" in remark
        for remark in plan.remarks
    )
    if name in auto.SPLITS:
        gone = fxprune.rewrite(fxprune.mask(net, filters := PrunePlan({}, removed=plan.removed)), filters, images(2))
        narrower = fxprune.report(gone).macs_pruned
        assert narrower is not None
        assert narrower / report.macs_dense == pytest.approx(1 - auto.SPLITS[name] / 2, rel=0.1)  # in whole steps
        assert all(layer.filters is not None and layer.filters % 8 == 0 for layer in fxprune.report(gone).layers)
    chosen = (
        r"one program: \d+ of 112 filters go, in \d of 3 channel spaces, kernels in \d of 3 convolutions, 1 of 1 bra"
    )
    assert any(re.match(chosen, remark) for remark in plan.remarks)


def test_the_best_on_held_out_inputs_is_taken_and_all_is_told(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    judgement = take(monkeypatch)
    plan = made(net)
    taken = best(judgement.agreements)
    told, *_ = plan.remarks
    for name, agreement in judgement.agreements.items():
        assert agreement is not None
        assert agreement.held_out
        mark = " (taken)" if name == taken else ""
        assert f"{name}{mark} {agreement.figure}, {agreement.distance:.3g}" in told
    assert told.count("(taken)") == 1
    report = fxprune.report(fxprune.rewrite(fxprune.mask(net, plan), plan, images(2)))
    assert set(plan.remarks) <= set(report.notes)
    assert f"note: {told}" in str(report)


def test_what_is_planned_step_by_step_is_what_compile_gives(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, auto.WITHOUT_BRANCHES)
    plan = made(net)
    assert PrunePlan.from_json(plan.to_json()) == plan
    masked = fxprune.mask(net, plan, images()).eval()
    small = fxprune.compile(net, macs=0.5, granularity="auto", calibration=images())
    assert record_of(small).plan == plan
    torch.testing.assert_close(small(images(4)), masked(images(4)), rtol=1e-3, atol=1e-3)
    again = fxprune.rewrite(masked, plan, images(2))
    torch.testing.assert_close(again(images(4)), masked(images(4)), rtol=1e-4, atol=1e-4)


def test_parameters_are_a_budget_too(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, auto.PROGRAM)
    report = fxprune.report(fxprune.compile(net, params=0.6, granularity="auto", calibration=images()))
    assert 0.57 < report.params_pruned / report.params_dense <= 0.6


class Narrow(nn.Module):
    """Layers that are too narrow to be grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.inner = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x).relu()).relu().mean((2, 3)))


def test_where_kernels_cannot_go_filters_do_and_it_is_said() -> None:
    plan = made(Narrow().eval())
    assert plan.removed
    assert not plan.layers
    assert any(remark.startswith("kernels alone: ") for remark in plan.remarks)


def test_a_budget_that_nothing_meets_says_how_near_each_comes(net: Net) -> None:
    with pytest.raises(PlanError) as caught:
        made(net, macs=0.0005)
    message = str(caught.value)
    assert re.search(r"kernels alone: macs=0\.0005 cannot be met .* the nearest share is 0\.\d+", message)
    assert re.search(r"filters alone: macs=0\.0005 cannot be reached .* 0\.\d+ remains", message)


def test_it_needs_data(net: Net) -> None:
    with pytest.raises(PlanError, match="granularity='auto' compares branches, filters and kernels on data; pass cal"):
        fxprune.make_plan(net, macs=0.5, granularity="auto", example_inputs=images(2))


@pytest.mark.parametrize(
    "asked, message",
    [
        (
            {},
            "granularity='auto' divides a budget among branches, filters and kernels; pass macs=, params=",
        ),
        ({"ratio": 0.5}, "granularity='auto' divides a budget among branches, filters and kernels; pass macs=, para"),
        ({"macs": 0.5, "ratio": 0.5}, "granularity='auto' divides a budget among branches, filters and kernels"),
        ({"latency": 0.5}, "latency=0.5 needs the device to be fast on"),
        (
            {"macs": 0.5, "after": PrunePlan({})},
            "after=a PrunePlan does not fit the network that removed filters leave",
        ),
        ({"macs": 0.5, "snapshots": ["a.pt"]}, "snapshots=a list does not fit the network that removed filters leave"),
    ],
    ids=str,
)
def test_what_does_not_go_together(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        Request(granularity="auto", **asked)


def test_what_both_parts_understand_is_passed_on() -> None:
    filters, kernels = Request(granularity="auto", macs=0.5, groups=8, round_to=4, ignore="a").parts()
    assert (filters.granularity, filters.macs, filters.round_to, filters.groups) == ("filter", 0.5, 4, "auto")
    assert (kernels.granularity, kernels.macs, kernels.round_to, kernels.groups) == ("kernel", 0.5, None, 8)
    assert filters.patterns == kernels.patterns == ("a",)
