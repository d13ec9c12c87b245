"""int8 in PyTorch: near the float model for kernels, filters and dense networks, in integers, kept and compiled."""

import copy
import importlib.util
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import AccelerationError
from fxprune.inference.fused_graph import fused_graph
from fxprune.inference.runtimes import OTHERS, RuntimeModel
from fxprune.inference.runtimes.inductor import _Compiled
from fxprune.inference.runtimes.int8 import quantize
from fxprune.inference.runtimes.runtime import Network
from fxprune.inference.stopwatch import Stopwatch

pytest.importorskip("torchao")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of torchao, and of the compiler
    pytest.mark.skipif(
        bool(OTHERS["inductor"].obstacle(torch.device("cpu"), torch.float32)), reason="Inductor cannot be used here"
    ),
]

BOUND = 0.03
"""Of the largest output: what rounding to 8 bits does to a network of five layers."""
WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "kernels": {"ratio": 0.5},
    "kernels at 0.75": {"ratio": 0.75},
    "filters": {"ratio": 0.5, "granularity": "filter"},
}
each_way = pytest.mark.parametrize("way", list(WAYS))


def images(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A residual network with every activation, a pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1))
        self.wide = nn.Sequential(nn.Conv2d(16, 32, 3, 2), nn.Hardtanh(-0.5, 1.5), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(self.wide((x + self.left(x)).relu()))
        return y


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def network(way: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    if not WAYS[way]:
        return net
    pruned: nn.Module = fxprune.compile(net, example_inputs=images(2), calibration=images(), **WAYS[way])
    return pruned


def in_inductor(way: str) -> RuntimeModel:
    """What `fxprune.accelerate(runtime="inductor")` races, not compiled yet; pruned where there is such a form."""
    graph, _ = fused_graph(network(way), (images(2),))
    built = OTHERS["inductor"].build(Network(graph, (images(2),), Stopwatch(torch.device("cpu"), remember=False)))
    return built.get("pruned inductor", built["dense inductor"])


def far(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = other(x)
        return float((model(x) - expected).abs().max() / expected.abs().max())


def operators(small: RuntimeModel) -> Counter[str]:
    graph = small.program.network.network.graph  # type: ignore[attr-defined]
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


@each_way
def test_int8_is_near_the_float_model_and_in_integers(way: str) -> None:
    fast = in_inductor(way)
    assert far(fast, network(way), images(7, seed=1)) < 1e-5
    small = quantize(fast, images())
    assert 1e-5 < far(small, fast, images(7, seed=1)) < BOUND
    assert small.runtime == "inductor, int8"
    agreement = small.meta["quantization"]
    assert (agreement.inputs, agreement.held_out) == (12, True)
    assert agreement.share > 0.9
    found = operators(small)
    weighted = found["aten.conv2d.default"] + found["aten.linear.default"]
    assert weighted == 5
    assert found["quantized_decomposed.dequantize_per_channel.default"] == weighted, "each weight has 8 bits"
    assert found["quantized_decomposed.quantize_per_tensor.default"] >= weighted - 1, "and each input"
    assert ("aten.index_select.default" in found) == way.startswith("kernels")


def test_control_ranges_come_from_the_images() -> None:
    fast = in_inductor("kernels")
    assert far(quantize(fast, images() / 100), fast, images(7, seed=1)) > 3 * BOUND


@pytest.mark.parametrize("way", ["kernels at 0.75", pytest.param("filters", marks=pytest.mark.slow)])
def test_compiled_it_computes_the_same(way: str) -> None:
    small = quantize(in_inductor(way), images())
    x = images(2, seed=3)
    compiled = small(x)
    (run,) = small.program._loaded.values()
    assert isinstance(run, _Compiled)
    assert run.compiled is not None
    assert float((compiled - small(torch.cat((x, x)))[:2]).abs().max()) < 1e-4, "the same integers, summed otherwise"
    generated = torch._dynamo.utils.counters["inductor"]
    assert generated["qconv_weight_prepack_matcher_count"] == 4
    assert generated["qlinear_weight_prepack_matcher_count"] == 1


def test_copies_and_what_was_pickled_are_the_same() -> None:
    small = quantize(in_inductor("kernels"), images())
    x = images(5, seed=3)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert other.program is not small.program
        assert torch.equal(other(x), small(x))


def test_what_is_loaded_shares_its_weights() -> None:
    for model in (in_inductor("kernels"), quantize(in_inductor("kernels"), images())):
        loaded = model.program.load(1)
        assert isinstance(loaded, _Compiled)
        assert loaded.network is not model.program.network  # type: ignore[attr-defined]
        pairs = zip(loaded.network.state_dict().values(), model.program.network.state_dict().values(), strict=True)  # type: ignore[attr-defined]
        shared = [one.data_ptr() == other.data_ptr() for one, other in pairs]
        assert shared
        assert all(shared)


@pytest.mark.slow
def test_its_file_runs_without_fxprune(tmp_path: Path) -> None:
    small = quantize(in_inductor("kernels at 0.75"), images())
    (path,) = small.save(tmp_path / "small.pt2")
    loaded = torch._inductor.aoti_load_package(str(path))
    for batch in (2, 5):
        torch.testing.assert_close(loaded(images(batch))[0], small(images(batch)), rtol=1e-4, atol=1e-4)


def test_an_absent_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = in_inductor("dense")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AccelerationError, match=r"torchao.*is not installed; pip install 'fxprune\[int8\]'"):
        quantize(fast, images())


def test_the_tools_stay_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(in_inductor("dense"), images())
    assert capfd.readouterr().err == ""
