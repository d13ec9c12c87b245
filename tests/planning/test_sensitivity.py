"""Sensitivity: the damage against brute force, budgets against the report of the compiled model, and every refusal."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torchvision
from calibration_harness import batches, case_of
from equality import randomize
from products_harness import fewer, in_turns
from torch import Tensor, nn

import fxprune
from fxprune import PlanError
from fxprune.calibration.samples import Samples
from fxprune.exact.record import record_of
from fxprune.planning import sensitivity
from fxprune.planning.sensitivity import TOLERANCE, Cost, LayerSensitivity, Sensitivity
from fxprune.vocabulary import Granularity

Build = Callable[[], nn.Module]


class Net(nn.Module):
    """Two branches behind norms that are added to a stream, and 1x1 convolutions with biases that weigh something."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.left = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.left_norm = nn.BatchNorm2d(width)
        self.right = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.right_norm = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, 2 * width, 1)
        self.narrow = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.left_norm(self.left(x))).relu()
        x = (x + self.right_norm(self.right(x))).relu()
        return self.head(self.narrow(self.wide(x).relu()).mean((2, 3)))


def net(width: int = 64) -> Net:
    model = Net(width)
    randomize(model).eval()
    return model


def images(count: int = 16, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measured() -> Sensitivity:
    """The table of `net(32)`."""
    torch.manual_seed(0)
    return fxprune.measure_sensitivity(net(32), calibration=images())


def layer_of(table: Sensitivity, name: str) -> LayerSensitivity:
    return next(layer for layer in table.layers if layer.name == name)


# --- the damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, calibrated",
    in_turns(
        ["Plain", "ResidualAdd", "Concat", "SharedConvTwoReaders", "Depthwise", "TwoInputs"], [True, False], start=1
    ),
)
def test_damage_falls_as_more_channels_stay(name: str, calibrated: bool) -> None:
    case = case_of(name)
    model = randomize(case.build().double()).eval()
    table = fxprune.measure_sensitivity(
        model, calibration=batches(case) if calibrated else None, example_inputs=case.inputs()
    )
    assert len(table.layers) == case.grouped
    for layer in table.layers:
        conv = model.get_submodule(layer.name)
        assert isinstance(conv, nn.Conv2d)
        assert len(layer.damage) == conv.in_channels
        assert layer.damage[-1] == 0
        assert layer.damage[0] > 0
        assert all(math.isfinite(damage) for damage in layer.damage)
        assert list(layer.damage) == sorted(layer.damage, reverse=True)
        assert layer.at(0.5) == layer.damage[conv.in_channels // 2 - 1]
    if not calibrated:
        assert all(layer.damage[0] <= 1 for layer in table.layers)


class OneLayer(nn.Module):
    """A 1x1 convolution between two that are too narrow to prune, alone or behind a norm, with or without a stream."""

    def __init__(self, norm: bool, bias: bool, residual: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.conv = nn.Conv2d(16, 16, 1, bias=bias)
        self.norm = nn.BatchNorm2d(16) if norm else None
        self.head = nn.Conv2d(16, 4, 1)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.read(x, self.conv(x)))

    def read(self, x: Tensor, y: Tensor) -> Tensor:
        """What the head reads."""
        y = y if self.norm is None else self.norm(y)
        return x + y if self.residual else y


def eliminate(inputs: Tensor, targets: Tensor, intercept: bool) -> list[float]:
    """The least squared error, summed over the targets, as channels go one by one, each time that which is missed
    least: by trying all of them. Entry `k - 1` is for `k` channels.
    """

    width = inputs.shape[1]
    rows = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1).numpy()
    gram, cross = rows.T @ rows, rows.T @ targets.numpy()
    energy = float(targets.square().sum())

    def error(channels: list[int]) -> float:
        kept = [*channels, width] if intercept else channels
        solution = np.linalg.solve(gram[np.ix_(kept, kept)], cross[kept])
        return (energy - float((solution * cross[kept]).sum())) / len(rows)

    alive = list(range(width))
    errors = [error(alive)]
    while len(alive) > 1:
        tried = {channel: error([c for c in alive if c != channel]) for channel in alive}
        worst = min(tried, key=tried.__getitem__)
        alive.remove(worst)
        errors.append(tried[worst])
    return errors[::-1]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_damage_is_the_error_that_brute_force_finds(norm: bool, bias: bool, residual: bool) -> None:
    model = OneLayer(norm, bias, residual).double()
    randomize(model).eval()
    data = images(80, 6).double()
    table = fxprune.measure_sensitivity(model, calibration=data, groups=1)
    (layer,) = table.layers
    with torch.no_grad():
        x = model.stem(data).relu()
        alone = model.conv(x)
        y = alone if model.norm is None else model.norm(alone)
        values = [value.transpose(0, 1).flatten(1).T for value in (x, y, alone, model.read(x, alone))]
    inputs, targets, alone, read = values
    errors = eliminate(inputs, targets, intercept=norm or bias)
    variance = float(read.var(0, correction=0).sum())
    expected = [error / variance for error in errors]
    assert layer.damage == pytest.approx(expected, rel=0.02, abs=1e-3)
    # A norm that multiplies some filters by more than others, and the stream, would be seen if they were forgotten.
    if norm or residual:
        forgotten = [
            e / float(alone.var(0, correction=0).sum()) for e in eliminate(inputs, alone, intercept=norm or bias)
        ]
        assert layer.damage != pytest.approx(forgotten, rel=0.02, abs=1e-3)


def test_a_few_groups_stand_for_all_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What four of eight groups lose, relative to what these give, is near what all lose."""
    model = net(32)
    found = {}
    for probes in (8, 4):
        monkeypatch.setattr("fxprune.calibration.damage.PROBES", probes)
        found[probes] = fxprune.measure_sensitivity(model, calibration=images(64), groups=8)
    for few, every in zip(found[4].layers, found[8].layers, strict=True):
        middle = len(every.damage) // 2 - 1
        assert few.damage != every.damage
        assert few.damage[middle] == pytest.approx(every.damage[middle], rel=0.25)


@pytest.mark.parametrize("name", fewer(["left", "right"], ["left"]))
def test_few_images_do_not_make_a_layer_look_harmless(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(count: int) -> float:
        others = tuple({"left", "right", "wide", "narrow"} - {name})
        found = fxprune.measure_sensitivity(net(32), calibration=images(count), groups=4, ignore=others)
        return layer_of(found, name).at(0.5)

    right = damage(100)
    assert right < damage(2) < 3 * right
    # 128 rows for 144 unknowns: an error that is measured where it was minimized is next to none.
    monkeypatch.setattr(Samples, "parts", lambda self: (self, self))
    assert damage(2) < 0.1 * right


def test_without_calibration_damage_is_the_weight_lost() -> None:
    model = OneLayer(norm=True, bias=True, residual=False)
    randomize(model)
    table = fxprune.measure_sensitivity(model, example_inputs=images(2), groups=1)
    energy = model.conv.weight.detach().double().square().sum((0, 2, 3)).sort(descending=True).values
    expected = (1 - energy.cumsum(0) / energy.sum()).clamp(min=0).tolist()
    assert layer_of(table, "conv").damage == pytest.approx(expected, abs=1e-9)


def test_a_layer_that_matters_little_is_pruned_more() -> None:
    for weak, strong in (("left", "right"), ("right", "left")):
        model = net(32)
        with torch.no_grad():
            model.get_submodule(f"{weak}_norm").weight.mul_(0.01)  # type: ignore[operator]  # it is a tensor
        table = fxprune.measure_sensitivity(model, calibration=images())
        assert layer_of(table, weak).at(0.5) < 0.01 * layer_of(table, strong).at(0.5)
        ratios = table.ratios(0.7)
        assert ratios[weak] > ratios[strong] + 0.3
        kernels = fxprune.make_plan(model, macs=0.7, calibration=images(), sensitivity=table).layers
        assert kernels[weak].kept_channels < 16
        # Without data nobody knows: the weights of both are alike.
        blind = fxprune.measure_sensitivity(model, example_inputs=images(2)).ratios(0.7)
        assert abs(blind[weak] - blind[strong]) < 0.15


def test_measuring_changes_nothing() -> None:
    model = net(32).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = fxprune.measure_sensitivity(model, calibration=images())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {module.training for module in model.modules()} == {True}
    assert fxprune.measure_sensitivity(model, calibration=images()) == first
    assert fxprune.measure_sensitivity(model, calibration=2 * images()) != first


def test_ignore_and_groups() -> None:
    options: dict[str, Any] = {"example_inputs": images(2)}
    table = fxprune.measure_sensitivity(net(), ignore=("left", "wide"), groups={"right": 8}, **options)
    assert [layer.name for layer in table.layers] == ["right", "narrow"]
    assert [layer.groups for layer in table.layers] == [8, 4]
    with pytest.raises(PlanError, match="left: 64 filters do not divide into 5 groups"):
        fxprune.measure_sensitivity(net(), groups={"left": 5}, **options)
    nearest = fxprune.measure_sensitivity(net(), groups=5, **options)
    assert {layer.groups for layer in nearest.layers} == {4}
    with pytest.raises(PlanError, match="ignore: pattern 'lefd' matches no convolution"):
        fxprune.measure_sensitivity(net(), ignore="lefd", **options)


# --- budgets --------------------------------------------------------------------------------------------------------


def google_net() -> nn.Module:
    """Auxiliary heads, half of the parameters, that evaluation never calls."""
    model: nn.Module = torchvision.models.googlenet(weights=None, init_weights=False)
    return model


NETWORKS: dict[str, Build] = {
    "googlenet": google_net,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "resnet18": torchvision.models.resnet18,
    "squeezenet1_1": torchvision.models.squeezenet1_1,  # each convolution has a bias, which stays
    "fire": lambda: torchvision.models.squeezenet1_1(num_classes=10).features[:6],  # its start
}


def reached(pruned: nn.Module, cost: Cost) -> float:
    report = fxprune.report(pruned)
    before, after = (report.macs_dense, report.macs_pruned)
    if cost == "params":
        before, after = (report.params_dense, report.params_pruned)
    assert before is not None
    assert after is not None
    return after / before


@pytest.mark.parametrize(
    "name, cost, share",
    [
        pytest.param("googlenet", "params", 0.6, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", "macs", 0.5, marks=pytest.mark.slow),
        pytest.param("resnet18", "macs", 0.3, marks=pytest.mark.slow),
        pytest.param("squeezenet1_1", "macs", 0.6, marks=pytest.mark.slow),
        ("fire", "macs", 0.6),
        ("fire", "params", 0.6),
        pytest.param("squeezenet1_1", "params", 0.1, marks=pytest.mark.slow),
    ],
)
def test_the_compiled_network_meets_its_budget(name: str, cost: Cost, share: float) -> None:
    budget: dict[str, Any] = {cost: share}
    pruned = fxprune.compile(NETWORKS[name](), example_inputs=images(2, 64), verify=False, **budget)
    assert reached(pruned, cost) == pytest.approx(share, rel=TOLERANCE)
    assert {layer.form for layer in fxprune.report(pruned).layers} <= {"overlap", "dense"}


@pytest.mark.parametrize("cost, share", in_turns(["macs", "params"], [0.85, 0.5]))
def test_a_budget_with_calibration_is_met_and_the_result_is_exact(
    cost: Cost, share: float, measured: Sensitivity
) -> None:
    model, table = net(32), measured
    options: dict[str, Any] = {"calibration": images(), "method": "cocluster", cost: share}
    pruned = fxprune.compile(model, sensitivity=table, verify=True, **options)
    assert reached(pruned, cost) == pytest.approx(share, rel=TOLERANCE)
    report = fxprune.report(pruned)  # of images of the same size
    assert (table.macs, table.params) == (report.macs_dense, report.params_dense)
    # The table says what it takes, so it does without measuring anew what it knows.
    plan = record_of(pruned).plan
    assert plan == fxprune.make_plan(model, **options)
    assert plan.ratio != table.ratios(0.45, cost)


def test_the_report_counts_what_forward_uses() -> None:
    report = fxprune.report(fxprune.compile(google_net(), {"conv3": 0.5}, example_inputs=images(2, 64)))
    saved = sum(layer.params_dense - layer.params for layer in report.layers)
    assert 0 < saved == report.params_dense - report.params_pruned


def test_less_budget_never_keeps_more() -> None:
    table = fxprune.measure_sensitivity(net(), example_inputs=images(2))
    for cost in ("macs", "params"):
        before = dict.fromkeys((layer.name for layer in table.layers), 0.0)
        for share in (1.0, 0.9, 0.7, 0.5, 0.3, 0.2):
            ratios = table.ratios(share, cost)
            assert ratios.keys() == before.keys()
            assert all(ratio >= before[name] for name, ratio in ratios.items())
            assert ratios != before or share == 1.0
            before = ratios


def test_a_share_of_one_prunes_nothing(measured: Sensitivity) -> None:
    assert set(measured.ratios(1.0).values()) == set(measured.ratios(1, "params").values()) == {0.0}
    with pytest.warns(fxprune.NothingRewrittenWarning):
        fxprune.compile(net(32), macs=1.0, example_inputs=images(2))


def table_of(damages: dict[str, list[float]], cost: int = 1000, rest: int = 0) -> Sensitivity:
    layers = [LayerSensitivity(name, 2, cost, cost, tuple(damage)) for name, damage in damages.items()]
    return Sensitivity(tuple(layers), rest + cost * len(layers), rest + cost * len(layers))


def test_no_layer_is_emptied_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = ([slope * (1 - k / 100) for k in range(1, 101)] for slope in (0.98, 1.1))
    table = table_of({"a": slow, "b": slow, "c": fast, "d": fast})
    ratios = table.ratios(0.5)
    assert all(0.3 < ratio < 0.7 for ratio in ratios.values())  # what is left of the signal multiplies
    monkeypatch.setattr(sensitivity, "loss_of", lambda damage: damage)  # control: a sum empties two of them
    ratios = table.ratios(0.5)
    assert ratios["a"] == pytest.approx(15 / 16, abs=0.01)  # but for the floor
    monkeypatch.setattr(sensitivity, "FLOOR", 0.0)
    assert table.ratios(0.5)["a"] > 0.97


def test_channels_go_where_they_do_least_damage() -> None:
    convex = [0.01 * (1 - k / 100) ** 2 for k in range(1, 101)]
    table = table_of({"much": [4 * d for d in convex], "little": convex})
    ratios = table.ratios(0.5)
    # The Lagrangian: equal slopes, so four times the ratio where the damage is a quarter.
    assert ratios["little"] == pytest.approx(0.8, abs=0.05)
    assert ratios["much"] == pytest.approx(0.2, abs=0.05)
    assert sum(layer.at(ratios[layer.name]) for layer in table.layers) < 0.01 * (2 * 0.5**2 + 3 * 0.5**2)


@pytest.mark.parametrize("share", [0, 0.0, -0.5, 1.5, 2, math.nan, math.inf, True, "0.5", None, (0.5,)])
@pytest.mark.parametrize("cost", ["macs", "params"])
def test_shares_out_of_range(measured: Sensitivity, cost: Cost, share: Any) -> None:
    with pytest.raises(PlanError, match=rf"{cost} is .*; it must be a share in \(0, 1\]"):
        measured.ratios(share, cost)
    if share is not None:  # which says that there is no budget
        with pytest.raises(PlanError, match=rf"{cost} is .*; it must be a share in \(0, 1\]"):
            fxprune.make_plan(net(32), example_inputs=images(2), **{cost: share})


def test_a_share_is_checked_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.planning.kernels.measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(PlanError, match=r"macs is 1\.5"):
        fxprune.make_plan(net(32), macs=1.5, example_inputs=images(2))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        fxprune.make_plan(net(32), macs=0.5, example_inputs=images(2))


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.parametrize("cost", ["macs", "params"])
def test_a_budget_out_of_reach_is_refused_before_anything_is_measured(
    granularity: Granularity, cost: Cost, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("kernels.measure", "filters.measure_readers"):
        monkeypatch.setattr(f"fxprune.planning.{place}", lambda *_, **__: pytest.fail("measured"))
    given: dict[str, Any] = {"granularity": granularity, "calibration": images()}
    with pytest.raises(PlanError, match=rf"{cost}=0\.001 cannot be reached by .* remains; ask for more") as refusal:
        fxprune.make_plan(net(), **{cost: 0.001, **given})
    least = float(str(refusal.value).split(" remains")[0].split()[-1])
    with pytest.raises(pytest.fail.Exception, match="measured"):  # what the message says can be asked for
        fxprune.make_plan(net(), **{cost: least, **given})


def test_a_budget_out_of_reach_says_how_near_one_comes_and_that_is_in_reach(measured: Sensitivity) -> None:
    for cost in ("macs", "params"):
        with pytest.raises(PlanError, match=rf"{cost}=0\.001 cannot be met within 1%.* 4 convolutions") as refusal:
            measured.ratios(0.001, cost)
        nearest = float(str(refusal.value).split("nearest share is ")[1].split(":")[0])
        ratios = measured.ratios(nearest, cost)
        # Nothing is left to take: one channel a group.
        assert ratios == {layer.name: 1 - 1 / len(layer.damage) for layer in measured.layers}
        assert 0.001 < nearest < 0.2


def test_a_budget_between_two_channels_is_out_of_reach() -> None:
    coarse = table_of({"a": [0.5, 0.0], "b": [0.5, 0.0]})
    assert coarse.ratios(0.75) == {"a": 0.5, "b": 0.0}
    with pytest.raises(PlanError, match=r"macs=0\.8 cannot be met within 1%.*the nearest share is 0\.75"):
        coarse.ratios(0.8)
    # A layer of small channels fills the gap.
    fine = LayerSensitivity("fine", 2, 100, 100, tuple(1 - k / 100 for k in range(1, 101)))
    table = dataclasses.replace(coarse, layers=(*coarse.layers, fine), macs=2100)
    ratios = table.ratios(0.75)
    left = sum(layer.macs * (1 - ratios[layer.name]) for layer in table.layers)
    assert left / 2100 == pytest.approx(0.75, rel=TOLERANCE)
    assert 0 < ratios["fine"] < 1


def test_small_networks_meet_every_budget_that_small_channels_can_fill() -> None:
    dear = [0.0] * 16  # a channel is 5 % of the network, and costs nothing
    cheap = [1 - k / 128 for k in range(1, 129)]
    layers = LayerSensitivity("dear", 2, 800, 800, tuple(dear)), LayerSensitivity("cheap", 2, 128, 128, tuple(cheap))
    table = Sensitivity(layers, 1000, 1000)
    for percent in range(25, 100):
        share = percent / 100
        ratios = table.ratios(share)
        left = 72 + sum(layer.macs * (1 - ratios[layer.name]) for layer in layers)
        assert left == pytest.approx(1000 * share, rel=TOLERANCE)
        assert ratios["cheap"] < 0.5  # no more than fills the gap


def test_layers_without_cost_are_left_alone() -> None:
    free = LayerSensitivity("free", 2, 0, 0, (0.0, 0.0))
    table = table_of({"a": [1 - k / 100 for k in range(1, 101)]})
    assert dataclasses.replace(table, layers=(free, *table.layers)).ratios(0.5) == {"free": 0.0, "a": 0.5}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "ratio and macs": ({"ratio": 0.5, "macs": 0.5}, "pass a ratio or budgets"),
    "ratio and both": ({"ratio": 0.5, "macs": 0.5, "params": 0.5}, "macs=0.5, params=0.5 what may remain"),
    "partition": ({"macs": 0.5, "form": "partition"}, "a budget needs ratios of any value"),
    "partition and params": ({"params": 0.5, "form": "partition"}, "a budget needs ratios of any value"),
    "table without budget": ({"sensitivity": Sensitivity((), 1, 1)}, "sensitivity is for a budget; pass macs= or par"),
    "table with ratio": (
        {"sensitivity": Sensitivity((), 1, 1), "ratio": 0.5},
        "sensitivity is for a budget; pass macs= or params=",
    ),
    "table as text": ({"sensitivity": "{}", "macs": 0.5}, r"sensitivity is a str; .*Sensitivity\.from_json"),
    "unknown form": ({"macs": 0.5, "form": "both"}, "form is 'both'"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name: str) -> None:
    options, match = CONTRADICTIONS[name]
    with pytest.raises(PlanError, match=match):
        fxprune.make_plan(net(32), example_inputs=images(2), **options)


def test_macs_that_are_not_known() -> None:
    class FixedSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3)
            self.head = nn.Linear(16 * 11 * 7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).flatten(1))

    for use in (fxprune.measure_sensitivity, lambda model: fxprune.make_plan(model, macs=0.5)):
        with pytest.raises(PlanError, match=r"MACs of the model are not known.*pass example_inputs"):
            use(FixedSize())
    x = torch.randn(2, 16, 13, 9)
    share = (77 * 16 * 9 * 8 + 16 * 77 * 4) / (77 * 16 * 9 * 16 + 16 * 77 * 4)  # 8 of 16 channels, and the head
    for given in ({"example_inputs": x}, {"calibration": x}):
        assert reached(fxprune.compile(FixedSize(), macs=share, **given), "macs") == pytest.approx(share)  # type: ignore[arg-type]


# --- a table that is used again -------------------------------------------------------------------------------------


def test_a_table_serves_where_less_may_be_pruned() -> None:
    model = net()
    table = fxprune.measure_sensitivity(model, example_inputs=images(2))
    options: dict[str, Any] = {"example_inputs": images(2), "ignore": ("left",), "macs": 0.7}
    pruned = fxprune.compile(model, sensitivity=table, **options)
    assert reached(pruned, "macs") == pytest.approx(0.7, rel=TOLERANCE)
    assert "left" not in record_of(pruned).plan.layers
    assert record_of(pruned).plan == fxprune.make_plan(model, **options)
    partial = fxprune.measure_sensitivity(model, example_inputs=images(2), ignore="left")
    options.pop("ignore")
    assert record_of(pruned).plan.layers == fxprune.make_plan(model, sensitivity=partial, **options).layers


def test_a_table_of_another_model(measured: Sensitivity) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__(32)
            self.middle, self.wide = self.wide, nn.Identity()  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.narrow(self.middle(self.left(self.stem(x)))).mean((2, 3)))

    for model, match in (
        (net(64), r"left has 32 channels and 9216 weights, but Net has a convolution of 64 channels and 36864 weights"),
        (Other(), r"wide has 32 channels and 2048 weights, but Other has no such convolution.*measure this model"),
    ):
        with pytest.raises(PlanError, match=match):
            fxprune.make_plan(model, macs=0.5, sensitivity=measured, example_inputs=images(2))


# --- text, files and pictures ---------------------------------------------------------------------------------------


def test_the_printed_table(measured: Sensitivity) -> None:
    header, *lines = str(measured).splitlines()
    assert header.split() == ["layer", "groups", "MACs", "params", "at", "0.25", "at", "0.50", "at", "0.75"]
    assert [line.split()[0] for line in lines] == [layer.name for layer in measured.layers]
    first = lines[0].split()
    layer = measured.layers[0]
    assert first[1] == str(layer.groups)
    assert first[2] == f"{layer.macs / measured.macs:.1%}"
    assert first[3] == f"{layer.params / measured.params:.1%}"
    assert first[4:] == [f"{layer.at(ratio):.2%}" for ratio in (0.25, 0.5, 0.75)]
    assert len({len(line) for line in (header, *lines)}) == 1
    assert len(str(Sensitivity((), 0, 0)).splitlines()) == 1


def test_json_gives_an_equal_table(measured: Sensitivity) -> None:
    assert Sensitivity.from_json(measured.to_json()) == measured
    assert Sensitivity.from_json(json.dumps(json.loads(measured.to_json()), indent=2)) == measured


def damaged(**changes: Any) -> str:
    layer: dict[str, Any] = {"name": "a", "groups": 2, "macs": 10, "params": 10, "damage": [0.5, 0.0]}
    table = {"layers": [layer], "macs": changes.pop("total", 20), "params": 20}
    if "layers" in changes:
        table["layers"] = changes.pop("layers")
    layer.update(changes)
    return json.dumps(table)


DAMAGED = {
    "no text": "",
    "no JSON": "{layers",
    "null": "null",
    "a list": "[]",
    "no layers": '{"macs": 1, "params": 1}',
    "no total": '{"layers": [], "params": 1}',
    "total is no number": damaged(total="many"),
    "total is a fraction": damaged(total=0.5),
    "layers is a number": damaged(layers=3),
    "layer is a list": damaged(layers=[[1, 2]]),
    "layer without damage": damaged(layers=[{"name": "a", "groups": 2, "macs": 1, "params": 1}]),
    "unknown field": damaged(colour="red"),
    "name is a number": damaged(name=3),
    "groups is zero": damaged(groups=0),
    "macs is negative": damaged(macs=-1),
    "macs is null": damaged(macs=None),
    "damage is text": damaged(damage="high"),
    "damage is a number": damaged(damage=0.5),
    "damage is empty": damaged(damage=[]),
    "damage is NaN": damaged(damage=[math.nan, 0.0]),
    "damage is infinite": damaged(damage=[math.inf, 0.0]),
    "damage is negative": damaged(damage=[-0.5, 0.0]),
    "damage of texts": damaged(damage=["0.5", "0"]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_json(name: str) -> None:
    with pytest.raises(PlanError, match=r"the text is no sensitivity table: .*; write it with Sensitivity\.to_json"):
        Sensitivity.from_json(DAMAGED[name])


def test_the_json_that_was_damaged_was_fine() -> None:
    assert Sensitivity.from_json(damaged()).ratios(0.75) == {"a": 0.5}


def test_plots(measured: Sensitivity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    measured.plot(tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    measured.plot(str(tmp_path / "table.svg"))
    assert ElementTree.parse(tmp_path / "table.svg").getroot().tag.endswith("svg")
    assert "matplotlib.pyplot" not in sys.modules  # which would choose a display
    layers = table_of({f"layer{i}": [0.0, 0.0] for i in range(30)})  # no damage has no logarithm
    layers.plot(tmp_path / "flat.png")
    Sensitivity((), 0, 0).plot(tmp_path / "empty.png")


def test_a_plot_without_matplotlib(measured: Sensitivity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlanError, match="needs matplotlib; pip install matplotlib"):
        measured.plot(tmp_path / "table.png")
