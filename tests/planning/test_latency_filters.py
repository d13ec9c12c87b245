"""Latency for whole filters: times of narrower layers, the filters that meet a share, and both kinds together, on a
clock that counts multiply-accumulates.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clock_harness import Clock, image, net, wind
from products_harness import fewer
from torch import nn

import fxprune
from fxprune import LatencyTable, PlanError
from fxprune.exact.record import record_of
from fxprune.graph.convolutions import convolutions
from fxprune.planning import auto
from fxprune.planning.latency import meeting
from fxprune.planning.latency.grid import LayerGrid, NetworkTimes, step_of, widths

MACS = {"stem": 3 * 9 * 144, "first": 32 * 9 * 144, "twice": 2 * 32 * 9 * 144, "down": 32 * 9 * 36, "point": 64 * 36}
"""Multiply-accumulates of one filter of each layer."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    return wind(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    """Of the net, for both granularities, measured once for all that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        wind(patch, tmp_path_factory.mktemp("cache"))
        return fxprune.measure_latency(net(), example_inputs=image(), target="cpu", granularity="auto")


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_dense_network_takes_all_of_the_time_however_its_layers_add_up(table: LatencyTable) -> None:
    names = [grid.name for grid in table.grids]
    whole, half = np.ones(len(names)), np.full(len(names), 0.5)
    noisy = replace(table, seconds=0.8 * sum(grid.dense for grid in table.grids), rest=0.0, layers=())
    times = noisy.by_width(names)
    assert float(times(whole, whole)) == pytest.approx(1)
    assert float(times(half, half)) < 0.6
    assert float(table.by_width(names)(whole, whole)) == pytest.approx(1)


def test_widths_are_multiples_of_what_is_computed_at_once() -> None:
    assert widths(64, 16) == (16, 32, 48, 64)
    assert widths(512, 16) == (64, 128, 256, 384, 512)
    assert widths(32, 8) == (8, 16, 24, 32)
    assert widths(3, 16) == (1, 2, 3)
    assert widths(100, 8) == (16, 24, 48, 72, 96, 100)  # what is there counts, too
    assert [step_of(size, 16) for size in (512, 64, 63, 32, 16, 8, 4, 3, 1)] == [16, 16, 8, 8, 4, 2, 1, 1, 1]


def test_between_the_points_times_are_interpolated() -> None:
    grid = LayerGrid("a", (8, 16), (8, 24), ((1.0, 2.0), (3.0, 5.0)))
    shares = np.array([8, 16]) / 16
    assert grid.at(shares, np.array([1.0])).tolist() == [2.0, 5.0]
    assert float(grid.at(np.array(0.75), np.array(16 / 24))) == pytest.approx((1 + 2 + 3 + 5) / 4)
    assert float(grid.at(np.array(0.1), np.array(0.1))) == 1.0  # no less than was timed
    single = LayerGrid("b", (3,), (8, 16), ((1.0, 2.0),))
    assert single.at(np.array([0.3, 1.0]), np.array([0.75, 0.5])).tolist() == [1.5, 1.0]
    assert (grid + grid).at(shares, np.array([1.0])).tolist() == [4.0, 10.0]


def test_the_time_of_a_network_is_that_of_its_layers_and_the_rest() -> None:
    grids = (LayerGrid("a", (8, 16), (8,), ((1.0,), (2.0,))), LayerGrid("b", (4,), (8, 16), ((2.0, 6.0),)))
    times = NetworkTimes(tuple(enumerate(grids)), rest=2.0, lanes=8)
    assert float(times(np.ones(3), np.ones(3))) == pytest.approx(1.0)
    many = times(np.array([[1.0, 1.0], [0.5, 1.0], [1.0, 1.0]]), np.array([[1.0, 0.5], [1.0, 1.0], [1.0, 1.0]]))
    assert many.tolist() == pytest.approx([0.6, 0.9])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"inputs": ()}, "inputs of a are"),
        ({"filters": (16, 8)}, r"filters of a are \(16, 8\); they must be positive and ascend"),
        ({"filters": (8, 8)}, "must be positive and ascend"),
        ({"inputs": (0, 8)}, "must be positive and ascend"),
        ({"seconds": ((1.0, 2.0),)}, "must have a time for each number of inputs and of filters"),
        ({"seconds": ((1.0, 2.0), (1.0, 0.0))}, "a time of a is 0"),
        ({"seconds": ((1.0, 2.0), (1.0, "fast"))}, "a time of a is 'fast'"),
    ],
    ids=str,
)
def test_a_grid_checks_itself(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"name": "a", "inputs": (8, 16), "filters": (8, 16), "seconds": ((1.0, 2.0), (3.0, 4.0))}
    LayerGrid(**good)  # control
    with pytest.raises(PlanError, match=message):
        LayerGrid(**good | change)


def test_every_layer_is_timed_at_every_width(table: LatencyTable) -> None:
    grids = {grid.name: grid for grid in table.grids}
    assert grids.keys() == MACS.keys()
    for name, macs in MACS.items():
        grid, conv = grids[name], convolutions(net())[name]
        assert (grid.inputs[-1], grid.filters[-1]) == (conv.in_channels, conv.out_channels)
        assert grid.inputs == ((3,) if name == "stem" else widths(conv.in_channels, 8))
        calls = 2 if name == "twice" else 1
        for inputs, row in zip(grid.inputs, grid.seconds, strict=True):
            for filters, seconds in zip(grid.filters, row, strict=True):
                expected = macs * filters * inputs / conv.in_channels
                assert seconds == pytest.approx(1e-9 * expected + calls * 1e-6)
    assert {layer.name for layer in table.layers} == MACS.keys() - {"stem"}


def test_a_table_is_for_what_was_asked(clock: Clock, table: LatencyTable) -> None:
    filters = fxprune.measure_latency(net(), example_inputs=image(), granularity="filter")
    assert filters.layers == ()
    assert {grid.name for grid in filters.grids} == MACS.keys()
    assert filters.by_width(list(MACS)).rest == pytest.approx(table.by_width(list(MACS)).rest, rel=0.01)
    some = fxprune.measure_latency(net(), example_inputs=image(), granularity="filter", ignore=("down", "point"))
    assert {grid.name: len(grid.filters) for grid in some.grids if grid.name in ("down", "point")} == {"down": 1}
    kernels = fxprune.measure_latency(net(), example_inputs=image())
    assert kernels.grids == ()
    with pytest.raises(PlanError, match=r"it has no times of narrower layers; measure again .*granularity='filter'"):
        fxprune.make_plan(
            net(), latency=0.6, target="cpu", granularity="filter", example_inputs=image(), latency_table=kernels
        )


def test_depthwise_layers_have_one_side(clock: Clock) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=32), nn.ReLU(), nn.Conv2d(64, 8, 1))
    table = fxprune.measure_latency(nn.Sequential(*layers).eval(), example_inputs=image(), granularity="filter")
    sides = {grid.name: (len(grid.inputs), grid.filters) for grid in table.grids}
    assert sides == {"0": (1, widths(32, 8)), "2": (1, widths(64, 8)), "4": (len(widths(64, 8)), (8,))}
    depthwise = table.grids[1]
    for filters, seconds in zip(depthwise.filters, depthwise.seconds[0], strict=True):
        assert seconds == pytest.approx(1e-9 * filters * 9 * 100 + 1e-6)


def test_grids_are_printed_and_kept(table: LatencyTable) -> None:
    text = str(table)
    assert "0.50 wide" in text
    assert "\nstem" in text
    assert LatencyTable.from_json(table.to_json()) == table
    data = json.loads(table.to_json())
    data["grids"][0]["seconds"][0][0] *= 2
    assert LatencyTable.from_json(json.dumps(data)) != table  # control
    changes: tuple[dict[str, Any], ...] = ({"grids": [{}]}, {"lanes": 0}, {"made": "here"})
    for change in changes:
        with pytest.raises(PlanError, match="the text is no latency table"):
            LatencyTable.from_json(json.dumps(data | change))


# --- filters ----------------------------------------------------------------------------------------------------------


def compiled(table: LatencyTable, **asked: Any) -> nn.Module:
    usual: dict[str, Any] = {"latency": 0.6, "target": "cpu", "granularity": "filter"}
    found: nn.Module = fxprune.compile(net(), example_inputs=image(), latency_table=table, **{**usual, **asked})
    return found


def reached(clock: Clock, fast: nn.Module) -> float:
    """By the clock, beside the dense network."""
    dense = fxprune.accelerate(net(), image())
    return clock.seconds(lambda: fast(image())) / clock.seconds(lambda: dense(image()))


def kept(fast: nn.Module) -> dict[str, int]:
    return {layer.name: layer.filters for layer in fxprune.report(fast).layers if layer.filters is not None}


@pytest.mark.parametrize("scope", ["local", "global"])
def test_filters_meet_a_share_of_the_time(clock: Clock, table: LatencyTable, scope: Any) -> None:
    fast = compiled(table, scope=scope)
    share = reached(clock, fast)
    assert share == pytest.approx(0.6, rel=0.05)
    assert f"latency: asked for 0.60 of the best dense time in torch, reached {share:.2f}" in str(
        fxprune.acceleration_report(fast)
    )
    report = fxprune.report(fast)
    assert any(note.startswith("latency: asked for 0.60 of the best dense time in torch; 0.") for note in report.notes)
    assert {count % 8 for count in kept(fast).values()} == {0}
    # control: half of the filters is another share
    half = fxprune.compile(net(), 0.5, granularity="filter", target="cpu", example_inputs=image())
    assert reached(clock, half) < 0.5


def test_round_to_is_kept(clock: Clock, table: LatencyTable) -> None:
    fast = compiled(table, round_to=16)
    assert {count % 16 for count in kept(fast).values()} == {0}
    assert reached(clock, fast) <= 0.6 * 1.05
    # control
    assert {count % 16 for count in kept(compiled(table)).values()} != {0}


def test_a_network_that_is_slower_than_its_layers(
    clock: Clock, table: LatencyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.factor = 1.2
    assert 1.2 * reached(clock, compiled(table)) <= 0.6 * 1.05
    monkeypatch.setattr(meeting, "CORRECTIONS", 0)  # control
    assert 1.2 * reached(clock, compiled(table)) > 0.6 * 1.05


def test_a_share_out_of_reach_and_one_that_needs_nothing(clock: Clock, table: LatencyTable) -> None:
    with pytest.raises(PlanError, match=r"latency=0\.02 cannot be reached by removing filters: .* 0\.\d+ remains"):
        compiled(table, latency=0.02)
    with pytest.warns(fxprune.NothingRewrittenWarning):
        assert kept(compiled(table, latency=1.0)) == {
            name: len(conv.weight) for name, conv in convolutions(net()).items()
        }


def test_the_table_is_measured_if_absent(clock: Clock, table: LatencyTable) -> None:
    options: dict[str, Any] = {"latency": 0.6, "target": "cpu", "example_inputs": image(), "granularity": "filter"}
    assert (
        fxprune.make_plan(net(), **options).removed == fxprune.make_plan(net(), latency_table=table, **options).removed
    )


def test_several_budgets_are_all_kept(clock: Clock, table: LatencyTable) -> None:
    fast = compiled(table, latency=0.8, params=0.5, macs=0.9)
    report = fxprune.report(fast)
    assert report.params_pruned / report.params_dense <= 0.5 * 1.01
    assert reached(clock, fast) < 0.8
    fast = compiled(table, latency=0.5, params=0.9)
    report = fxprune.report(fast)
    assert reached(clock, fast) == pytest.approx(0.5, rel=0.05)
    assert report.params_pruned / report.params_dense < 0.8  # of which less would have done
    with pytest.raises(PlanError, match=r"params=0\.005 cannot be reached"):
        compiled(table, latency=0.9, params=0.005)


def test_a_slow_layer_loses_more(clock: Clock, table: LatencyTable) -> None:
    """Where time is not what MACs say, the filters go that time asks for."""
    slow = replace(
        table,
        seconds=table.seconds + 0.02,
        grids=tuple(
            replace(grid, seconds=tuple(tuple(30 * s for s in row) for row in grid.seconds))
            if grid.name == "point"
            else grid
            for grid in table.grids
        ),
        made={"cpu": "another"},  # which is not measured here
    )
    data = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"scope": "global", "calibration": data, "verify": False}
    counts = [
        kept(compiled(which, **options)).get("point", 64) for which in (slow, replace(table, made={"cpu": "another"}))
    ]
    assert counts[0] < counts[1]


# --- filters and kernels ----------------------------------------------------------------------------------------------


NAMES = ["kernels alone", "filters alone", *auto.SPLITS, auto.BRANCHES_FIRST, auto.PROGRAM]


@pytest.mark.parametrize("name", fewer(NAMES, [NAMES[2], auto.PROGRAM]))
def test_every_division_meets_the_share(
    clock: Clock, table: LatencyTable, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def judged(agreements: Any) -> str:
        if "kernels alone" not in agreements:
            return next(iter(agreements))
        found.append(list(agreements))
        return name

    monkeypatch.setattr(auto, "best", judged)
    data = image(8)
    fast = compiled(table, granularity="auto", calibration=data, method="cocluster", criterion="l2", verify=True)
    assert found[-1] == NAMES  # it has a branch, which alone is not enough, and the program keeps it
    assert reached(clock, fast) == pytest.approx(0.6, rel=0.07)
    notes = fxprune.report(fast).notes
    assert any(f"{name} (taken)" in note for note in notes)
    if name not in (auto.BRANCHES_FIRST, auto.PROGRAM):
        grouped = {layer.name for layer in fxprune.report(fast).layers if layer.groups > 1}
        assert bool(grouped) == (name != "filters alone")
        narrower = {name for name, count in kept(fast).items() if count < convolutions(net())[name].out_channels}
        assert bool(narrower) == (name != "kernels alone")


def elsewhere(table: LatencyTable) -> LatencyTable:
    return replace(table, made={"cpu": "another", "date": "2026-01-01"})


@pytest.mark.parametrize("granularity", fewer(["kernel", "filter"], ["filter"]))
def test_a_table_of_another_machine_plans_for_that(clock: Clock, table: LatencyTable, granularity: Any) -> None:
    clock.factor = 2.0  # what is measured here says nothing of it
    options: dict[str, Any] = {"latency": 0.6, "target": "cpu", "granularity": granularity, "example_inputs": image()}
    plan = fxprune.make_plan(net(), latency_table=elsewhere(table), **options)
    assert "not measured here, for the table is of another machine (another, " in plan.remarks[0]
    clock.factor = 1.0
    here = fxprune.make_plan(net(), latency_table=table, **options)
    assert (plan.layers, plan.removed) == (here.layers, here.removed)
    clock.factor = 2.0
    corrected = fxprune.make_plan(net(), latency_table=table, **options)  # control
    assert (corrected.layers, corrected.removed) != (here.layers, here.removed)


def test_a_table_of_another_machine_is_enough_for_the_program(clock: Clock, table: LatencyTable) -> None:
    clock.factor = 2.0  # what is measured here says nothing of it
    plan = fxprune.make_plan(
        net(), latency=0.6, target="cpu", granularity="auto", example_inputs=image(), calibration=image(8),
        latency_table=elsewhere(table), criterion="l2",
    )  # fmt: skip
    (told,) = [remark for remark in plan.remarks if remark.startswith(f"{auto.PROGRAM}: ")]
    assert re.search(r"; 0\.(59|60) by the times of single layers, not measured here", told)
    refused = [remark for remark in plan.remarks if "has to be timed anew" in remark]
    assert len(refused) == len(auto.SPLITS)


def test_the_program_is_corrected_by_the_whole_network(clock: Clock, table: LatencyTable) -> None:
    clock.factor = 1.2
    fast = compiled(table, granularity="auto", calibration=image(8), method="cocluster", criterion="l2")
    notes = [note for note in fxprune.report(fast).notes if note.startswith(f"{auto.PROGRAM}: ")]
    predicted, measured = (float(n) for n in re.findall(r"0\.\d\d(?= by the| when the)", notes[0]))
    assert measured <= 0.6 * 1.05
    assert measured == pytest.approx(1.2 * predicted, rel=0.04)


def test_the_record_keeps_what_was_told(clock: Clock, table: LatencyTable) -> None:
    fast = compiled(table)
    remarks: Callable[[nn.Module], tuple[str, ...]] = lambda model: record_of(model).plan.remarks  # noqa: E731
    assert fxprune.report(fast).notes
    plan = fxprune.make_plan(
        net(), latency=0.6, target="cpu", granularity="filter", example_inputs=image(), latency_table=table
    )
    assert plan.remarks == remarks(fxprune.rewrite(fxprune.mask(net(), plan), plan, image()))
