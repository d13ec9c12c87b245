"""A refit after training, with BatchNorm as it is now; behind a frozen BatchNorm; before stochastic depth."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import copy
from typing import Any

import pytest
import torch
from equality import randomize
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import fxprune
from fxprune.calibration.following import Following, end_of, follow
from fxprune.calibration.least_squares import parts_that_stay
from fxprune.calibration.refitting import FITS
from fxprune.calibration.subject import Subject
from fxprune.errors import PlanError, PoorAgreementWarning
from fxprune.plans.masking import kept_entries
from fxprune.vocabulary import Output

pytestmark = pytest.mark.filterwarnings(f"ignore::{PoorAgreementWarning.__module__}.{PoorAgreementWarning.__name__}")


class DropPath(nn.Module):
    """Stochastic depth as repositories write it: nothing in evaluation mode, and nothing that a tracer follows else."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.5) / 0.5


class Net(nn.Module):
    """A residual block between a stem and a classifier, with a norm of any kind."""

    def __init__(self, norm: Any = nn.BatchNorm2d, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16)
        self.drop = nn.Identity() if drop is None else drop
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        y = self.norm1(self.conv1(x)).relu()
        x = (x + self.drop(self.norm2(self.conv2(y)))).relu()
        return self.fc(x.mean((2, 3)))


def network(norm: Any = nn.BatchNorm2d, drop: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = randomize(Net(norm, drop)).eval()
    return model


def images(count: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def apart(model: nn.Module, other: nn.Module) -> float:
    """The relative squared error of the output, on images that nobody was fitted to."""
    with torch.no_grad():
        wanted, found = model(images(64, 9)), other(images(64, 9))
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def trained(masked: nn.Module) -> nn.Module:
    """What training may leave behind the stem, which no refit changes: other weights, and a BatchNorm with other
    statistics, scales and shifts. What is zero stays zero.
    """
    torch.manual_seed(3)
    result = copy.deepcopy(masked)
    for name, module in result.named_modules():
        if name.startswith("stem"):
            continue
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 1 + 0.2 * torch.randn_like(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            assert isinstance(module.running_mean, Tensor)
            assert isinstance(module.running_var, Tensor)
            module.running_mean += 0.3 * torch.randn(16)
            module.running_var *= 1 + torch.rand(16)
            module.weight.data *= 1 + 0.3 * torch.rand(16)
            module.bias.data *= 1 + 0.3 * torch.randn(16)
    return result


PLANS: dict[str, dict[str, Any]] = {
    "kernels": {"ratio": 0.5, "ignore": "stem"},
    "filters": {"ratio": 0.25, "granularity": "filter"},
    "both": {"granularity": {"filter": 0.25, "kernel": 0.25}},
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_refit_mends_what_changed_since_the_first(kind: str) -> None:
    model = network()
    plan = fxprune.make_plan(model, calibration=images(), **PLANS[kind])
    masked = fxprune.mask(model, plan, images())
    start = trained(masked)
    before, state = copy.deepcopy(start.state_dict()), copy.deepcopy(model.state_dict())
    again = fxprune.refit(model, start, plan, images())
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert apart(model, again) < 0.3 * apart(model, start)
    assert apart(model, again) < 1.5 * apart(model, masked)
    assert not any(again.state_dict()[name][~stays].any() for name, stays in kept_entries(model, plan).items())
    changed = {name for name, value in again.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.endswith(("weight", "fc.bias", "running_mean")) for name in changed)
    assert not any("norm" in name and not name.endswith("running_mean") for name in changed)
    assert set(getattr(again, FITS)) == {name.rpartition(".")[0] for name in changed if "norm" not in name}
    assert fxprune.verify(fxprune.rewrite(again, plan, images(2)), again, images(2))


def test_a_refit_against_the_dense_batch_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: the scale and shift of the dense network taken for those of the trained one."""
    model = network()
    plan = fxprune.make_plan(model, calibration=images(), **PLANS["kernels"])
    start = trained(fxprune.mask(model, plan, images()))
    right = apart(model, fxprune.refit(model, start, plan, images()))
    honest = fxprune.calibration.samples.affine_of
    first: list[Any] = []

    def of_the_dense(following: Following, sample: Any, *rest: Any) -> Any:
        first.append(sample)
        return honest(following, first[-1 if len(first) % 2 else -2], *rest)

    monkeypatch.setattr("fxprune.calibration.samples.affine_of", of_the_dense)
    assert apart(model, fxprune.refit(model, start, plan, images())) > 3 * right


def test_where_nothing_changed_a_refit_stays_as_good() -> None:
    model = network()
    plan = fxprune.make_plan(model, calibration=images(), **PLANS["kernels"])
    masked = fxprune.mask(model, plan, images())
    assert apart(model, fxprune.refit(model, masked, plan, images())) < 1.1 * apart(model, masked)


def test_what_is_not_pruned_by_the_plan_is_refused() -> None:
    model = network()
    plan = fxprune.make_plan(model, calibration=images(), **PLANS["kernels"])
    with pytest.raises(PlanError, match=r"conv1\.weight: the plan drops entries that are not zero"):
        fxprune.refit(model, model, plan, images())
    with pytest.raises(PlanError, match="plan"):
        fxprune.refit(nn.Sequential(nn.Conv2d(3, 4, 3)), model, plan, images())


def test_parts_are_the_filters_that_read_alike() -> None:
    stays = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0]]).bool()
    parts = {tuple(outputs.tolist()): columns.tolist() for outputs, columns in parts_that_stay(stays, 2)}
    assert parts == {(0, 2): [0, 1, 4, 5], (3,): [2, 3]}


@pytest.mark.parametrize("output", ["graph", "module"])
def test_a_frozen_batch_norm_is_followed_and_gets_the_intercept(output: Output) -> None:
    model = network(FrozenBatchNorm2d, DropPath())
    subject = Subject(model, None, images(), output)
    nodes = {str(node.target): node for node in subject.network.graph.nodes if node.op == "call_module"}
    found = follow(subject.network, nodes["conv1"])
    assert (found.norm, found.bounds) == ("norm1", (0.0, float("inf")))
    assert found.frozen is not None
    end = follow(subject.network, nodes["conv2"])
    assert (end.norm, end.bounds) == ("norm2", (0.0, float("inf")))  # behind DropPath, which a trace keeps
    assert end.other is not None
    (total,) = nodes["fc"].all_input_nodes[0].all_input_nodes[0].all_input_nodes
    assert end_of(subject.network, nodes["conv2"], end) is total
    assert end_of(subject.network, nodes["conv1"], found).all_input_nodes[1].name == found.frozen[1]
    pruned = fxprune.compile(model, calibration=images(), output=output, **PLANS["kernels"])
    plan = fxprune.make_plan(model, calibration=images(), output=output, **PLANS["kernels"])
    masked = fxprune.mask(model, plan, images())
    assert not torch.equal(masked.state_dict()["norm1.running_mean"], model.state_dict()["norm1.running_mean"])
    assert apart(model, masked) < 0.5 * apart(model, fxprune.mask(model, plan))
    assert apart(masked, pruned) < 1e-6


@pytest.mark.parametrize("factor, through", [(1.0, True), (2.0, False)])
def test_only_what_gives_back_its_input_is_looked_through(factor: float, through: bool) -> None:
    class Scaled(DropPath):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if factor == 1.0 or self.training else x * factor

    subject = Subject(network(drop=Scaled()), None, images(), "graph")
    (node,) = subject.network.graph.find_nodes(op="call_module", target="conv2")
    assert (follow(subject.network, node).other is not None) == through


def test_a_frozen_batch_norm_that_is_none_keeps_its_mean() -> None:
    class Other(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
        def forward(self, x: Tensor) -> Tensor:
            scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
            return x * scale + (self.bias - self.running_mean * 2).reshape(1, -1, 1, 1)

    subject = Subject(network(Other), None, images(), "graph")
    (node,) = subject.network.graph.find_nodes(op="call_module", target="conv1")
    assert follow(subject.network, node).norm is None
