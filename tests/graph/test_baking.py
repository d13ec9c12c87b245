"""Computed weights become plain parameters, and nothing else changes."""
# Functions of torch.nn.utils are untyped.
# mypy: disable-error-code="no-untyped-call, no-any-return"

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same_function, masked_by_hand, outputs
from removal_harness import zeroed
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxprune
from fxprune.errors import PlanError
from fxprune.exact.record import record_of
from fxprune.graph.baking import baked


class Standardized(nn.Conv2d):
    """Weight standardisation as published."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(input, weight, self.bias)


class Standardized1d(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=1)
        return F.conv1d(input, weight, bias=self.bias, padding=self.padding)


class Dynamic(nn.Conv2d):
    """Its weight depends on what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * input.mean(), self.bias)


class Scaled(nn.Conv2d):
    """It does more than convolve."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Noisy(nn.Conv2d):
    """Its weight is another one in training."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight * 2 if self.training else self.weight
        return self._conv_forward(input, weight, self.bias)


def conv(kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return kind(16, 16, 3, padding=1)


def legacy(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make(conv())


def masked(net: nn.Module) -> nn.Module:
    prune.random_unstructured(net, "weight", 0.3)
    return net


KINDS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "spectral_norm": lambda: parametrizations.spectral_norm(conv()),
    "orthogonal": lambda: parametrizations.orthogonal(conv()),
    "old weight_norm": lambda: legacy(nn.utils.weight_norm),
    "old spectral_norm": lambda: legacy(nn.utils.spectral_norm),
    "pruning mask": lambda: masked(conv()),
    "standardized": lambda: conv(Standardized),
    "standardized and normed": lambda: parametrizations.weight_norm(conv(Standardized)),
}
STAY: dict[str, Callable[[], nn.Module]] = {
    "dynamic": lambda: conv(Dynamic),
    "more than a convolution": lambda: conv(Scaled),
    "another weight in training": lambda: conv(Noisy),
    "plain": conv,
}


def net(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), middle, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays_and_the_weight_is_a_parameter(kind: str) -> None:
    model = net(KINDS[kind]()).double().eval()
    expected = model(X)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, names = baked(model)
    assert names == ("2",)
    module = plain.get_submodule("2")
    assert type(module) is nn.Conv2d
    assert isinstance(module._parameters["weight"], nn.Parameter)
    torch.testing.assert_close(plain(X), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the user's model"
    assert type(model[2]) is not nn.Conv2d or model[2]._forward_pre_hooks


@pytest.mark.parametrize("kind", STAY)
def test_what_is_no_plain_convolution_stays(kind: str) -> None:
    model = net(STAY[kind]()).eval()
    plain, names = baked(model)
    assert names == ()
    assert type(plain.get_submodule("2")) is type(model[2])
    torch.testing.assert_close(plain(X.float()), model(X.float()))


def test_a_convolution_over_sequences_is_baked() -> None:
    model = nn.Sequential(Standardized1d(4, 6, 3, padding=1)).double()
    plain, names = baked(model)
    assert names == ("0",)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(plain(x), model(x))


def test_a_shared_module_is_baked_everywhere() -> None:
    shared = conv(Standardized)
    plain, names = baked(nn.Sequential(shared, nn.ReLU(), shared))
    assert names == ("0",)
    assert plain.get_submodule("0") is plain.get_submodule("2")


@pytest.mark.parametrize("kind", KINDS)
def test_compile_prunes_what_is_baked(kind: str, tmp_path: Path) -> None:
    model = net(KINDS[kind]()).double().eval()
    left = fxprune.compile(model, 0.5, example_inputs=X)
    assert "2" not in record_of(left).plan.layers
    pruned = fxprune.compile(model, 0.5, example_inputs=X, bake=True)
    plan = record_of(pruned).plan
    assert plan.baked == ("2",)
    assert list(plan.layers) == ["2", "5"]
    assert "note: 2: its weight was computed, and is a plain one now" in str(fxprune.report(pruned))
    again = fxprune.rewrite(fxprune.mask(model, plan, bake=True), plan, X)
    torch.testing.assert_close(outputs(again, [X], "eval"), outputs(pruned, [X], "eval"))
    assert_same_function(pruned, masked_by_hand(baked(model)[0], plan), (X,))
    assert type(plan).from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match=r"2: the plan prunes its weight, but the .* computes another; mask with"):
        fxprune.mask(model, plan)
    fxprune.save(pruned, tmp_path / "net.pt")
    loaded = fxprune.load(tmp_path / "net.pt", net(KINDS[kind]()).double()).eval()
    assert torch.equal(loaded(X), pruned.eval()(X))


@pytest.mark.parametrize("kind", ["weight_norm", "standardized"])
def test_filters_go_from_what_is_baked(kind: str) -> None:
    model = net(KINDS[kind]()).double().eval()
    plan = fxprune.make_plan(model, 0.5, granularity="filter", example_inputs=X, bake=True)
    assert len(plan.removed["2"].outputs) == 8
    pruned = fxprune.rewrite(fxprune.mask(model, plan, bake=True), plan, X)
    assert_same_function(pruned, zeroed(baked(model)[0], plan), (X,))


def test_plans_without_baking_are_written_as_before() -> None:
    plan = fxprune.make_plan(net(conv()), 0.5)
    assert plan.baked == ()
    assert "baked" not in plan.to_json()


def test_standardised_convolutions_of_timm() -> None:
    std = pytest.importorskip("timm.layers.std_conv")
    for kind in (std.StdConv2d, std.ScaledStdConv2d):
        model = (
            net(kind(16, 16, 3, padding=1, **({"bias": True} if kind is std.ScaledStdConv2d else {}))).double().eval()
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        plain, names = baked(copy.deepcopy(model))
        assert names == ("2",)
        torch.testing.assert_close(plain(X), model(X), rtol=1e-10, atol=1e-10)
