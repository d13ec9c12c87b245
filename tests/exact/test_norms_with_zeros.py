"""Filters that go through GroupNorm and LayerNorm, through the whole chain: the norms go on counting the zeros."""
# Functions of torch.jit and torch.onnx are untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from equality import assert_same_function, randomize
from removal_harness import zeroed
from torch import Tensor, fx, nn
from torchvision.models.convnext import LayerNorm2d
from zoo import CASES

import fxprune
from fxprune.exact.record import record_of
from fxprune.exports import save_onnx
from fxprune.graph import norms
from fxprune.graph.norms import NormWithZeros

NETS = ("GroupNorm", "ConvNeXtBlock", "ChannelLayerNorm")
each_net = pytest.mark.parametrize("name", NETS)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@cache
def _made(name: str) -> tuple[nn.Module, fx.GraphModule]:
    (case,) = [case for case in CASES if case.name == name]
    model = randomize(case.build()).eval()
    return model, fxprune.compile(model, 0.5, granularity="filter", example_inputs=X)


def made(name: str) -> tuple[nn.Module, fx.GraphModule]:
    return copy.deepcopy(_made(name)[0]), copy.deepcopy(_made(name)[1])


@each_net
def test_equals_the_masked_model_in_both_modes(name: str) -> None:
    model, pruned = made(name)
    assert sum(isinstance(module, NormWithZeros) for module in pruned.modules()) == 1
    masked = zeroed(model, record_of(pruned).plan)
    assert_same_function(pruned.double(), masked.double(), (X.double(),))


@each_net
def test_control_a_norm_that_forgets_the_zeros_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made(name)

    def forgetful(norm: nn.Module, kind: norms.NormKind, kept: Tensor, channels: int) -> NormWithZeros:
        return norms.with_zeros(norm, kind, kept, channels // 2)

    monkeypatch.setattr("fxprune.passes.remove_channels.with_zeros", forgetful)
    with pytest.raises(fxprune.FxpruneError if name == "GroupNorm" else fxprune.VerificationError):
        fxprune.compile(model, 0.5, granularity="filter", example_inputs=X)


@each_net
def test_scripts_exports_and_goes_to_onnx(name: str, tmp_path: Path) -> None:
    _, pruned = made(name)
    other = torch.randn(5, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.testing.assert_close(torch.jit.script(pruned)(other), pruned(other))
    exported = torch.export.export(pruned, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(other), pruned(other))
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    save_onnx(pruned, (X,), tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    np.testing.assert_allclose(found, pruned(other).detach().numpy(), rtol=1e-4, atol=1e-4)


@each_net
def test_is_saved_loaded_and_accelerated(name: str, tmp_path: Path) -> None:
    model, pruned = made(name)
    fxprune.save(pruned, tmp_path / "net.pt")
    loaded = fxprune.load(tmp_path / "net.pt", type(model)()).eval()
    assert torch.equal(loaded(X), pruned(X))
    if name == "GroupNorm":
        torch.testing.assert_close(fxprune.accelerate(pruned, X)(X), pruned(X), rtol=1e-4, atol=1e-4)


def test_filters_then_kernels_with_a_refit() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.Conv2d(32, 48, 3, padding=1), LayerNorm2d(48), nn.ReLU()),
        *(nn.Conv2d(48, 32, 3, padding=1), nn.GroupNorm(1, 32), nn.ReLU()),
        nn.Conv2d(32, 4, 1),
    )
    model, images = randomize(net).eval(), torch.randn(16, 3, 8, 8)
    plan = fxprune.make_plan(model, granularity={"filter": 0.25, "kernel": 0.5}, calibration=images)
    masked = fxprune.mask(model, plan, images)
    pruned = fxprune.rewrite(masked, plan, X)
    assert sum(isinstance(module, NormWithZeros) for module in pruned.modules()) == 3
    assert [module.groups for module in pruned.modules() if isinstance(module, nn.Conv2d)] == [1, 2, 2, 1]
    assert_same_function(pruned.double(), masked.double(), (X.double(),))


@each_net
def test_a_training_step_is_that_of_the_masked_model(name: str) -> None:
    model, pruned = made(name)
    plan = record_of(pruned).plan
    masked = fxprune.mask(model, plan)
    losses = []
    for net in (pruned.train(), masked.train()):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
        if net is masked:
            fxprune.hold(net, plan, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            loss = net(X).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
