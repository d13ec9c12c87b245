"""Contexts that forward enters stay where they are, and none is left behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.graph.contexts import contexts_restored, is_switch
from fxprune.graph.tracing import trace
from fxprune.passes import MergeGathers

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.trunk(x))
        return y


class FrozenTrunk(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.trunk(x)
        z: Tensor = self.head(y)
        return z


class FrozenByDecorator(Net):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.trunk(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        return y


class FrozenByCall(Net):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        y = self.trunk(x)
        torch.set_grad_enabled(before)
        z: Tensor = self.head(y)
        return z


class Low(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.trunk(x)
        z: Tensor = self.head(y.float())
        return z


class High(Net):
    """Must stay in float32 whatever the caller does."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        with torch.autocast("cpu", enabled=False):
            z: Tensor = self.head(y.float())
        return z


def gradients(model: nn.Module, part: str) -> bool:
    """Whether a part of the model gets gradients."""
    model.zero_grad()
    model(X).sum().backward()
    return any(p.grad is not None for name, p in model.named_parameters() if name.startswith(part))


@pytest.mark.parametrize("kind", [FrozenTrunk, FrozenByDecorator, FrozenByCall])
def test_what_is_frozen_stays_frozen(kind: type[Net]) -> None:
    model = kind().train()
    pruned = fxprune.compile(model, 0.5, example_inputs=X).train()
    assert fxprune.report(pruned).rewritten == 3
    for found in (model, pruned):
        assert not gradients(found, "trunk")
        assert gradients(found, "head")
    assert gradients(fxprune.compile(Net(), 0.5, example_inputs=X), "trunk")  # control


@pytest.mark.parametrize("kind", [FrozenTrunk, FrozenByDecorator])
def test_the_mode_of_the_caller_comes_back(kind: type[Net]) -> None:
    pruned = fxprune.compile(kind().eval(), 0.5, example_inputs=X)
    with torch.no_grad():
        pruned(X)
        assert not torch.is_grad_enabled()
        assert not pruned(X).requires_grad
    pruned(X)
    assert torch.is_grad_enabled()


def test_autocast_stays_where_it_is() -> None:
    model = Low().eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=X)
    for found in (model, pruned):
        seen: list[torch.dtype] = []
        handle = found.get_submodule("trunk.3").register_forward_hook(lambda _, __, y, seen=seen: seen.append(y.dtype))
        assert found(X).dtype == torch.float32
        handle.remove()
        assert seen == [torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_that_is_switched_off_inside() -> None:
    model = High().eval()
    pruned = fxprune.compile(model, 0.5, example_inputs=X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(X).dtype == torch.float32
        assert pruned(X).dtype == torch.float32
        assert fxprune.compile(Net().eval(), 0.5, example_inputs=X)(X).dtype == torch.bfloat16  # control


def test_a_graph_with_contexts_exports_and_copies() -> None:
    import copy

    pruned = fxprune.compile(FrozenTrunk().eval(), 0.5, example_inputs=X)
    torch.testing.assert_close(copy.deepcopy(pruned)(X), pruned(X))
    exported = torch.export.export(pruned, (X,)).module()
    torch.testing.assert_close(exported(X), pruned(X))


def test_equal_gathers_on_both_sides_of_a_context_are_not_shared() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3)
            self.left, self.right = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            with torch.no_grad():
                left = self.left(y)
            right: Tensor = self.right(y)
            both: Tensor = left + right
            return both

    torch.manual_seed(0)
    model = Both()
    with torch.no_grad():
        model.right.weight.copy_(model.left.weight)  # the same groups, so the same gathers
    pruned = fxprune.compile(model, 0.6, example_inputs=X)
    assert gradients(pruned, "stem")
    assert gradients(model, "stem")


def test_inference_mode_is_refused_inside_and_works_around() -> None:
    class Inference(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                y: Tensor = self.head(self.trunk(x))
            return y

    with pytest.raises(TraceError, match="inference_mode"):
        fxprune.compile(Inference(), 0.5, example_inputs=X, output="graph")
    assert type(fxprune.compile(Inference(), 0.5, example_inputs=X)) is Inference
    with torch.inference_mode():
        assert fxprune.report(fxprune.compile(Net().eval(), 0.5, example_inputs=X)).rewritten == 3


def test_nothing_is_left_behind_by_a_graph_that_fails_inside() -> None:
    module = trace(Low().eval(), X).module
    assert sum(is_switch(node) for node in module.graph.nodes) == 2
    with pytest.raises(RuntimeError), contexts_restored():
        module(torch.zeros(2, 5, 8, 8))
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_the_order_of_autocast_is_that_of_torch_after_tracing() -> None:
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    trace(Low().eval(), X)
    assert (torch.autocast.__enter__, torch.autocast.__exit__) == (enter, leave)

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu"):
                raise ValueError("inside")

    with pytest.raises(TraceError):
        trace(Fails(), X)
    assert (torch.autocast.__enter__, torch.autocast.__exit__) == (enter, leave)
    assert not torch.is_autocast_enabled("cpu")
    assert MergeGathers()(trace(Net(), X).module).rewritten == ()
