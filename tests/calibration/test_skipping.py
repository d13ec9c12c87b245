"""Recovery does not compute branches that went, and makes the same steps as if it did."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equality import randomize
from recovery_harness import Depthwise, Residual, images, state_of
from torch import Tensor, fx, nn

import fxprune
from fxprune import PrunePlan
from fxprune.calibration import recovery, skipping
from fxprune.calibration.recovery import RECOVERED
from fxprune.graph.tracing import Trace


class WithBias(Residual):
    """Branches that end in a convolution with a bias, and an activation that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.first(x), inplace=True)
        x = F.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


class WithoutBias(WithBias):
    """The same without a bias: what remains is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False))


class AddedInPlace(Residual):
    """`y = f(x); y += x`, as torchvision's ResNets have it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in (self.first, self.second):
            y = block(x)
            y += x
            x = F.relu(y, inplace=True)
        return self.head(x.mean((2, 3)))


GOES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[str, ...]]]] = {
    "residual": (Residual, {"first.4": ("first.0", "first.1", "first.3", "first.4")}),
    "all": (AddedInPlace, {f"{name}.4": tuple(f"{name}.{i}" for i in (0, 1, 3, 4)) for name in ("first", "second")}),
    "in place": (AddedInPlace, {"first.4": ("first.0", "first.1", "first.3", "first.4")}),
    "a bias": (WithBias, {"first.2": ("first.0", "first.2")}),
    "no bias": (WithoutBias, {"first.2": ("first.0", "first.2")}),
    "depthwise": (Depthwise, {"block.7": ("block.0", "block.1", "block.3", "block.4", "block.6", "block.7")}),
}
STEPS = 12


def run(name: str, monkeypatch: pytest.MonkeyPatch, skips: bool = True) -> tuple[nn.Module, list[float], int]:
    """The result, the losses of all steps, and how often layers of branches were called while it learned."""
    kind, branches = GOES[name]
    model, data = randomize(kind()).float().eval(), images(48)
    plan = PrunePlan({}, branches=branches)
    masked = fxprune.mask(model, plan)
    losses: list[float] = []
    calls = 0
    loss, gone = recovery._Run._loss, {layer for names in branches.values() for layer in names}

    def noted(self: recovery._Run, batch: tuple[Tensor, ...]) -> Tensor:
        nonlocal calls
        called = {str(node.target) for node in self.student.graph.nodes if node.op == "call_module"}
        calls += len(called & gone)
        found = loss(self, batch)
        losses.append(float(found.detach()))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(recovery._Run, "_loss", noted)
        if not skips:
            patch.setattr(recovery, "without_branches", lambda pruned, names: pruned.module)
        result = fxprune.recover(model, masked, plan, data, steps=STEPS)
    fxprune.verify(fxprune.rewrite(result, plan, data[:2]), result, data[:2])
    return result, losses, calls


@pytest.mark.parametrize("name", GOES)
def test_the_steps_are_the_same_and_the_branches_are_not_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result, losses, calls = run(name, monkeypatch)
    other, expected, computed = run(name, monkeypatch, skips=False)
    assert (calls, computed > 0) == (0, True)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(set(losses)) > STEPS, "control: they move"
    for key, tensor in other.state_dict().items():
        torch.testing.assert_close(result.state_dict()[key], tensor, rtol=1e-3, atol=1e-4)
    done = getattr(result, RECOVERED)
    assert done.after == pytest.approx(getattr(other, RECOVERED).after, rel=1e-4)
    assert set(state_of(result)) == set(state_of(other)), "what was found is in the full network"


@pytest.mark.parametrize("name", ["residual", "in place", "a bias"])
def test_control_another_constant_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, losses, _ = run(name, monkeypatch)

    def zero(pruned: Trace, branch: object, graph: fx.Graph, stream: fx.Node, end: fx.Node) -> fx.Node:
        with graph.inserting_before(end):
            return graph.call_function(torch.zeros_like, (stream,))

    monkeypatch.setattr(skipping, "_constant", zero)
    _, wrong, _ = run(name, monkeypatch)
    assert losses[0] != pytest.approx(wrong[0], rel=1e-3)
