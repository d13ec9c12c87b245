"""Latency in other runtimes: their tables, on a clock that counts the multiply-accumulates of their ONNX models, and
what is planned with them.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clock_harness import Net, image, net, wind
from onnx_clock_harness import OnnxClock
from products_harness import fewer
from torch import Tensor, nn

import fxprune
from fxprune import AccelerationError, LatencyTable, PlanError
from fxprune.environment import environment
from fxprune.inference.runtimes import OTHERS, RuntimeModel
from fxprune.inference.runtimes.onnx_based import OnnxBased
from fxprune.planning.latency import meeting
from fxprune.planning.latency.layers import InRuntime, check_timed
from fxprune.vocabulary import RuntimeName

READS_ONNX = [
    name
    for name, runtime in OTHERS.items()
    if isinstance(runtime, OnnxBased) and not runtime.obstacle(torch.device("cpu"), torch.float32)
]
each_runtime = pytest.mark.parametrize("runtime", READS_ONNX)
needs_onnx = pytest.mark.skipif("onnxruntime" not in READS_ONNX, reason="needs fxprune[onnx]")


def wound(patch: pytest.MonkeyPatch, cache: Path) -> OnnxClock:
    clock = OnnxClock()
    wind(patch, cache, clock)
    for name in READS_ONNX:
        runtime = OTHERS[name]
        assert isinstance(runtime, OnnxBased)
        clock.watch(patch, runtime.program)
    return clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OnnxClock:
    return wound(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LatencyTable]]:
    """Of the net for both granularities in each runtime, measured once for all that only read them."""
    with pytest.MonkeyPatch.context() as patch:
        wound(patch, tmp_path_factory.mktemp("cache"))
        yield {name: measured(name) for name in READS_ONNX}


def measured(runtime: Any, model: nn.Module | None = None, **options: Any) -> LatencyTable:
    usual: dict[str, Any] = {"example_inputs": image(), "granularity": "auto"}
    usual |= {} if options.get("granularity") == "filter" else {"groups": 2}
    return fxprune.measure_latency(model or net(), runtime=runtime, **{**usual, **options})


# --- the table --------------------------------------------------------------------------------------------------------


@each_runtime
def test_times_are_those_of_layers_without_their_neighbours(tables: dict[str, LatencyTable], runtime: str) -> None:
    table = tables[runtime]
    macs = {"first": 32 * 32 * 9 * 144, "twice": 2 * 32 * 32 * 9 * 144, "down": 64 * 32 * 9 * 36, "point": 64 * 64 * 36}
    assert {layer.name: layer.seconds for layer in table.layers} == pytest.approx(
        {name: 1e-9 * count for name, count in macs.items()}
    )
    for layer in table.layers:
        for option in layer.options:
            assert option.seconds == pytest.approx(layer.seconds * option.kept / layer.channels)
    for grid in table.grids:
        for inputs, row in zip(grid.inputs, grid.seconds, strict=True):
            for filters, seconds in zip(grid.filters, row, strict=True):
                share = inputs / grid.inputs[-1] * filters / grid.filters[-1]
                assert seconds == pytest.approx(grid.dense * share)
    stem = 32 * 3 * 9 * 144
    assert table.seconds == pytest.approx(1e-9 * (sum(macs.values()) + stem) + 1e-6)
    assert table.rest == pytest.approx(1e-9 * stem + 1e-6)


@needs_onnx
def test_control_with_their_neighbours_layers_take_longer(
    clock: OnnxClock, tables: dict[str, LatencyTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InRuntime, "seconds", InRuntime.whole)
    found = measured("onnxruntime", granularity="kernel")
    known = {layer.name: layer.seconds for layer in tables["onnxruntime"].layers}
    assert all(layer.seconds > known[layer.name] + 1e-6 for layer in found.layers)


@each_runtime
def test_a_table_says_where_it_was_made(tables: dict[str, LatencyTable], runtime: str) -> None:
    table = tables[runtime]
    here = environment()
    assert table.runtime == runtime
    assert (table.device, table.dtype, table.memory_format) == ("cpu", "float32", "own")
    assert table.made["cpu"] == here["cpu"]
    assert table.made["threads"] == here["threads"]
    assert runtime in table.made
    assert f"made on {here['cpu']}, {here['instructions']}, {here['threads']} threads, torch" in str(table)
    assert f"{runtime} {table.made[runtime]}" in table.place()
    again = LatencyTable.from_json(table.to_json())
    assert again == table
    assert again.made == table.made
    assert again.is_from_here
    for name in ("cpu", "threads", "instructions"):
        assert not replace(table, made={**table.made, name: "another"}).is_from_here
    assert replace(table, made={}).is_from_here


def test_a_text_of_an_earlier_version_is_a_table_of_pytorch() -> None:
    layer = {"name": "a", "filters": 4, "channels": 4, "seconds": 1.0, "options": []}
    old = {
        "device": "cpu", "dtype": "float32", "memory_format": "contiguous", "input_shapes": [[1, 3, 8, 8]],
        "seconds": 2.0, "rest": 1.0, "layers": [layer],
    }  # fmt: skip
    table = LatencyTable.from_json(json.dumps(old))
    assert (table.runtime, table.grids, table.made) == ("torch", (), {})
    assert "made on a machine that was not noted" in str(table)


@needs_onnx
def test_a_layer_that_was_timed_before_costs_nothing(clock: OnnxClock, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"runtime": "onnxruntime", "granularity": "filter"}
    first = measured(**options)
    before = clock.races
    assert measured(**options) == first
    assert clock.races == before + 2  # in accelerate, and of the whole network against its layers

    class Other(nn.Module):
        """Another network with the same layers."""

        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.net(x) * 2
            return found

    before = clock.races
    measured(model=Other().eval(), **options)
    assert clock.races <= before + 2
    before = clock.races
    runtime = OTHERS["onnxruntime"]
    assert isinstance(runtime, OnnxBased)
    monkeypatch.setattr(runtime.program, "version", staticmethod(lambda: "0.0"))
    measured(**options)
    assert clock.races > before + 6  # control: another version is another time


# --- what is planned --------------------------------------------------------------------------------------------------


@each_runtime
@pytest.mark.parametrize("granularity", fewer(["kernel", "filter"], ["filter"]))
def test_the_share_is_reached_in_the_runtime(
    clock: OnnxClock, tables: dict[str, LatencyTable], runtime: RuntimeName, granularity: Any
) -> None:
    fast = fxprune.compile(
        net(), latency=0.6, runtime=runtime, granularity=granularity, example_inputs=image(),
        latency_table=tables[runtime],
    )  # fmt: skip
    assert isinstance(fast, RuntimeModel)
    assert fast.runtime == runtime
    dense = fxprune.accelerate(net(), image(), runtime=runtime)
    reached = clock.seconds(lambda: fast(image())) / clock.seconds(lambda: dense(image()))
    assert reached == pytest.approx(0.6, rel=0.05)
    told = fxprune.acceleration_report(fast)
    assert f"latency: asked for 0.60 of the best dense time in {runtime}, reached {reached:.2f}" in told.notes
    assert any(f"in {runtime}; 0." in note for note in fxprune.report(fast).notes)
    assert told.runtime == runtime


@needs_onnx
def test_a_runtime_that_is_slower_than_its_layers(
    clock: OnnxClock, tables: dict[str, LatencyTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"runtime": "onnxruntime", "example_inputs": image(), "verify": False}
    options |= {"latency": 0.6, "latency_table": tables["onnxruntime"]}
    clock.factor = 1.2

    def reached() -> float:
        notes = fxprune.acceleration_report(fxprune.compile(net(), **options)).notes
        (note,) = (note for note in notes if note.startswith("latency"))
        return float(note.rpartition(" ")[2])

    assert reached() <= 0.6 * 1.05
    monkeypatch.setattr(meeting, "CORRECTIONS", 0)
    assert reached() > 0.6 * 1.05  # control


@needs_onnx
def test_without_a_latency_it_is_the_form_for_the_runtime(clock: OnnxClock) -> None:
    fast = fxprune.compile(net(), 0.5, runtime="onnxruntime", example_inputs=image())
    assert isinstance(fast, RuntimeModel)
    assert fast.runtime == "onnxruntime"
    assert not [note for note in fxprune.acceleration_report(fast).notes if "latency" in note]
    plan = fxprune.make_plan(net(), 0.5, runtime="onnxruntime", example_inputs=image())
    assert plan == fxprune.make_plan(net(), 0.5, target="cpu", example_inputs=image())


@needs_onnx
def test_a_table_of_another_runtime_is_refused(clock: OnnxClock, tables: dict[str, LatencyTable]) -> None:
    options: dict[str, Any] = {"latency": 0.6, "example_inputs": image(), "latency_table": tables["onnxruntime"]}
    with pytest.raises(PlanError, match="it was measured for onnxruntime, but this is torch; measure again"):
        fxprune.make_plan(net(), target="cpu", **options)
    with pytest.raises(PlanError, match="it was measured for onnxruntime, but this is torch"):
        fxprune.make_plan(net(), target="cpu", granularity="filter", **options)


@pytest.mark.parametrize(
    "runtime, reason",
    [
        ("inductor", "it compiles whole graphs"),
        ("tensorrt", "fxprune does not run it; plan for target='cuda'"),
        ("auto", "a table of times is of one runtime; name one"),
    ],
)
def test_runtimes_without_a_table_say_why(runtime: RuntimeName, reason: str) -> None:
    with pytest.raises(PlanError, match=f"latency for runtime='{runtime}': {reason}"):
        check_timed(runtime)
    with pytest.raises(PlanError, match=reason):
        fxprune.measure_latency(net(), example_inputs=image(), target="cpu", runtime=runtime)
    check_timed("torch")  # control


def test_a_runtime_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(OTHERS["openvino"]), "packages", ("no_such_package",))
    for use in (fxprune.compile, fxprune.make_plan):
        with pytest.raises(AccelerationError, match=r"runtime='openvino': no_such_package not installed; pip install"):
            use(net(), latency=0.6, runtime="openvino", example_inputs=image())
    with pytest.raises(AccelerationError, match="no_such_package not installed"):
        fxprune.compile(net(), 0.5, runtime="openvino", example_inputs=image())


@needs_onnx
def test_another_type_is_refused_before_anything_is_measured(clock: OnnxClock) -> None:
    with pytest.raises(AccelerationError, match="fxprune takes float32 models there, and this one is float64"):
        fxprune.make_plan(net().double(), latency=0.6, runtime="onnxruntime", example_inputs=image().double())
    assert clock.races == 0
