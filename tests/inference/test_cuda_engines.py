"""Engines, choices and CUDA graphs on a device; elsewhere only what needs none."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.exact.verification import difference
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.cuda_graphs import captured
from fxprune.inference.engines import ENGINES, CudnnConv2d, Engine, TritonConv2d

on_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ON_CUDA = [engine for engine in ENGINES if engine.name in ("library", "cudnn", "triton")]
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-3}  # TF32 has as many bits as float16


def layer(kind: str, channels: int = 32) -> FusedConv2d:
    """A layer of 48 filters, 4 groups of which read half of the channels each, in runs of 8 or one by one."""
    torch.manual_seed(0)
    fused = FusedConv2d(nn.Conv2d(4 * channels // 2, 48, 3, padding=1, stride=2, groups=4), channels)
    runs = torch.stack([torch.randperm(channels // 8)[: channels // 16] for _ in range(4)])
    fused.index = (runs[..., None] * 8 + torch.arange(8)).flatten()
    if "scattered" in kind:
        fused.index = torch.cat([torch.randperm(channels)[: channels // 2] for _ in range(4)])
    if "ordered" in kind:
        fused.order = torch.randperm(48)
    fused.minimum = 0.0 if "relu" in kind else None
    fused.maximum = 6.0 if "relu6" in kind else None
    fused.dense_groups = 1
    return fused


def operands(residual: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *shape, generator=generator) for shape in [(32, 9, 11), (48, 5, 6)][: 1 + residual]]


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=on_cuda, id=str(dtype)) for dtype in LIMITS])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("kind", ["plain", "relu", "relu6", "ordered relu", "scattered ordered relu"])
@pytest.mark.parametrize("dense", [False, True], ids=["pruned", "dense"])
@pytest.mark.parametrize("engine", ON_CUDA, ids=[engine.name for engine in ON_CUDA])
def test_every_engine_on_the_device(
    engine: type[Engine], dense: bool, kind: str, residual: bool, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    fused = layer(kind).dense() if dense else layer(kind)
    expected = copy.deepcopy(fused).double()(*(operand.double() for operand in operands(residual)))
    there = fused.to("cuda", dtype)
    if reason := engine.obstacle(there, memory_format):
        assert reason
        return
    inputs = [x.to("cuda", dtype).contiguous(memory_format=memory_format) for x in operands(residual)]
    built = engine(there, memory_format)
    found = built(*inputs)
    assert found.is_contiguous(memory_format=memory_format)
    assert difference([found.cpu()], [expected])[1] <= LIMITS[dtype]
    spoiled = engine(layer(kind, 32).dense().to("cuda", dtype), memory_format) if dense else built
    weight = next(tensor for tensor in spoiled.state_dict().values() if tensor.dim() == 4)
    weight[: len(weight) // 2].zero_()
    assert difference([spoiled(*inputs).cpu()], [expected])[1] > 10 * LIMITS[dtype], "control: half of the weights"


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=on_cuda)], ids=str)
@torch.no_grad()
def test_acceleration_on_the_device(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()
    ).eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plan = fxprune.make_plan(model, 0.5, target="cuda", form="overlap", example_inputs=images)
    pruned = fxprune.rewrite(fxprune.mask(model, plan), plan, images).to("cuda", dtype)
    x = images.to("cuda", dtype)
    fast = fxprune.accelerate(pruned, x, remember=False)
    report = fxprune.acceleration_report(fast)
    assert {"triton", "cudnn"} <= {form.split()[1] for choice in report.layers for form in choice.seconds}
    assert difference([fast(x)], [pruned(x)])[1] <= report.difference + 1e-2
    replay = captured(lambda: fast(x), times=2)
    x.mul_(-1)
    assert difference([replay()], [pruned(x)])[1] <= 1e-2, "a graph reads its input anew"


class Stand:
    """What torch.cuda would give, where there is no device: a graph that does nothing, on a stream that is none."""

    def __getattr__(self, name: str) -> "Stand":
        return self

    def __call__(self, *_: object) -> "Stand":
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_a_graph_keeps_alive_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Stand())
    module = nn.Linear(2, 2)
    gone = weakref.ref(module)
    replay = captured(lambda m=module: m(torch.zeros(1, 2)))  # type: ignore[misc]
    del module
    assert gone() is not None, "else the graph would read memory that belongs to somebody else by now"
    assert replay() is not None
    del replay
    gc.collect()
    assert gone() is None, "control"


def test_what_cudnn_does_not_fuse() -> None:
    fused = layer("relu")
    assert CudnnConv2d.obstacle(fused, torch.channels_last) == "cuDNN runs on CUDA, not on cpu"
    meta = fused.to("meta")
    assert "not on meta" in CudnnConv2d.obstacle(meta, torch.channels_last)
    assert "not on meta" in TritonConv2d.obstacle(meta, torch.channels_last)
