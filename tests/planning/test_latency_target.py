"""Latency as a target: the choice against brute force, its correction, the table, and whole compilations on a clock
that counts multiply-accumulates.
"""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import ctypes
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clock_harness import Clock, Net, image, net, wind
from hypothesis import example, given
from hypothesis import strategies as st
from products_harness import examples, fewer
from torch import nn

import fxprune
from fxprune import (
    AccelerationError,
    LatencyTable,
    PlanError,
)
from fxprune.calibration.stages import Run
from fxprune.cli import program as cli
from fxprune.inference import forms
from fxprune.inference import stopwatch as measurements
from fxprune.inference.engines import LibraryConv2d
from fxprune.planning import Request
from fxprune.planning.knapsack import silent
from fxprune.planning.latency import layers as layer_times
from fxprune.planning.latency import measure as latency_measure
from fxprune.planning.latency import meeting as latency_meeting
from fxprune.planning.latency.budget import as_patterns, damages
from fxprune.planning.latency.meeting import Meeting
from fxprune.planning.latency.table import LatencyOption, LayerLatency
from fxprune.planning.planner import Planner
from fxprune.vocabulary import FormChoice

Damage = dict[str, list[float]]

# --- the choice -------------------------------------------------------------------------------------------------------


def table_of(rest: float, *layers: tuple[float, list[float]]) -> LatencyTable:
    """A table of layers `a`, `b`, ... with the dense time and the times of the options."""
    found = []
    for name, (dense, options) in zip("abcdefgh", layers, strict=False):
        # every option another shape, so that each can be told from the others
        timed = (LatencyOption("overlap", 2, 1 + i, 0.5, seconds) for i, seconds in enumerate(options))
        found.append(LayerLatency(name, 64, 64, dense, tuple(timed)))
    dense = rest + sum(seconds for seconds, _ in layers)
    return LatencyTable("cpu", "float32", "channels_last", ((1, 3, 8, 8),), dense or 1.0, rest, tuple(found))


def total(table: LatencyTable, choice: Mapping[str, LatencyOption], damage: Damage) -> float:
    layers = {layer.name: layer for layer in table.layers}
    return sum(damage[name][layers[name].options.index(option)] for name, option in choice.items())


def brute_force(table: LatencyTable, damage: Damage, share: float) -> float | None:
    """The least total damage of all choices that leave `share`, if there is one."""
    ways = [[(layer.seconds, 0.0), *zip((o.seconds for o in layer.options), damage[layer.name], strict=True)]
            for layer in table.layers]  # fmt: skip
    legal = [
        sum(cost for _, cost in way)
        for way in itertools.product(*ways)
        if table.rest + sum(seconds for seconds, _ in way) <= share * table.seconds * (1 + 1e-9)
    ]
    return min(legal, default=None)


def is_optimal(table: LatencyTable, damage: Damage, share: float) -> bool:
    best = brute_force(table, damage, share)
    try:
        choice = table.choose(share, damage)
    except PlanError:
        return best is None
    return best == total(table, choice, damage) and table.predicted(choice) <= share * (1 + 1e-6)


COUNT = st.integers(1, 60)
OPTIONS = st.lists(st.tuples(COUNT, st.integers(0, 30)), max_size=4)
# The cheapest second is saved in `a`; with it the rest must come from the dear option of `b`.
TRAP = (10, [(60, [(50, 1)]), (60, [(35, 10), (20, 100)])], 72)


@examples(100, derandomize=True)
@given(
    rest=st.integers(0, 20),
    layers=st.lists(st.tuples(COUNT, OPTIONS), min_size=1, max_size=4),
    percent=st.integers(1, 100),
)
@example(*TRAP)
def test_the_choice_is_the_best_of_all(
    rest: int, layers: list[tuple[int, list[tuple[int, int]]]], percent: int
) -> None:
    table = table_of(rest, *((float(dense), [float(s) for s, _ in options]) for dense, options in layers))
    damage = {
        layer.name: [float(d) for _, d in options] for layer, (_, options) in zip(table.layers, layers, strict=True)
    }
    assert is_optimal(table, damage, percent / 100)


def test_control_a_greedy_choice_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(0.0, (50.0, [40.0, 20.0]), (50.0, [25.0]))
    damage = {"a": [1.0, 40.0], "b": [30.0]}
    assert is_optimal(table, damage, 0.75)

    def greedy(self: LatencyTable, share: float, damage: Damage) -> dict[str, LatencyOption]:
        """The cheapest options first, each layer once."""
        steps = sorted(
            (cost / (layer.seconds - option.seconds), layer.name, i)
            for layer in self.layers
            for i, (option, cost) in enumerate(zip(layer.options, damage[layer.name], strict=True))
        )
        choice: dict[str, LatencyOption] = {}
        for _, name, i in steps:
            if self.predicted(choice) > share and name not in choice:
                choice[name] = next(layer for layer in self.layers if layer.name == name).options[i]
        return choice

    monkeypatch.setattr(LatencyTable, "choose", greedy)
    assert not is_optimal(table, damage, 0.75)


def test_small_damages_count() -> None:
    """The solver ends at an absolute gap, which must not hide the difference."""
    table = table_of(0.0, (1.0, [0.5]), (1.0, [0.5]), (1.0, [0.1]))
    damage = {"a": [2e-7], "b": [1e-7], "c": [1.0]}
    assert table.choose(0.9, damage).keys() == {"b"}
    # control: the other way round the other one is chosen
    assert table.choose(0.9, damage | {"b": [3e-7]}).keys() == {"a"}


def test_many_layers_are_no_trouble() -> None:
    random = np.random.default_rng(0)
    layers = [(1.0, list(random.uniform(0.2, 1.1, 21))) for _ in range(8)]
    one = table_of(0.5, *layers)
    many = tuple(replace(layer, name=f"{layer.name}{i}") for i in range(20) for layer in one.layers)
    table = replace(one, layers=many, seconds=160.5)
    damage = {layer.name: [float(1 / o.seconds + random.uniform()) for o in layer.options] for layer in many}
    choice = table.choose(0.6, damage)
    assert 0.599 < table.predicted(choice) <= 0.6 * (1 + 1e-6)


def test_a_share_of_one_is_the_dense_network() -> None:
    table = table_of(1.0, (4.0, [2.0]))
    assert table.choose(1, {"a": [0.0]}) == {}
    assert table.predicted({}) == 1
    # control: any share below one needs the option
    assert table.choose(0.99, {"a": [5.0]}).keys() == {"a"}


def test_options_that_are_no_faster_are_dropped() -> None:
    table = table_of(0.0, (4.0, [5.0, 4.0, 3.0]))
    assert table.choose(0.9, {"a": [0.0, 0.0, 9.0]})["a"].seconds == 3.0


def test_a_share_out_of_reach_says_the_least_and_that_is_in_reach() -> None:
    table = table_of(1.0, (3.0, [1.0, 2.0]), (3.0, [3.5]))
    with pytest.raises(
        PlanError, match=r"latency=0\.5 cannot be reached: .* 2 conv.*, 0\.7143 of the dense time remains"
    ):
        table.choose(0.5, {"a": [1.0, 1.0], "b": [0.0]})
    assert table.predicted(table.choose(0.7143, {"a": [1.0, 1.0], "b": [0.0]})) == pytest.approx(5 / 7)
    assert replace(table, layers=(), rest=7.0).choose(1.0, {}) == {}
    with pytest.raises(PlanError, match="the 0 convolutions"):
        replace(table, layers=(), rest=7.0).choose(0.9, {})


@pytest.mark.parametrize("share", [0, -0.5, 1.01, math.nan, math.inf, "0.5", True, None])
def test_shares_out_of_range(share: Any) -> None:
    with pytest.raises(PlanError, match=r"latency is .*; it must be a share in \(0, 1\]"):
        table_of(1.0, (3.0, [1.0])).choose(share, {"a": [1.0]})


# --- the correction ---------------------------------------------------------------------------------------------------

FINE = table_of(10.0, *((10.0, [10.0 - step / 4 for step in range(1, 36)]) for _ in range(8)))
FINE_DAMAGE = {layer.name: [(10 - o.seconds) ** 2 for o in layer.options] for layer in FINE.layers}


def meet(
    table: LatencyTable, share: float, damage: Damage, measure: Callable[[Mapping[str, LatencyOption]], float]
) -> dict[str, LatencyOption]:
    meeting = Meeting(
        share,
        choose=lambda budget: table.choose(budget, damage),
        predicted=table.predicted,
        damage=lambda choice: total(table, choice, damage),
        measure=measure,
        least=table.least,
    )
    return meeting.met().choice


def tried(factor: float, share: float = 0.6) -> tuple[list[float], float]:
    """The shares measured on a machine that is off by a factor, and that of the result."""
    seen = []

    def measure(choice: Mapping[str, LatencyOption]) -> float:
        seen.append(factor * FINE.predicted(choice))
        return seen[-1]

    result = meet(FINE, share, FINE_DAMAGE, measure)
    return seen, factor * FINE.predicted(result)


@pytest.mark.parametrize("factor, attempts", [(1.0, 1), (1.01, 1), (1.04, 2), (1.2, 2), (0.8, 2)])
def test_the_budget_is_corrected_by_what_was_measured(factor: float, attempts: int) -> None:
    seen, reached = tried(factor)
    assert len(seen) == attempts
    assert reached == pytest.approx(0.6, rel=0.02)


def test_control_without_corrections_the_share_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_meeting, "CORRECTIONS", 0)
    seen, reached = tried(1.2)
    assert len(seen) == 1
    assert reached > 0.7


def test_at_most_three_corrections_and_the_fastest_if_none_will_do() -> None:
    shares = iter((0.9, 0.7, 0.8, 0.75))
    choices = []

    def measure(choice: Mapping[str, LatencyOption]) -> float:
        choices.append(dict(choice))
        return next(shares)

    assert meet(FINE, 0.6, FINE_DAMAGE, measure) == choices[1]
    assert next(shares, None) is None


def test_of_the_choices_that_meet_the_share_the_least_damage_counts() -> None:
    shares = iter((0.4, 0.7, 0.61))
    choices = []

    def measure(choice: Mapping[str, LatencyOption]) -> float:
        choices.append(dict(choice))
        return next(shares)

    assert meet(FINE, 0.6, FINE_DAMAGE, measure) == choices[2]
    assert total(FINE, choices[2], FINE_DAMAGE) < total(FINE, choices[0], FINE_DAMAGE)


def test_the_dense_network_needs_no_measurement() -> None:
    assert meet(FINE, 1.0, FINE_DAMAGE, lambda choice: pytest.fail("measured")) == {}


# --- patterns ---------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A convolution below another one's name, and names that look like patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(32, 32, 1)
        self.a.add_module("b", nn.Conv2d(32, 32, 1))
        self.add_module("[ab]", nn.Conv2d(32, 32, 1))
        self.add_module("c*", nn.Conv2d(32, 32, 1))
        self.add_module("cd", nn.Conv2d(32, 32, 1))


def option(groups: int, ratio: float, form: Any = "overlap") -> LatencyOption:
    return LatencyOption(form, groups, 16, ratio, 1.0)


CHOICE = {"a": option(2, 0.5), "a.b": option(4, 0.625), "[ab]": option(8, 0.25), "c*": option(4, 0.375)}


def planned(ratios: Mapping[str, float], groups: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    planner = Planner(Nested(), Request(ratio=ratios, groups=groups, form="overlap"))
    return {name: (shape.groups, shape.kept) for name, shape in planner.shapes.items()}


def test_each_pattern_matches_one_module() -> None:
    layers = tuple(LayerLatency(name, 32, 32, 1.0, ()) for name in ("a", "a.b", "[ab]", "c*", "cd"))
    table = replace(FINE, layers=layers)
    expected = {"a": (2, 16), "a.b": (4, 12), "[ab]": (8, 24), "c*": (4, 20)}
    assert planned(*as_patterns(table, CHOICE)) == expected
    without = {name: chosen for name, chosen in CHOICE.items() if name != "a.b"}  # dense below a pruned one
    del expected["a.b"]
    assert planned(*as_patterns(table, without)) == expected


def test_control_plain_names_match_several_modules() -> None:
    ratios, groups = {n: o.ratio for n, o in CHOICE.items()}, {n: o.groups for n, o in CHOICE.items()}
    found = planned(ratios, groups)
    assert found["a.b"] == found["a"]
    assert found["cd"] == found["c*"]


# --- the damage -------------------------------------------------------------------------------------------------------


NAMES = ["first", "twice", "down", "point"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    return wind(monkeypatch, tmp_path / "cache")


@pytest.fixture
def remembered(clock: Clock) -> LatencyTable:
    """The table of the net, whose times are in the cache."""
    return fxprune.measure_latency(net(), example_inputs=image(), target="cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    """The same, measured once for all that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        wind(patch, tmp_path_factory.mktemp("cache"))
        return fxprune.measure_latency(net(), example_inputs=image(), target="cpu")


def test_the_damage_of_other_groups_is_what_the_weights_lose(table: LatencyTable) -> None:
    model = net()
    found = damages(model, table, fxprune.measure_sensitivity(model, groups=2))
    for groups in (2, 4, 8):
        direct = {layer.name: layer for layer in fxprune.measure_sensitivity(model, groups=groups).layers}
        for layer in table.layers:
            for way, damage in zip(layer.options, found[layer.name], strict=True):
                expected = direct[layer.name].damage[way.kept - 1]
                if way.groups == groups and way.form == "overlap":
                    assert damage == pytest.approx(expected)
                elif way.groups == groups:
                    assert (
                        damage >= 0.99 * expected
                    )  # the groups of the overlap form are those for half of the channels


def test_the_damage_of_the_partition_form_is_what_its_masks_lose(table: LatencyTable) -> None:
    model = net()
    found = damages(model, table, fxprune.measure_sensitivity(model, groups=4))
    plan = fxprune.make_plan(model, 0.75, groups=4, form="partition", example_inputs=image())
    for layer in table.layers:
        [i] = [i for i, o in enumerate(layer.options) if (o.form, o.ratio) == ("partition", 0.75)]
        weight = model.get_parameter(f"{layer.name}.weight").detach().double()
        lost = weight[~plan.layers[layer.name].mask()].square().sum() / weight.square().sum()
        assert found[layer.name][i] == pytest.approx(float(lost))


def test_a_layer_without_sensitivity(table: LatencyTable) -> None:
    known = fxprune.measure_sensitivity(net(), ignore="down")
    with pytest.raises(PlanError, match="sensitivity: down is not in it; measure it"):
        damages(net(), table, known)


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_layer_and_option_is_timed(table: LatencyTable) -> None:
    assert [layer.name for layer in table.layers] == NAMES
    for layer in table.layers:
        assert layer.seconds > 0
        assert {o.groups for o in layer.options} == {2, 4, 8}
        assert {o.ratio for o in layer.options} == set(latency_measure.RATIOS)
        partition = {(o.groups, o.ratio) for o in layer.options if o.form == "partition"}
        assert partition == {(2, 0.5), (4, 0.75), (8, 0.875)}
        calls_ = 2 if layer.name == "twice" else 1
        for way in layer.options:
            macs = (layer.seconds - calls_ * 1e-6) * way.kept / layer.channels
            assert way.seconds == pytest.approx(macs + calls_ * 1e-6)
    by_name = {layer.name: layer for layer in table.layers}
    assert by_name["twice"].seconds == pytest.approx(2 * by_name["first"].seconds)
    assert table.predicted({}) == pytest.approx(1)


def test_times_are_remembered(clock: Clock, remembered: LatencyTable) -> None:
    before = clock.races
    assert fxprune.measure_latency(net(), example_inputs=image()) == remembered
    assert clock.races == before + 2  # of the whole dense graph, and of its layers against it
    fxprune.measure_latency(net(), example_inputs=image(2))
    assert clock.races > before + 4  # control: another batch size is another time


def test_a_busy_moment_changes_no_share(
    clock: Clock, remembered: LatencyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of layers are remembered from a quiet hour, that of the network is not."""
    table = remembered
    clock.busy = 3.0
    assert fxprune.measure_latency(net(), example_inputs=image()).least == pytest.approx(table.least)
    layers = sum(layer.seconds for layer in table.layers)
    monkeypatch.setattr(latency_measure, "_rest_share", lambda *_: 1 - layers / (3 * table.seconds))  # control
    assert fxprune.measure_latency(net(), example_inputs=image()).least > 2 * table.least


def test_groups_and_ignore(clock: Clock) -> None:
    table = fxprune.measure_latency(
        net(), example_inputs=image(), groups={"first": 16, "point": "auto", "twice": 1}, ignore="down"
    )
    assert {layer.name: {o.groups for o in layer.options} for layer in table.layers} == {
        "first": {16},
        "twice": {1},
        "point": {2, 4, 8},
    }
    assert (16, 1 - 1 / 16) in {(o.groups, o.ratio) for o in table.layers[0].options if o.form == "partition"}


def test_measuring_changes_nothing(clock: Clock) -> None:
    model = net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    fxprune.measure_latency(model, example_inputs=image())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_real_times_are_positive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(measurements, "TURN_SECONDS", 1e-5)
    monkeypatch.setattr(measurements, "ROUNDS", 2)
    monkeypatch.setattr(latency_measure, "RATIOS", (0.5,))
    for module in (forms, layer_times):
        monkeypatch.setattr(module, "ENGINES", (LibraryConv2d,))
    table = fxprune.measure_latency(net(), example_inputs=image(), groups=2)
    assert [layer.name for layer in table.layers] == NAMES
    assert all(way.seconds > 0 for layer in table.layers for way in layer.options)


def test_the_printed_table(table: LatencyTable) -> None:
    text = str(table)
    for name in NAMES:
        assert f"\n{name}" in text
    assert f"{1e3 * table.seconds:.2f} ms dense" in text
    assert f"at least {table.least:.2f} of it must remain" in text
    assert "float32 on cpu" in text


def test_json_gives_an_equal_table(table: LatencyTable) -> None:
    assert LatencyTable.from_json(table.to_json()) == table
    other = replace(table, seconds=2 * table.seconds)
    assert LatencyTable.from_json(other.to_json()) != table  # control


def damaged(change: Callable[[Any], object]) -> str:
    data = json.loads(FINE.to_json())
    change(data)
    return json.dumps(data)


DAMAGED = {
    "no JSON": "{",
    "a list": "[]",
    "no layers": damaged(lambda data: data.pop("layers")),
    "an unknown field": damaged(lambda data: data.update(speed=1)),
    "negative time": damaged(lambda data: data.update(seconds=-1)),
    "negative rest": damaged(lambda data: data.update(rest=-1)),
    "time of a layer": damaged(lambda data: data["layers"][0].update(seconds=0)),
    "no number": damaged(lambda data: data["layers"][0]["options"][0].update(seconds="fast")),
    "infinite": damaged(lambda data: data["layers"][0]["options"][0].update(seconds=math.inf)),
    "ratio": damaged(lambda data: data["layers"][0]["options"][0].update(ratio=1)),
    "groups": damaged(lambda data: data["layers"][0]["options"][0].update(groups=0)),
    "form": damaged(lambda data: data["layers"][0]["options"][0].update(form="round")),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_json(name: str) -> None:
    with pytest.raises(PlanError, match=r"the text is no latency table: .*; write it with LatencyTable\.to_json"):
        LatencyTable.from_json(DAMAGED[name])


def test_the_json_that_was_damaged_was_fine() -> None:
    assert LatencyTable.from_json(damaged(lambda data: None)) == FINE


# --- whole compilations -----------------------------------------------------------------------------------------------


def shapes_of(compiled: nn.Module) -> dict[str, tuple[str, int, float]]:
    layers = fxprune.report(compiled).layers
    return {layer.name: (layer.form, layer.groups, layer.reached_ratio) for layer in layers if layer.form != "dense"}


@pytest.mark.parametrize("share", fewer([0.8, 0.6, 0.4], [0.4]))
def test_the_compiled_network_reaches_its_share(clock: Clock, table: LatencyTable, share: float) -> None:
    model = net()
    compiled = fxprune.compile(model, latency=share, target="cpu", example_inputs=image(), latency_table=table)
    told = fxprune.acceleration_report(compiled)
    assert share * 0.8 < told.relative <= share * 1.05
    assert f"latency: asked for {share:.2f} of the best dense time in torch, reached {told.relative:.2f}" in str(told)
    assert shapes_of(compiled)
    # control: half of each layer is another share
    half = fxprune.acceleration_report(fxprune.compile(model, 0.5, target="cpu", example_inputs=image()))
    assert not share * 0.8 < half.relative <= share * 1.05 or share == 0.6
    assert not half.notes


def test_the_table_is_measured_if_absent(clock: Clock, table: LatencyTable) -> None:
    options: dict[str, Any] = {"latency": 0.6, "target": "cpu", "example_inputs": image()}
    plan = fxprune.make_plan(net(), **options)
    assert plan == fxprune.make_plan(net(), latency_table=table, **options)
    assert plan != fxprune.make_plan(net(), 0.5, target="cpu")  # control


def test_a_network_that_is_slower_than_the_sum_of_its_layers(
    clock: Clock, table: LatencyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.factor = 1.2
    options: dict[str, Any] = {"latency": 0.6, "target": "cpu", "example_inputs": image(), "latency_table": table}
    found = fxprune.acceleration_report(fxprune.compile(net(), **options))
    assert found.relative <= 0.6 * 1.05
    monkeypatch.setattr(latency_meeting, "CORRECTIONS", 0)  # control
    assert fxprune.acceleration_report(fxprune.compile(net(), **options)).relative > 0.6 * 1.05


def test_a_share_of_one_prunes_nothing(clock: Clock, table: LatencyTable) -> None:
    with pytest.warns(fxprune.NothingRewrittenWarning):
        compiled = fxprune.compile(net(), latency=1.0, target="cpu", example_inputs=image(), latency_table=table)
    assert shapes_of(compiled) == {}


def test_a_layer_that_matters_stays(clock: Clock, table: LatencyTable) -> None:
    """Of two equal layers the one whose kernels are alike is kept, the one with few large ones is pruned."""
    model = net()
    with torch.no_grad():
        model.twice.weight[:, 8:] *= 1e-3
    options: dict[str, Any] = {"latency": 0.7, "target": "cpu", "example_inputs": image(), "latency_table": table}
    found = shapes_of(fxprune.compile(model, **options))
    assert found["twice"][2] >= 0.625
    assert found["twice"][2] > found.get("first", ("dense", 1, 0.0))[2]


@pytest.mark.parametrize("form", fewer(["overlap", "auto"], ["auto"]))
def test_form_groups_and_ignore(clock: Clock, table: LatencyTable, form: FormChoice) -> None:
    layers = (replace(layer, options=tuple(o for o in layer.options if o.ratio == 0.5)) for layer in table.layers)
    halves = replace(table, layers=tuple(layers))
    options: dict[str, Any] = {"target": "cpu", "example_inputs": image(), "latency_table": halves, "groups": 2}
    plan = fxprune.make_plan(net(), latency=0.6, form=form, ignore="point", **options)
    assert plan.layers
    assert "point" not in plan.layers
    expected = (2, "overlap" if form == "overlap" else "partition")
    assert {(kernels.groups, kernels.form) for kernels in plan.layers.values()} == {expected}


def test_calibration_and_sensitivity(clock: Clock, table: LatencyTable) -> None:
    model, data = net(), image(4)
    known = fxprune.measure_sensitivity(model, calibration=data, example_inputs=image())
    options: dict[str, Any] = {"latency": 0.6, "target": "cpu", "example_inputs": image(), "latency_table": table}
    options["method"] = "cocluster"  # whose choice takes less time
    compiled = fxprune.compile(model, calibration=data, **options)
    assert fxprune.acceleration_report(compiled).relative <= 0.6 * 1.05
    assert shapes_of(fxprune.compile(model, calibration=data, sensitivity=known, **options)) == shapes_of(compiled)


def bad(**options: Any) -> dict[str, Any]:
    return {"latency": 0.6, "target": "cpu", "example_inputs": image()} | options


CONTRADICTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ratio": (bad(ratio=0.5), PlanError, r"ratio=0\.5 is what each layer loses, and latency=0\.6 what may remain"),
    "no target": (bad(target=None), PlanError, r"latency=0\.6 needs the device to be fast on; pass target='cpu'"),
    "no inputs": (bad(example_inputs=None), AccelerationError, "needs example_inputs to time the model on"),
    "another device": (bad(target="cuda"), AccelerationError, "target='cuda', but the model is on cpu"),
    "unknown target": (bad(target="tpu"), PlanError, "target is 'tpu'"),
    "partition": (bad(form="partition"), PlanError, "needs ratios of any value"),
    "out of range": (bad(latency=1.5), PlanError, r"latency is 1\.5; it must be a share in \(0, 1\]"),
    "out of reach": (bad(latency=0.01, latency_table=FINE), PlanError, "a is a convolution of 64 filters"),
    "table alone": (bad(latency=None, latency_table=FINE), PlanError, "latency_table is for a share of the latency"),
    "table as text": (bad(latency_table="{}"), PlanError, r"latency_table is a str; .*LatencyTable\.from_json"),
    "sensitivity as text": (bad(sensitivity="{}"), PlanError, "sensitivity is a str"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(clock: Clock, name: str) -> None:
    options, error, match = CONTRADICTIONS[name]
    for use in (fxprune.compile, fxprune.make_plan):
        with pytest.raises(error, match=match):
            use(net(), **options)


def test_out_of_reach(clock: Clock, table: LatencyTable) -> None:
    options: dict[str, Any] = {"target": "cpu", "example_inputs": image(), "latency_table": table}
    with pytest.raises(PlanError, match=rf"latency=0\.05 cannot be reached: .* {math.ceil(1e4 * table.least) / 1e4}"):
        fxprune.make_plan(net(), latency=0.05, **options)


def test_a_table_of_something_else(table: LatencyTable) -> None:
    options: dict[str, Any] = {"latency": 0.6, "target": "cpu", "latency_table": table}
    remedy = r".*; measure again with fxprune\.measure_latency"
    with pytest.raises(
        PlanError, match=r"measured for \(\(1, 3, 12, 12\),\), but this is \(\(2, 3, 12, 12\),\)" + remedy
    ):
        fxprune.make_plan(net(), example_inputs=image(2), **options)
    with pytest.raises(PlanError, match="measured for float32, but this is float64" + remedy):
        fxprune.make_plan(net().double(), example_inputs=image().double(), **options)
    with pytest.raises(
        PlanError, match="first is a convolution of 32 filters and 32 channels, but Net has one of 48" + remedy
    ):
        fxprune.make_plan(Net(48).eval(), example_inputs=image(), **options)
    with pytest.raises(PlanError, match="first is a convolution of .*, but Sequential has none there" + remedy):
        fxprune.make_plan(nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1)), example_inputs=image(), **options)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of nets in the working directory."""
    monkeypatch.chdir(tmp_path)
    source = "import torch\ndef wide():\n    c = torch.nn.Conv2d\n"
    source += (
        "    return torch.nn.Sequential(c(3, 32, 3), torch.nn.ReLU(), c(32, 32, 3), torch.nn.ReLU(), c(32, 32, 3))\n"
    )
    Path("latency_nets.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def test_the_command_line_plans_by_latency(clock: Clock, nets: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", "latency_nets:wide", "--input-size", "1,3,16,16", "--json", "--latency", "0.6"]
    assert cli.main([*arguments, "--target", "cpu", "-o", "wide.pt"]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert 0.5 < report["macs_pruned"] / report["macs_dense"] <= 0.6 * 1.05
    assert Path("wide.pt").is_file()
    assert cli.main(arguments) == 2
    assert "latency=0.6 needs the device to be fast on" in capsys.readouterr().err
    assert cli.main([*arguments, "--target", "cpu", "--ratio", "0.5"]) == 2
    assert "pass a ratio or budgets" in capsys.readouterr().err
    assert cli.main([*arguments, "--target", "cpu", "--runtime", "tensorrt"]) == 2
    assert "latency for runtime='tensorrt': fxprune does not run it" in capsys.readouterr().err


def test_what_the_solver_prints_is_kept_off_the_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    libc.printf(b"seen\n")
    libc.fflush(None)
    with silent():
        libc.printf(b"spoils\n")
    print("json")
    assert capfd.readouterr().out.splitlines() == ["seen", "json"]


# --- what it shows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.usefixtures("clock")
def test_all_that_takes_long_is_one_sentence_and_one_bar(
    with_data: bool, granularity: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    begin = Run.begin

    def noted(run: Run, stage: str, passes: int = 1) -> None:
        begun.append(stage)
        assert stage in run.seconds or not with_data, "it was foreseen; by weights alone it is over at once"
        begin(run, stage, passes)

    monkeypatch.setattr(Run, "begin", noted)
    data: dict[str, Any] = {"calibration": image(40)} if with_data else {}
    asked: dict[str, Any] = {"latency": 0.6, "target": "cpu", "granularity": granularity, "example_inputs": image()}
    fxprune.make_plan(net(), progress=True, **asked, **data)
    said, *bars = capsys.readouterr().err.splitlines()
    assert said.startswith("about ")
    assert "timing" in begun
    order = ("sensitivity", "timing") if granularity == "kernel" and with_data else ("timing",)
    assert [stage for stage in begun if stage in order] == list(order)
    assert bars
    assert not any(name in line for line in bars for name in ("conv/s", "measuring", "planning", "comparing"))
