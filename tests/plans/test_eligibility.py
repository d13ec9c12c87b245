"""Each reason to leave a convolution dense, and each state of a model from which no plan can be made."""

import re
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxprune.errors import PlanError
from fxprune.plans.eligibility import check_model, check_weight, parameters_of_several_modules, skip_reason


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, 2 * self.weight, self.bias)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.conv2d(input, 2 * weight, bias)


class OnlyAName(nn.Conv2d):
    pass


def hooked(pre: bool) -> nn.Conv2d:
    conv = nn.Conv2d(16, 16, 3)
    if pre:
        conv.register_forward_pre_hook(lambda *_: None)
    else:
        conv.register_forward_hook(lambda *_: None)
    return conv


def patched() -> nn.Conv2d:
    conv = nn.Conv2d(16, 16, 3)
    conv.forward = types.MethodType(OwnForward.forward, conv)  # type: ignore[method-assign]
    return conv


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(64, 32, 1, stride=2, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(16, 16, 3).bfloat16(),
        OnlyAName(16, 16, 3),
    ],
    ids=["plain", "strided", "circular padding", "bfloat16", "subclass that changes nothing"],
)
def test_these_are_eligible(conv: nn.Conv2d) -> None:
    assert skip_reason(conv) == ""


@pytest.mark.parametrize(
    "module, reason",
    [
        (nn.Linear(16, 16), "Linear is not a convolution"),
        (
            OwnForward(16, 16, 3),
            "subclass OwnForward computes its own forward; only plain convolutions can",
        ),
        (OwnConvForward(16, 16, 3), "subclass OwnConvForward computes its own forward"),
        (patched(), "its forward was replaced"),
        (parametrizations.weight_norm(nn.Conv2d(16, 16, 3)), "is parametrized"),
        (hooked(pre=True), "has forward hooks"),
        (hooked(pre=False), "has forward hooks"),
        (nn.Conv2d(16, 16, 3, groups=16), "is depthwise already"),
        (nn.Conv2d(16, 32, 3, groups=4), r"is grouped already \(groups=4\)"),
        (nn.Conv2d(16, 16, 3, dtype=torch.complex64), "its weight is torch.complex64, not floating point"),
        (nn.Conv2d(3, 64, 7), r"too few input channels \(3 < 16\)"),
        (nn.Conv2d(15, 64, 3), r"too few input channels \(15 < 16\)"),
        (nn.Conv2d(1, 64, 3), r"too few input channels \(1 < 16\)"),
        (nn.Conv2d(64, 15, 3), r"too few filters \(15 < 16\)"),
    ],
)
def test_these_stay_dense(module: nn.Module, reason: str) -> None:
    assert re.search(reason, skip_reason(module))


def test_timm_same_padding_is_known_to_be_exact() -> None:
    layers = pytest.importorskip("timm.layers")
    assert skip_reason(layers.Conv2dSame(16, 16, 3)) == ""
    subclass = type("Conv2dSame", (layers.Conv2dSame,), {})  # same bare name, another class
    assert "computes its own forward" in skip_reason(subclass(16, 16, 3))


def test_a_weight_of_two_modules_is_found_but_not_a_module_used_twice() -> None:
    tied, other, twice = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
    other.weight = tied.weight
    shared = parameters_of_several_modules(nn.Sequential(tied, other, twice, twice))
    assert shared == {id(tied.weight)}
    assert skip_reason(tied, shared) == skip_reason(other, shared) == "shares its weight with another module"
    assert skip_reason(twice, shared) == ""


def test_one_module_that_owns_a_parameter_twice_does_not_share_it() -> None:
    module = nn.Module()
    module.a = module.b = nn.Parameter(torch.zeros(1))
    assert parameters_of_several_modules(module) == set()


def test_weights_need_finite_values() -> None:
    weight = torch.ones(2, 2, 1, 1)
    check_weight("conv", weight)
    weight[0, 0] = float("nan")
    weight[1, 1] = float("-inf")
    with pytest.raises(PlanError, match=r"^conv: 2 of 4 weights are NaN or infinite; .* with ignore=\('conv',\)$"):
        check_weight("conv", weight)
    with pytest.raises(PlanError, match=r"^conv: the weight is on the meta device and has no values; load"):
        check_weight("conv", weight.to("meta"))


def test_float_models_are_ready() -> None:
    check_model(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)))


def test_quantized_and_lazy_models_are_refused() -> None:
    quantized = type("Conv2d", (nn.Module,), {"__module__": "torch.ao.nn.quantized.modules.conv"})
    with pytest.raises(PlanError, match=r"^0: Conv2d is quantized; prune the floating-point model first"):
        check_model(nn.Sequential(quantized()))
    lazy = nn.Sequential(nn.Identity(), nn.LazyConv2d(16, 3))
    with pytest.raises(PlanError, match=r"^1: LazyConv2d is not initialized yet; run the model once first$"):
        check_model(lazy)
