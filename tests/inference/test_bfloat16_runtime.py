"""bfloat16 in OpenVINO: a float32 network, called as before, computed in less."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from clock_harness import image, net, wind
from onnx_clock_harness import OnnxClock
from torch import nn

import fxprune
from fxprune.errors import AccelerationError, VerificationError
from fxprune.inference.runtimes import RuntimeModel, contest, openvino
from fxprune.planning.latency import grid, measure

for package in ("openvino", "onnxscript"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
has_it = pytest.mark.skipif(not openvino.has_bfloat16(), reason="this processor has no instructions for bfloat16")


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def fast_and_model(**options: Any) -> tuple[RuntimeModel, nn.Module]:
    model = fxprune.compile(net(), 0.5, example_inputs=image())
    fast = fxprune.accelerate(model, image(), runtime="openvino", remember=False, **options)
    return fast, model


@has_it
def test_it_computes_in_bfloat16(tmp_path: Path) -> None:
    fast, model = fast_and_model(precision="bfloat16")
    x = image(5)
    expected = model(x).detach()
    assert fast(x).dtype == torch.float32
    assert 1e-4 < far(fast(x), expected) < 0.05, "it did compute in less, and not much less"
    report = fxprune.acceleration_report(fast)
    assert (report.dtype, report.runtime) == ("bfloat16", "openvino, bfloat16")
    assert not any("OpenVINO is held" in note for note in report.notes)
    assert "bfloat16" in repr(fast)
    core = openvino.core_of(os.getpid())
    path = str(fast.save(tmp_path / "net.xml")[0])
    options: dict[str, Any] = {"bf16": {"INFERENCE_PRECISION_HINT": "bf16"}, "f32": {"INFERENCE_PRECISION_HINT": "f32"}}
    options["default"] = {}
    for hint, given in options.items():
        found = torch.from_numpy(core.compile_model(path, "CPU", given)([x.numpy()])[0])
        is_same = hint == "bf16" or (hint == "default" and openvino.prefers_bfloat16())
        assert (far(found, fast(x)) < 1e-4) == is_same
    with pytest.raises(AccelerationError, match=r"openvino, bfloat16 has no int8 form here; .* returned, in float32"):
        fxprune.quantize(fast, image(32))


def test_a_model_that_is_in_bfloat16_already_is_not_what_it_takes() -> None:
    with pytest.raises(AccelerationError, match="this one is bfloat16; pass it and its inputs in float32, as"):
        fxprune.accelerate(net().bfloat16(), image().bfloat16(), runtime="openvino", precision="bfloat16")
    with pytest.raises(AccelerationError, match="the model bfloat16 on cpu, the inputs float32 on cpu; move and"):
        fxprune.accelerate(net().bfloat16(), image(), runtime="openvino", precision="bfloat16")


@pytest.mark.skipif(not openvino.prefers_bfloat16(), reason="OpenVINO computes in float32 here by default")
def test_the_float32_form_says_what_it_is_held_to() -> None:
    fast, model = fast_and_model()
    assert far(fast(image(5)), model(image(5)).detach()) < 1e-4
    (note,) = (note for note in fxprune.acceleration_report(fast).notes if "OpenVINO is held to float32" in note)
    assert "precision='bfloat16'" in note


@has_it
def test_control_more_than_the_rounding_of_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = openvino._Compiled.__call__
    monkeypatch.setattr(openvino._Compiled, "__call__", lambda self, given: [1.3 * y for y in run(self, given)])
    with pytest.raises(VerificationError, match="differs by"):
        fast_and_model(precision="bfloat16")
    monkeypatch.setattr(contest, "check_same", lambda *arguments: 0.0)
    monkeypatch.setattr("fxprune.inference.acceleration.check_same", lambda *arguments: 0.0)
    fast_and_model(precision="bfloat16")


def test_a_processor_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "has_bfloat16", lambda: False)
    monkeypatch.setattr(openvino, "prefers_bfloat16", lambda: False)
    with pytest.raises(
        AccelerationError, match=r"precision='bfloat16': this processor has no instructions for bfloat16; leave prec"
    ):
        fast_and_model(precision="bfloat16")
    fast, _ = fast_and_model()
    assert not any("OpenVINO" in note for note in fxprune.acceleration_report(fast).notes)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"precision": "int8", "runtime": "openvino"}, "precision='int8' needs data to measure the ranges"),
        (
            {"precision": "bfloat16", "runtime": "onnxruntime"},
            "is for runtime='openvino', and the network",
        ),
        ({"precision": "bfloat16"}, r"run in 'torch'; name it. In PyTorch: fxprune.accelerate\(copy"),
        ({"precision": "fp8", "runtime": "openvino"}, "precision is 'fp8'; it must be 'int8' or 'bfloat16', or None"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(AccelerationError, match=said):
        fxprune.accelerate(net(), image(), **options)


@has_it
def test_a_share_of_the_time_is_planned_and_reached_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = OnnxClock()
    wind(monkeypatch, tmp_path / "cache", clock)
    clock.watch(monkeypatch, openvino.OpenVinoProgram)
    monkeypatch.setattr(measure, "RATIOS", (1 / 2, 3 / 4))
    monkeypatch.setattr(grid, "SHARES", (1 / 2, 1))
    options: dict[str, Any] = {"runtime": "openvino", "precision": "bfloat16", "example_inputs": image()}
    table = fxprune.measure_latency(net(), granularity="filter", **options)
    assert (table.dtype, table.runtime) == ("bfloat16", "openvino")
    fast = fxprune.compile(net(), latency=0.6, granularity="filter", latency_table=table, **options)
    assert fast.runtime == "openvino, bfloat16"
    assert "asked for 0.60 of the best dense time in openvino in bfloat16; 0." in str(fxprune.report(fast))
    (note,) = (note for note in fxprune.acceleration_report(fast).notes if note.startswith("latency"))
    assert note.startswith("latency: asked for 0.60 of the best dense time in openvino in bfloat16, reached 0.")
    assert float(note.rpartition(" ")[2]) == pytest.approx(0.6, rel=0.07)
    with pytest.raises(fxprune.PlanError, match="it was measured for bfloat16, but this is float32; measure again"):
        fxprune.make_plan(
            net(), latency=0.6, granularity="filter", latency_table=table, runtime="openvino", example_inputs=image()
        )
