"""Planning for int8: tables of quantized layers, on a clock on which integers make dense convolutions four times as
fast and leave grouped ones as they are, and what is planned with them.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from clock_harness import Clock, image, net, wind
from onnx_clock_harness import OnnxClock, macs_of

import fxprune
from fxprune import AccelerationError, CalibrationError, LatencyTable, PlanError
from fxprune.inference.runtimes import RuntimeModel
from fxprune.inference.runtimes.int8_tools import IN_INTEGERS, OnnxRuntimeInt8
from fxprune.inference.runtimes.onnxruntime import OnnxRuntimeProgram
from fxprune.planning.latency import grid, measure

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(
        bool(IN_INTEGERS["onnxruntime"].obstacle(torch.device("cpu"), torch.float32)), reason="needs fxprune[onnx]"
    ),
]
GAIN = 4


def price(serialized: bytes) -> float:
    """A network of nothing but convolutions that pass channels on is all that has groups and is cheap."""
    return macs_of(serialized, lambda groups, is_int8: 1 / GAIN if is_int8 and groups == 1 else 1.0)


def wound(patch: pytest.MonkeyPatch, cache: Any) -> OnnxClock:
    clock = OnnxClock(price)
    wind(patch, cache, clock)
    clock.watch(patch, OnnxRuntimeProgram)
    patch.setattr(measure, "RATIOS", (1 / 2, 3 / 4))
    patch.setattr(grid, "SHARES", (1 / 2, 1))
    return clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Clock:
    return wound(monkeypatch, tmp_path / "cache")


def measured(**options: Any) -> LatencyTable:
    return fxprune.measure_latency(net(), example_inputs=image(), runtime="onnxruntime", groups=2, **options)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str | None, LatencyTable]]:
    """In float and in integers, measured once for all that only read them."""
    with pytest.MonkeyPatch.context() as patch:
        wound(patch, tmp_path_factory.mktemp("cache"))
        precisions: tuple[Any, ...] = (None, "int8")
        yield {precision: measured(precision=precision) for precision in precisions}


def test_layers_are_timed_in_integers(tables: dict[str | None, LatencyTable]) -> None:
    floats, integers = tables[None], tables["int8"]
    assert (floats.dtype, integers.dtype, integers.runtime) == ("float32", "int8", "onnxruntime")
    for layer, other in zip(floats.layers, integers.layers, strict=True):
        assert other.seconds == pytest.approx(layer.seconds / GAIN)
        for option, known in zip(other.options, layer.options, strict=True):
            assert (option.form, option.kept) == (known.form, known.kept)
            # Split into dense convolutions it gains too; the grouped form does not, and is not chosen.
            assert option.seconds == pytest.approx(known.seconds / GAIN)
    assert "onnxruntime" in integers.made
    again = LatencyTable.from_json(integers.to_json())
    assert again == integers
    assert json.loads(integers.to_json())["dtype"] == "int8"


def test_the_planner_knows_what_gains_nothing(
    clock: OnnxClock, tables: dict[str | None, LatencyTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.planning.latency.layers.SPLIT", "pruned grouped")  # the machine knows no other form
    grouped = measured(precision="int8")
    for layer in grouped.layers:
        half = next(option for option in layer.options if option.ratio == 0.5)
        assert half.seconds == pytest.approx(2 * layer.seconds), "half of the work at a quarter of the speed"
    assert grouped.least == pytest.approx(
        (grouped.rest + sum(layer.least for layer in grouped.layers)) / grouped.seconds
    )
    options: dict[str, Any] = {"example_inputs": image(), "runtime": "onnxruntime", "latency": 0.7, "groups": 2}
    with pytest.raises(PlanError, match=r"latency=0\.7 cannot be reached"):
        fxprune.make_plan(net(), precision="int8", latency_table=grouped, **options)
    plan = fxprune.make_plan(net(), latency_table=tables[None], **options)
    assert plan.layers, "control: in float there is a plan"


def test_the_share_is_reached_quantized(clock: OnnxClock, tables: dict[str | None, LatencyTable]) -> None:
    images = image(32)
    fast = fxprune.compile(
        net(), latency=0.6, runtime="onnxruntime", precision="int8", granularity="filter", calibration=images,
        example_inputs=image(), verify=False,
    )  # fmt: skip
    assert isinstance(fast, RuntimeModel)
    assert fast.runtime == "onnxruntime, int8"
    report = fxprune.acceleration_report(fast)
    assert report.dtype == "int8"
    (note,) = (note for note in report.notes if note.startswith("latency"))
    assert note.startswith("latency: asked for 0.60 of the best dense time in onnxruntime in int8, reached 0.")
    assert float(note.rpartition(" ")[2]) == pytest.approx(0.6, rel=0.07)
    assert fast.meta["quantization"].share > 0.9
    dense = fxprune.quantize(fxprune.accelerate(net(), image(), runtime="onnxruntime"), images)
    reached = clock.seconds(lambda: fast(image())) / clock.seconds(lambda: dense(image()))
    assert reached == pytest.approx(0.6, rel=0.07)


def test_without_a_latency_it_is_the_int8_form(clock: OnnxClock) -> None:
    options: dict[str, Any] = {"ratio": 0.5, "calibration": image(32), "example_inputs": image()}
    small = fxprune.compile(net(), runtime="onnxruntime", precision="int8", **options)
    assert small.runtime == "onnxruntime, int8"
    plain = fxprune.compile(net(), share_groups=True, **options)
    x = image(5)
    expected = plain(x).detach()
    gap = float((small(x) - expected).abs().max() / expected.abs().max())
    assert 1e-5 < gap < 0.1
    assert fxprune.report(small).layers


def test_a_table_of_another_precision_is_refused(clock: OnnxClock, tables: dict[str | None, LatencyTable]) -> None:
    options: dict[str, Any] = {"latency": 0.6, "example_inputs": image(), "runtime": "onnxruntime"}
    with pytest.raises(PlanError, match="it was measured for int8, but this is float32; measure again"):
        fxprune.make_plan(net(), latency_table=tables["int8"], **options)
    with pytest.raises(PlanError, match="it was measured for float32, but this is int8; measure again"):
        fxprune.make_plan(net(), latency_table=tables[None], precision="int8", **options)


@pytest.mark.parametrize("runtime", [None, "torch", "inductor", "auto"])
def test_a_runtime_without_integers_is_refused(runtime: Any) -> None:
    options: dict[str, Any] = {"example_inputs": image(), "target": "cpu", "runtime": runtime, "precision": "int8"}
    for use in (fxprune.compile, fxprune.make_plan, fxprune.measure_latency):
        with pytest.raises(PlanError, match=r"precision='int8' is for runtime='onnxruntime' or 'openvino', and the"):
            use(net(), **options)


def test_what_is_no_precision() -> None:
    with pytest.raises(PlanError, match="precision is 'int4'; it must be 'int8' or 'bfloat16', or None for"):
        fxprune.make_plan(net(), 0.5, runtime="onnxruntime", precision="int4", example_inputs=image())  # type: ignore[arg-type]


def test_ranges_need_data() -> None:
    with pytest.raises(CalibrationError, match="precision='int8' measures the ranges of activations on data"):
        fxprune.compile(net(), 0.5, runtime="onnxruntime", precision="int8", example_inputs=image())


def test_a_tool_that_is_absent_is_named_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntimeInt8, "quantizers", ("no_such_package",))
    with pytest.raises(AccelerationError, match=r"precision='int8': no_such_package not installed; pip install 'fxpr"):
        fxprune.make_plan(net(), latency=0.6, runtime="onnxruntime", precision="int8", example_inputs=image())
