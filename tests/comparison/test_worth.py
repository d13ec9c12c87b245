"""Whether a pruned network is worth it for its time: said as it is, whatever was measured."""

import pytest
import torch
from torch import nn

import fxprune
from fxprune.comparison.latency import Latency, Row
from fxprune.comparison.worth import GRAPH_RUNTIMES, Worth, measure_worth, usual_runtimes
from fxprune.inference.runtimes import OTHERS


def test_it_is_said_which_is_faster_and_where() -> None:
    fast = Worth({"a": 0.004, "b": 0.003}, {"a": 0.002, "b": 0.005}, batch=1, threads=2)
    assert (fast.best_dense, fast.best, fast.is_faster) == ("b", "a", True)
    assert str(fast) == (
        "1.50 times as fast: pruned 2.00 ms in a, dense 3.00 ms in b (best of a, b; batch 1, threads: 2)"
    )
    assert fast.to_dict()["ratio"] == pytest.approx(1.5)


@pytest.mark.parametrize("pruned", [0.004, 0.003, 0.00295])
def test_where_it_is_not_that_is_said(pruned: float) -> None:
    """Faster than the dense network of its own runtime is not enough, and neither is noise."""
    slow = Worth({"a": 0.006, "b": 0.003}, {"a": pruned, "b": 0.005}, batch=1, threads=2)
    assert not slow.is_faster
    assert str(slow).startswith("not worth pruning for time here: dense 3.00 ms in b, pruned ")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()


def test_both_networks_are_timed_in_all_that_is_here() -> None:
    x = torch.randn(1, 3, 16, 16)
    model = net()
    pruned = fxprune.compile(model, 0.5, example_inputs=x)
    runtimes = usual_runtimes(x)
    here = [name for name in GRAPH_RUNTIMES if not OTHERS[name].obstacle(x.device, x.dtype)]
    assert list(runtimes) == (here or ["torch"])
    found = measure_worth(model, pruned, x, runtimes[:1], rounds=2)
    assert set(found.dense) == set(found.pruned) == set(found.models) == set(runtimes[:1])
    assert min(*found.dense.values(), *found.pruned.values()) > 0
    torch.testing.assert_close(found.models[runtimes[0]](x), pruned(x), rtol=1e-3, atol=1e-4)


def test_what_a_runtime_is_held_to_stands_below(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 16, 16)
    (name, *_) = usual_runtimes(x)
    if name not in OTHERS:
        pytest.skip("needs fxprune[onnx] or fxprune[openvino]")
    monkeypatch.setattr(OTHERS[name], "remark", lambda: "it is held to float32")
    assert str(measure_worth(net(), net(), x, (name,), rounds=2)).splitlines()[1:] == ["it is held to float32"]
    monkeypatch.setattr(OTHERS[name], "remark", lambda: "")
    assert len(str(measure_worth(net(), net(), x, (name,), rounds=2)).splitlines()) == 1


def test_without_other_runtimes_pytorch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GRAPH_RUNTIMES:
        monkeypatch.setattr(type(OTHERS[name]), "obstacle", lambda *_: "not installed")
    assert usual_runtimes(torch.randn(1)) == ("torch",)


@pytest.mark.parametrize("relative, said", [(1.2, True), (0.99, True), (0.8, False)])
def test_bench_says_so_too(relative: float, said: bool) -> None:
    def row(network: str, share: float) -> Row:
        return Row(
            network, None, 1.0, "eager", None, 1, 0.002, 0.0, 1.0, relative_to_best=share, difference=0.0, best=True
        )

    latency = Latency({}, {"model": "net"}, [row("dense", 1.0), row("fxprune", relative)])
    assert ("not worth pruning for time at batch 1" in str(latency)) is said
    assert "not worth" not in str(Latency({}, {}, [row("dense", 1.0)])), "nothing pruned was timed"


@pytest.mark.parametrize(
    "flags, dtype, runtimes, said",
    [
        (["avx2", "amx_bf16"], "float32", ["accelerate", "openvino"], True),
        (["avx512_bf16"], "float32", ["openvino"], True),
        (["avx2", "avx512f"], "float32", ["openvino"], False),
        (["amx_bf16"], "bfloat16", ["openvino"], False),
        (["amx_bf16"], "float32", ["onnxruntime"], False),
    ],
)
def test_what_openvino_is_held_to_is_said(flags: list[str], dtype: str, runtimes: list[str], said: bool) -> None:
    latency = Latency({"cpu_flags": flags}, {"dtype": dtype, "runtime": runtimes})
    assert ("--dtype bfloat16 races that" in str(latency)) is said
