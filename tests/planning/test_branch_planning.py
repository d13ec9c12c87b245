"""Whole residual branches: which go, what the refit mends, what is told, and that what goes is exact."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import assert_same_function
from torch import Tensor, nn

import fxprune
from fxprune import PlanError
from fxprune.calibration.recovery import RECOVERED
from fxprune.calibration.subject import Subject
from fxprune.exact.record import record_of
from fxprune.planning import auto
from fxprune.planning.branches import BranchPlanner
from fxprune.planning.joint import with_rest
from fxprune.planning.latency.network import WholeNetwork
from fxprune.planning.making import plan_for
from fxprune.planning.requests import Request
from fxprune.plans import PrunePlan

BLOCKS = 4
USELESS = "blocks.2.norm"


class Block(nn.Module):
    """`relu(x + norm(outer(relu(inner(x)))))`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.outer(torch.relu(self.inner(x)))))


class Net(nn.Module):
    """Four blocks between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    """One of the branches gives hardly more than its shift, the others half as much as what they are added to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            nn.init.uniform_(block.norm.bias, -0.5, 0.5)
            nn.init.constant_(block.norm.weight, 0.02 if number == 2 else 0.5)
        for _ in range(20):
            model(images(128))  # the statistics are those of the data
        model.eval()
        model.head.weight.mul_(30)
        model.head.bias.sub_(model(images(256)).mean(0))
    return model


def images(count: int = 96) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def made(net: nn.Module, **asked: Any) -> PrunePlan:
    return fxprune.make_plan(net, granularity="branch", calibration=images(), **asked)


def error(model: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        return float((model(images()) - dense(images())).square().mean() / dense(images()).var())


def test_what_is_missed_least_goes_first(net: Net) -> None:
    plan = made(net, ratio=0.25)
    assert plan.branches == {USELESS: ("blocks.2.inner", "blocks.2.outer", "blocks.2.norm")}
    errors = {
        name: error(fxprune.mask(net, PrunePlan({}, branches={name: (name,)})), net)
        for name in (f"blocks.{i}.norm" for i in range(BLOCKS))
    }
    assert 10 * errors.pop(USELESS) < min(errors.values())


def test_the_refit_mends_most_of_it(net: Net) -> None:
    plan = made(net, ratio=0.5)
    assert len(plan.branches) == 2
    masked, refitted = (fxprune.mask(net, plan, data) for data in (None, images()))
    assert error(refitted, net) < 0.5 * error(masked, net)
    touched = [name for name, t in refitted.state_dict().items() if not torch.equal(t, masked.state_dict()[name])]
    first = min(int(name.split(".")[1]) for name in plan.branches)
    assert touched
    assert not any(name.startswith("stem") or name.startswith(f"blocks.{first}.") for name in touched)


def test_a_budget_is_met_from_below(net: Net) -> None:
    pruned = fxprune.compile(net, macs=0.6, granularity="branch", calibration=images(), verify=True)
    report = fxprune.report(pruned)
    assert report.macs_dense is not None
    assert report.macs_pruned is not None
    reached = report.macs_pruned / report.macs_dense
    one = next(layer.macs_dense for layer in report.layers if layer.form == "branch") or 0
    assert 0.6 - 1.2 * one / report.macs_dense < reached <= 0.6
    gone = [layer for layer in report.layers if layer.form == "branch"]
    assert {(layer.params, layer.macs) for layer in gone} == {(0, 0)}
    assert f"{len(record_of(pruned).plan.branches)} residual branches went, with {len(gone)} layers" in str(report)
    assert any("ways to choose branches" in note or "branch" in note for note in report.notes) or not report.notes
    assert type(report).from_dict(report.to_dict()) == report


def test_the_result_is_a_network_like_any_other(net: Net, tmp_path: Path) -> None:
    plan = made(net, ratio=0.5)
    masked = fxprune.mask(net.double(), plan)
    pruned = fxprune.rewrite(masked, plan, images(2).double())
    assert_same_function(pruned, masked, (images(4).double(),))
    net.float()
    pruned = fxprune.compile(net, ratio=0.5, granularity="branch", calibration=images(), example_inputs=images(2))
    fxprune.save(pruned, tmp_path / "pruned.pt")
    again = fxprune.load(tmp_path / "pruned.pt", Net())
    assert torch.equal(again.eval()(images()), pruned.eval()(images()))
    scripted = torch.jit.script(pruned)
    assert torch.equal(scripted(images()), pruned(images()))
    recovered = fxprune.recover(net, fxprune.mask(net, plan, images()), plan, images(), steps=3)
    assert hasattr(recovered, RECOVERED)
    assert not any(recovered.get_parameter(f"{name}.weight").any() for name in plan.branches)


@pytest.mark.parametrize("rest", ["filter", "kernel"])
def test_filters_and_kernels_of_what_branches_leave(net: Net, rest: Any) -> None:
    subject = Subject(net, images(2), images())
    asked = Request(granularity="branch", ratio=0.25)
    branches = next(iter(BranchPlanner(subject, asked).plans(asked).values()))
    plan, _ = with_rest(
        subject,
        branches,
        lambda left: plan_for(left, Request(granularity=rest, ratio=0.5, groups=2 if rest == "kernel" else "auto")),
    )
    assert plan.branches == branches.branches
    assert plan.removed if rest == "filter" else plan.layers
    if rest == "filter":  # the shift that a branch leaves loses the channels of its stream
        assert plan.removed[f"{USELESS}.bias"].outputs == plan.removed["stem"].outputs
    assert PrunePlan.from_json(plan.to_json()) == plan
    for data in (None, images()):
        masked = fxprune.mask(net, plan, data)
        pruned = fxprune.rewrite(masked, plan, images(2))
        fxprune.verify(pruned, masked, images(4))
        assert sum(p.numel() for p in pruned.parameters()) < 0.75 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("other", ["kernels alone", "filters alone"])
def test_auto_lets_branches_go_first(net: Net, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(found: Mapping[str, object]) -> str:
        named = [name for name in (auto.BRANCHES_FIRST, other) if name in found]
        return named[0] if named else next(iter(found))

    monkeypatch.setattr(auto, "best", choose)
    pruned = fxprune.compile(net, macs=0.5, granularity="auto", round_to=1, calibration=images(), verify=True)
    plan, report = record_of(pruned).plan, fxprune.report(pruned)
    assert f"{auto.BRANCHES_FIRST} (taken)" in plan.remarks[0]
    assert plan.branches
    assert plan.layers if other == "kernels alone" else plan.removed
    assert report.macs_dense is not None
    assert report.macs_pruned is not None
    assert report.macs_pruned / report.macs_dense == pytest.approx(0.5, rel=0.02)


def test_auto_lets_branches_go_with_filters_and_kernels(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (auto.PROGRAM, "branches alone")

    def choose(found: Mapping[str, object]) -> str:
        return next((name for name in names if name in found), next(iter(found)))

    monkeypatch.setattr(auto, "best", choose)
    pruned = fxprune.compile(net, macs=0.3, granularity="auto", calibration=images(), verify=True)
    plan, report = record_of(pruned).plan, fxprune.report(pruned)
    assert f"{auto.PROGRAM} (taken)" in plan.remarks[0]
    assert USELESS in plan.branches
    assert plan.layers or plan.removed
    assert report.macs_dense is not None
    assert report.macs_pruned is not None
    assert 0.27 < report.macs_pruned / report.macs_dense <= 0.3


def test_latency_is_measured_without_the_branches(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {0: 1.0, 1: 0.85, 2: 0.7, 3: 0.55, 4: 0.4}  # a branch saves less time than it has of the MACs
    asked: list[int] = []

    def share(self: WholeNetwork, fast: nn.Module) -> float:
        names = dict(fast.named_parameters())
        asked.append(sum(f"blocks.{i}.inner.weight" not in names for i in range(BLOCKS)))
        return times[asked[-1]]

    monkeypatch.setattr(WholeNetwork, "share_of", share)
    monkeypatch.setattr(WholeNetwork, "accelerated", lambda self, model: model)
    plan = made(net, latency=0.6, target="cpu")
    assert len(plan.branches) == 3
    assert len(set(asked)) <= 3, "halved each time"
    assert "latency: asked for 0.60 of the best dense time in torch; without 3 branches it was 0.55" in plan.remarks


def test_a_latency_out_of_reach(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WholeNetwork, "share_of", lambda self, fast: 0.7)
    monkeypatch.setattr(WholeNetwork, "accelerated", lambda self, model: model)
    with pytest.raises(PlanError, match=r"latency=0.6 cannot be reached by branches alone: without all 4 .* 0.7 rem"):
        made(net, latency=0.6, target="cpu")


def test_ignored_layers_keep_their_branch(net: Net) -> None:
    assert USELESS not in made(net, ratio=0.5, ignore="blocks.2.inner").branches
    assert made(net, ratio=0.25, ignore="stem").branches.keys() == {USELESS}


def test_parameters_are_counted_where_they_are_the_budget(net: Net) -> None:
    plan = made(net, params=0.7)
    pruned = fxprune.rewrite(fxprune.mask(net, plan), plan, images(2))
    assert fxprune.report(pruned).params_pruned <= 0.7 * fxprune.report(pruned).params_dense + 16 * BLOCKS


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"calibration": None}, "pass calibration="),
        ({"output": "module"}, "pass output='graph'"),
        ({"ratio": None, "macs": 0.01}, r"macs=0.01 cannot be reached by branches alone: .* remain"),
        ({"ratio": {"blocks": 0.5}}, "pass one ratio"),
        ({"ignore": "blocks*"}, "no residual branch"),
        ({"groups": 4}, "groups=4 has no meaning for granularity='branch'"),
        ({"round_to": 8}, "round_to=8 has no meaning"),
        ({"granularity": "branches"}, "near: 'branch'"),
    ],
)
def test_refused(net: Net, asked: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"granularity": "branch", "ratio": 0.5, "calibration": images()} | asked
    with pytest.raises(PlanError, match=message):
        fxprune.make_plan(net, **arguments)


def test_a_network_without_branches() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    with pytest.raises(PlanError, match="nothing is added to what it was computed from"):
        made(plain, ratio=0.5)


@pytest.mark.parametrize(
    "branches, message",
    [
        ({"blocks.2.norm": ("blocks.2.inner",)}, "'blocks.2.norm' too"),
        ({"blocks.2.norm": "blocks.2.norm"}, "must list the layers"),
        ("blocks.2.norm", "must map the layer"),
    ],
)
def test_a_malformed_plan(branches: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PrunePlan({}, branches=branches)


def test_a_plan_for_another_model(net: Net) -> None:
    with pytest.raises(PlanError, match=r"blocks.9.norm: .* has no layer with a weight of this name"):
        fxprune.mask(net, PrunePlan({}, branches={"blocks.9.norm": ("blocks.9.norm",)}))
