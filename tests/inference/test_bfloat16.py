"""Pruned networks in bfloat16 on the CPU: what `accelerate` makes of them is as near to float32 as the type allows."""

import copy
from typing import Any

import pytest
import torch
from equality import randomize
from torch import Tensor, nn

import fxprune
from fxprune.inference import acceleration
from fxprune.inference import stopwatch as measurements
from fxprune.inference.acceleration import accelerate, acceleration_report
from fxprune.inference.race import race
from fxprune.inference.runtimes import OTHERS

STEP = 2**-8
"""Of bfloat16: half of what it rounds to."""
BOUND = 8 * STEP
"""Of the largest output, for a network of six layers: each rounds its weights, and what it gives."""
WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "kernels": {"ratio": 0.5, "form": "overlap"},
    "kernels at 0.75": {"ratio": 0.75, "groups": 4},
    "filters": {"ratio": 0.5, "granularity": "filter"},
}
each_way = pytest.mark.parametrize("way", list(WAYS))


def image(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A residual network with a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU6(), nn.Conv2d(32, 32, 3, padding=1))
        self.depth = nn.Sequential(nn.Conv2d(32, 32, 3, 2, groups=32), nn.BatchNorm2d(32), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(self.wide(self.depth((x + self.left(x)).relu())).mean((2, 3)))
        return y


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how long anything takes."""
    monkeypatch.setattr(acceleration, "ROUNDS", 1)
    monkeypatch.setattr(acceleration, "MARGIN", float("inf"))
    monkeypatch.setattr(measurements, "ROUNDS", 1)
    monkeypatch.setattr(measurements, "TURN_SECONDS", 0.0)


def network(way: str) -> nn.Module:
    net = randomize(Net()).eval()
    if not WAYS[way]:
        return net
    pruned: nn.Module = fxprune.compile(net, example_inputs=image(), **WAYS[way])
    return pruned


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).abs().max() / expected.abs().max())


@each_way
def test_it_is_near_to_float32(way: str) -> None:
    model = network(way)
    half = copy.deepcopy(model).bfloat16()
    fast = accelerate(half, image().bfloat16(), remember=False)
    report = acceleration_report(fast)
    assert report.dtype == "bfloat16"
    for x in (image(), image(5, seed=1)):
        with torch.no_grad():
            found, expected = fast(x.bfloat16()), model(x)
        assert found.dtype == torch.bfloat16
        assert 0 < far(found, expected) < BOUND
    engines = {form.split()[1] for layer in report.layers for form in layer.seconds}
    assert ("onednn" in engines) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert "native" not in engines
    grouped = [layer for layer in report.layers if any(form.startswith("pruned") for form in layer.seconds)]
    assert bool(grouped) == way.startswith("kernels")


@pytest.mark.parametrize("prefix", ["pruned", "dense"])
def test_every_form_that_races_is_near(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("kernels at 0.75")
    seen: dict[str, float] = {}

    def watched(calls: dict[str, Any], **options: Any) -> Any:
        seen.update({name: far(call(), model(image()).detach()) for name, call in calls.items()})
        return race(calls, **options)

    monkeypatch.setattr(acceleration, "race", watched)
    for chosen in ("library", "onednn"):  # each in turn looks fastest
        times = {f"{prefix} {chosen}": 0.5}

        def timed(self: Any, calls: Any, times: dict[str, float] = times) -> dict[str, float]:
            return {key: next((t for form, t in times.items() if key.startswith(form)), 1.0) for key in calls}

        monkeypatch.setattr(measurements.Stopwatch, "race", timed)
        accelerate(copy.deepcopy(model).bfloat16(), image().bfloat16(), remember=False)
    assert {"dense channels_last", "dense contiguous"} <= set(seen)
    assert prefix == "dense" or {"pruned channels_last", "pruned contiguous"} <= set(seen)
    assert max(seen.values()) < BOUND


def test_control_fewer_bits_are_farther() -> None:
    model = network("kernels")
    coarse = copy.deepcopy(model)
    for parameter in coarse.parameters():
        step = parameter.detach().abs().clamp_min(1e-9).log2().floor().exp2() / 16  # four bits behind the first
        parameter.data = (parameter.data / step).round() * step
    assert far(coarse(image()).detach(), model(image()).detach()) > BOUND / 2
    assert far(network("filters")(image()).detach(), model(image()).detach()) > BOUND


def test_a_model_that_was_compiled_in_bfloat16() -> None:
    net = randomize(Net()).eval()
    half, given = copy.deepcopy(net).bfloat16(), image(32, seed=2)
    fast = fxprune.compile(half, 0.5, example_inputs=image().bfloat16(), calibration=given.bfloat16(), target="cpu")
    same = fxprune.compile(net, 0.5, example_inputs=image(), calibration=given, share_groups=True)
    assert fast(image().bfloat16()).dtype == torch.bfloat16
    assert far(fast(image().bfloat16()), same(image()).detach()) < 4 * BOUND  # other kernels may go


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_other_runtimes_say_what_they_take(name: Any) -> None:
    if OTHERS[name].obstacle(torch.device("cpu"), torch.float32):
        pytest.skip(f"{name} is not here")
    with pytest.raises(fxprune.AccelerationError, match="fxprune takes float32 models there, and this one is bfloat16"):
        accelerate(network("dense").bfloat16(), image().bfloat16(), runtime=name)
