"""int8 of models in ONNX Runtime and OpenVINO: near the float model, judged on images that were held out, and kept."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.calibration.agreement import Agreement
from fxprune.errors import AccelerationError, CalibrationError, PoorAgreementWarning
from fxprune.inference.runtimes import RuntimeModel, int8
from fxprune.inference.runtimes.int8 import quantize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NEEDS = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "nncf")}


def images(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=list(NEEDS))
def fast(request: pytest.FixtureRequest) -> RuntimeModel:
    for package in NEEDS[request.param]:
        pytest.importorskip(package)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 6),
    ).eval()  # fmt: skip
    pruned = fxprune.compile(net, 0.5, example_inputs=images(2))
    made = fxprune.accelerate(pruned, images(2), runtime=request.param, remember=False)
    assert isinstance(made, RuntimeModel)
    return made


def far(small: RuntimeModel, model: RuntimeModel, x: Tensor) -> float:
    expected = model(x)
    return float((small(x) - expected).abs().max() / expected.abs().max())


def test_int8_is_near_and_not_equal(fast: RuntimeModel) -> None:
    small = quantize(fast, images())
    fresh = images(7, seed=1)
    assert 0 < far(small, fast, fresh) < 0.1
    agreement = small.meta["quantization"]
    assert isinstance(agreement, Agreement)
    assert agreement.held_out
    assert agreement.inputs == 12
    assert agreement.share > 0.9
    assert "int8" in repr(small)
    assert "int8" not in repr(fast)


def test_control_ranges_come_from_the_images(fast: RuntimeModel) -> None:
    fresh = images(7, seed=1)
    assert far(quantize(fast, images() / 100), fast, fresh) > 3 * far(quantize(fast, images()), fast, fresh)


def test_poor_agreement_is_a_warning(fast: RuntimeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    poor = Agreement(0.5, 12, True, True, 0.5)
    monkeypatch.setattr(int8, "measure_agreement", lambda *_, **__: poor)
    with pytest.warns(PoorAgreementWarning, match=r"int8: agreement .* 50.0 % .*; calibrate with more images"):
        assert quantize(fast, images()).meta["quantization"] is poor


def test_it_is_kept_and_runs_without_fxprune(fast: RuntimeModel, tmp_path: Path) -> None:
    small = quantize(fast, images())
    suffix = small.program.suffixes[0]
    path, *_ = small.save(tmp_path / f"small{suffix}")
    x = images(3, seed=2)
    torch.save(x, tmp_path / "x.pt")
    program = {
        ".onnx": "import onnxruntime as o; s = o.InferenceSession(p); y = s.run(None, {s.get_inputs()[0].name: x})[0]",
        ".xml": "import openvino as o; y = o.Core().compile_model(p, 'CPU')(x)[0]",
    }[suffix]
    code = f"import numpy as np; x = np.load('x.npy'); p = {str(path)!r}; {program}; np.save('y.npy', y)"
    import numpy as np

    np.save(tmp_path / "x.npy", x.numpy())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), small(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "calibration, message",
    [
        (torch.zeros(1, 3, 12, 12), "cannot be divided; ranges are measured on some inputs and judged by others"),
        (torch.zeros(40, 3, 10, 12), "does not fit the model"),
        (torch.full((40, 3, 12, 12), torch.nan), "NaN"),
        ([], "holds no batch"),
    ],
)
def test_bad_calibration(fast: RuntimeModel, calibration: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        quantize(fast, calibration)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None])
def test_what_has_no_int8_form(model: object) -> None:
    with pytest.raises(AccelerationError, match=r"has no int8 form here; pass what fxprune\.accelerate"):
        quantize(model, images())  # type: ignore[arg-type]


def test_an_absent_tool_is_named(monkeypatch: pytest.MonkeyPatch, fast: RuntimeModel) -> None:
    if fast.runtime != "openvino":
        pytest.skip("NNCF is for OpenVINO")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AccelerationError, match=r"NNCF.*is not installed; pip install 'fxprune\[int8\]'"):
        quantize(fast, images())
