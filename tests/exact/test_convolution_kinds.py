"""Convolutions of every kind, plain and transposed over one, two and three dimensions, through the whole chain."""
# Functions of torch.jit and torch.onnx are untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import io
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from equality import assert_same_function, masked_by_hand, outputs, randomize
from removal_harness import zeroed
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import PassError
from fxprune.exact.record import record_of
from fxprune.exports import save_onnx
from fxprune.graph.convolutions import convolutions, kernels_of
from fxprune.vocabulary import FormChoice

DIMS = (1, 2, 3)


def net(dims: int) -> nn.Sequential:
    """Plain and transposed convolutions over `dims` dimensions, two of them with a BatchNorm behind."""
    plain, up, norm = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "ConvTranspose", "BatchNorm"))
    torch.manual_seed(0)
    return nn.Sequential(
        *(plain(3, 16, 3, padding=1), nn.ReLU()),
        *(plain(16, 32, 3, padding=1, bias=False), norm(32), nn.ReLU()),
        *(up(32, 16, 3, stride=2, padding=1, output_padding=1), norm(16), nn.ReLU()),
        *(up(16, 24, 2, bias=False), nn.ReLU()),
        plain(24, 4, 1),
    ).eval()


PRUNED = ["2", "5", "8"]  # by kernels


def example(dims: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *[4] * dims, generator=torch.Generator().manual_seed(1), dtype=dtype)


@cache
def _made(dims: int, granularity: str) -> tuple[nn.Module, fx.GraphModule]:
    model = randomize(net(dims)).eval()
    form = {} if granularity == "filter" else {"form": "overlap"}
    x = example(dims, torch.float32)
    return model, fxprune.compile(model, 0.5, example_inputs=x, granularity=granularity, **form)  # type: ignore[arg-type]


def made(dims: int, granularity: str = "kernel") -> tuple[nn.Module, fx.GraphModule]:
    model, pruned = _made(dims, granularity)
    return copy.deepcopy(model), copy.deepcopy(pruned)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("form", ["partition", "overlap"])
def test_kernels_go_from_every_kind(dims: int, form: FormChoice) -> None:
    model = randomize(net(dims).double()).eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=example(dims), form=form)
    plan = record_of(pruned).plan
    assert list(plan.layers) == PRUNED
    assert all(conv.groups > 1 for name, conv in convolutions(pruned).items() if name in PRUNED)
    assert_same_function(pruned, masked_by_hand(model, plan), (example(dims),))
    report = fxprune.report(pruned)
    rows = {layer.name: layer for layer in report.layers}
    assert rows.keys() == convolutions(model).keys()
    for name in PRUNED:
        assert 2 * rows[name].macs == rows[name].macs_dense  # type: ignore[operator]  # shapes are known
        assert 2 * pruned.get_parameter(f"{name}.weight").numel() == model.get_parameter(f"{name}.weight").numel()


@pytest.mark.parametrize("dims", DIMS)
def test_a_kernel_that_is_not_zero_is_refused(dims: int) -> None:
    model = net(dims)
    plan = fxprune.make_plan(model, 0.5)
    masked = fxprune.mask(model, plan)
    for name, kernels in plan.layers.items():
        wrong = copy.deepcopy(masked)
        dropped = (~kernels.mask()).nonzero()[0]
        with torch.no_grad():
            kernels_of(convolutions(wrong)[name])[tuple(dropped)] = 1.0
        with pytest.raises(PassError, match=f"{name}: 1 kernels that the plan drops are not zero"):
            fxprune.rewrite(wrong, plan, example(dims, torch.float32))


@pytest.mark.parametrize("dims", DIMS)
def test_filters_go_from_every_kind(dims: int) -> None:
    model = randomize(net(dims).double()).eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=example(dims), granularity="filter")
    plan = record_of(pruned).plan
    assert [conv.out_channels for conv in convolutions(pruned).values()] == [8, 16, 8, 12, 4]
    assert_same_function(pruned, zeroed(model, plan), (example(dims),))
    assert all(layer.reached_ratio == 0.5 for layer in fxprune.report(pruned).layers[:-1])


@pytest.mark.parametrize("dims", DIMS)
def test_filters_then_kernels_with_a_refit(dims: int) -> None:
    model, images = net(dims), example(dims, torch.float32, batch=16)
    granularity = {"filter": 0.5, "kernel": 0.5}
    plan = fxprune.make_plan(model, granularity=granularity, calibration=images)
    masked = fxprune.mask(model, plan, images)
    pruned = fxprune.rewrite(masked, plan, images[:2])
    assert_same_function(pruned.double(), masked.double(), (example(dims),))
    wanted = outputs(model.double(), [images.double()], "eval")[0]
    refitted, plain = (
        float((outputs(m.double(), [images.double()], "eval")[0] - wanted).square().mean())
        for m in (masked, fxprune.mask(model, plan))
    )
    assert refitted < 0.7 * plain


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("granularity", ["kernel", "filter"])
def test_scripts_and_exports(dims: int, granularity: str) -> None:
    _, pruned = made(dims, granularity)
    other = torch.randn(5, *example(dims).shape[1:])
    expected = pruned(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(pruned)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(other), expected)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(pruned, (example(dims, torch.float32),), dynamic_shapes=shapes)
    torch.testing.assert_close(exported.module()(other), expected)


@pytest.mark.parametrize("dims", DIMS)
def test_goes_to_onnx(dims: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    _, pruned = made(dims)
    path = tmp_path / "net.onnx"
    save_onnx(pruned, (example(dims, torch.float32),), path)
    other = torch.randn(5, *example(dims).shape[1:])
    session = runtime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    np.testing.assert_allclose(found, pruned(other).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", DIMS)
def test_is_saved_and_loaded(dims: int, tmp_path: Path) -> None:
    _, pruned = made(dims)
    fxprune.save(pruned, tmp_path / "net.pt")
    loaded = fxprune.load(tmp_path / "net.pt", net(dims)).eval()
    assert torch.equal(loaded(example(dims, torch.float32)), pruned(example(dims, torch.float32)))


@pytest.mark.parametrize("dims", DIMS)
def test_batch_norm_is_folded_behind_plain_ones(dims: int) -> None:
    model, x = net(dims), example(dims, torch.float32)
    pruned = fxprune.compile(randomize(model).eval(), 0.5, example_inputs=x, fold_batch_norm=True)
    left = [module for module in pruned.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(left) == (2 if dims == 1 else 1), "behind the transposed one, and BatchNorm1d"


@pytest.mark.parametrize("dims", [1, 3])
def test_an_accelerated_network_computes_the_same(dims: int) -> None:
    _, pruned = made(dims)
    x = example(dims, torch.float32)
    fast = fxprune.accelerate(pruned, x)
    torch.testing.assert_close(fast(x), pruned(x), rtol=1e-4, atol=1e-4)
    assert any(f"there is no fused form of a Conv{dims}d" in note for note in fxprune.acceleration_report(fast).notes)


@pytest.mark.parametrize("options", [{"variety": "pairs"}, {"method": "srgkp"}, {"criterion": "l1"}, {"macs": 0.6}])
@pytest.mark.parametrize("dims", [1, 3])
def test_every_way_to_choose(dims: int, options: dict[str, Any]) -> None:
    model = randomize(net(dims).double()).eval()
    pruned = fxprune.compile(model, example_inputs=example(dims), **options)
    assert_same_function(pruned, masked_by_hand(model, record_of(pruned).plan), (example(dims),))


def test_earlier_states_of_a_transposed_convolution_are_compared_filter_by_filter() -> None:
    model = net(2)
    earlier = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        kernels_of(convolutions(model)["5"])[:, 16:] += 1.0  # the last 16 channels of its 32 moved
    for options in ({"criterion": "movement"}, {"method": "tmi"}):
        plan = fxprune.make_plan(model, 0.5, groups=1, form="overlap", snapshots=[earlier], **options)  # type: ignore[arg-type]
        if "criterion" in options:
            assert plan.layers["5"].kept == (tuple(range(16, 32)),)


def test_a_score_function_is_given_filters_first() -> None:
    seen = {}

    def score(name: str, conv: nn.Module) -> Tensor:
        assert isinstance(conv.weight, Tensor)
        seen[name] = tuple(conv.weight.shape)
        return conv.weight.abs().flatten(2).sum(2)

    fxprune.make_plan(net(2), 0.5, criterion=score)
    assert seen == {"2": (32, 16, 3, 3), "5": (16, 32, 3, 3), "8": (24, 16, 2, 2)}


@pytest.mark.parametrize("dims", [1, 3])
def test_training_with_a_schedule_prunes_every_kind(dims: int) -> None:
    model, x = net(dims).train(), example(dims, torch.float32, batch=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sparsifier = fxprune.sparsify(model, "agp", steps=4, every=1, optimizer=optimizer, variety="pairs")
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert list(sparsifier.plan.layers) == PRUNED
    small = sparsifier.rewrite(example_inputs=x)
    assert_same_function(small.double(), copy.deepcopy(model).double(), (example(dims),))


def test_a_share_of_the_latency_is_met_beside_convolutions_that_are_not_timed() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU())
            self.line = nn.Sequential(nn.Conv1d(32, 32, 3), nn.ReLU(), nn.Conv1d(32, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.line(self.flat(x).flatten(2))

    model, x = Both().eval(), torch.randn(1, 3, 12, 12)
    table = fxprune.measure_latency(model, example_inputs=x)
    assert [layer.name for layer in table.layers] == ["flat.2"]
    pruned = fxprune.compile(model, latency=0.99, latency_table=table, target="cpu", example_inputs=x)
    torch.testing.assert_close(pruned(x).shape, model(x).shape)
