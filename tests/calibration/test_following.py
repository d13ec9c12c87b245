"""What follows a convolution: the chains that a refit can use, and those that only look like one."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from fxprune.calibration.following import Following, follow
from fxprune.graph.memory import Memory
from fxprune.graph.tracing import trace

RELU = (0.0, math.inf)
RELU6 = (0.0, 6.0)


class Layers(nn.Module):
    """`conv` is looked at; `forward` is what `build` makes of the layers and the input."""

    def __init__(self, build: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.side = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.batch_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
        self.group_norm, self.plain_norm = nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False)
        self.relu, self.in_place, self.relu6 = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()
        self.leaky, self.gelu = nn.LeakyReLU(), nn.GELU()
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.build = build

    def forward(self, x: Tensor) -> Tensor:
        return self.build(self, x)


def found(build: Callable[[Any, Tensor], Tensor]) -> Following:
    gm = trace(Layers(build), (torch.ones(2, 4, 5, 5),)).module
    (conv,) = gm.graph.find_nodes(op="call_module", target="conv")
    return follow(gm, conv)


def added(first: Tensor, second: Tensor) -> Tensor:
    return first.add_(second)


def shared_relu(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.side(m.relu(m.norm(m.conv(x)))))


CHAINS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Following]] = {
    "nothing": (lambda m, x: m.conv(x), Following()),
    "norm": (lambda m, x: m.norm(m.conv(x)), Following("norm")),
    "norm without parameters": (lambda m, x: m.plain_norm(m.conv(x)), Following("plain_norm")),
    "norm, relu": (lambda m, x: m.relu(m.norm(m.conv(x))), Following("norm", None, RELU)),
    "norm, relu in place": (lambda m, x: m.in_place(m.norm(m.conv(x))), Following("norm", None, RELU)),
    "relu": (lambda m, x: m.conv(x).relu(), Following(None, None, RELU)),
    "relu_": (lambda m, x: m.conv(x).relu_(), Following(None, None, RELU)),
    "F.relu": (lambda m, x: F.relu(m.conv(x), inplace=True), Following(None, None, RELU)),
    "torch.relu": (lambda m, x: torch.relu(m.conv(x)), Following(None, None, RELU)),
    "relu6": (lambda m, x: m.relu6(m.norm(m.conv(x))), Following("norm", None, RELU6)),
    "F.relu6": (lambda m, x: F.relu6(m.conv(x)), Following(None, None, RELU6)),
    "shared relu": (shared_relu, Following("norm", None, RELU)),
    "add": (lambda m, x: m.conv(x) + x, Following(None, "x")),
    "add, on the right": (lambda m, x: x + m.norm(m.conv(x)), Following("norm", "x")),
    "norm, add, relu": (lambda m, x: m.relu(m.norm(m.conv(x)) + x), Following("norm", "x", RELU)),
    "add, relu6": (lambda m, x: m.relu6(m.conv(x) + m.side(x)), Following(None, "side", RELU6)),
    "torch.add": (lambda m, x: torch.add(m.norm(m.conv(x)), x).relu(), Following("norm", "x", RELU)),
    "iadd": (lambda m, x: operator.iadd(m.norm(m.conv(x)), x).relu(), Following("norm", "x", RELU)),
    "iadd into the other": (lambda m, x: operator.iadd(m.side(x), m.conv(x)).relu(), Following(None, "side", RELU)),
    "add method": (lambda m, x: m.norm(m.conv(x)).add(x).relu(), Following("norm", "x", RELU)),
    "add_": (lambda m, x: m.norm(m.conv(x)).add_(x).relu(), Following("norm", "x", RELU)),
    "add_ into the other": (lambda m, x: m.side(x).add_(m.conv(x)).relu(), Following(None, "side", RELU)),
    "add of a parameter": (lambda m, x: (m.conv(x) + m.gain).relu(), Following(None, "gain", RELU)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_each_chain_is_found(name: str) -> None:
    build, expected = CHAINS[name]
    assert found(build) == expected


def norm_read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    return y.relu() + y


def conv_read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y).relu() - y


def sum_read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x)) + x
    return y.relu() * y


def norm_used_twice(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)).relu() + m.norm(m.side(x))


OTHERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Following]] = {
    "norm with two readers": (norm_read_twice, Following("norm")),
    "convolution with two readers": (conv_read_twice, Following()),
    "sum with two readers": (sum_read_twice, Following("norm", "x")),
    "norm used twice": (norm_used_twice, Following()),
    "norm of the batch": (lambda m, x: m.batch_norm(m.conv(x)).relu(), Following()),
    "other norm": (lambda m, x: m.group_norm(m.conv(x)).relu(), Following()),
    "pre-activation": (lambda m, x: m.side(m.relu(m.norm(x + m.conv(m.relu(x))))), Following(None, "x")),
    "leaky": (lambda m, x: m.leaky(m.norm(m.conv(x))), Following("norm")),
    "gelu": (lambda m, x: m.gelu(m.conv(x)), Following()),
    "scaled sum": (lambda m, x: torch.add(m.conv(x), x, alpha=2).relu(), Following()),
    "scaled sum by method": (lambda m, x: m.norm(m.conv(x)).add(x, alpha=2).relu(), Following("norm")),
    "constant": (lambda m, x: (m.conv(x) + 1).relu(), Following()),
    "constant on the left": (lambda m, x: (1 + m.norm(m.conv(x))).relu(), Following("norm")),
    "difference": (lambda m, x: (m.conv(x) - x).relu(), Following()),
    "product": (lambda m, x: (m.norm(m.conv(x)) * x).relu(), Following("norm")),
    "view": (lambda m, x: m.conv(x)[:, :2].relu(), Following()),
    "concatenation": (lambda m, x: torch.cat([m.conv(x), x], 1).relu(), Following()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_more_is_found_than_is_there(name: str) -> None:
    build, expected = OTHERS[name]
    assert found(build) == expected


def test_the_double_of_a_value_has_no_other_branch() -> None:
    def doubled(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return torch.add(y, y).relu()

    assert found(doubled) == Following()


def written_after_the_norm(m: Any, x: Tensor) -> Tensor:
    other = m.side(x)
    y = m.norm(m.conv(x))
    other.mul_(2)
    return (y + other).relu()


def written_before_the_norm(m: Any, x: Tensor) -> Tensor:
    other = m.side(x)
    y = m.conv(x)
    other.mul_(2)
    return (m.norm(y) + other).relu()


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    other = m.side(x)
    y = m.conv(x)
    other[:, 1:].relu_()
    return (m.norm(y) + other).relu()


def written_earlier(m: Any, x: Tensor) -> Tensor:
    other = m.side(x)
    other.mul_(2)
    return (m.norm(m.conv(x)) + other).relu()


def written_later(m: Any, x: Tensor) -> Tensor:
    other = m.side(x)
    y = (m.norm(m.conv(x)) + other).relu()
    other.mul_(2)
    return y * other


WRITTEN_MEANWHILE = [written_after_the_norm, written_before_the_norm, written_through_a_view]


@pytest.mark.parametrize("build", WRITTEN_MEANWHILE)
def test_an_operand_that_is_written_in_between_is_not_used(build: Callable[[Any, Tensor], Tensor]) -> None:
    assert found(build) == Following("norm")


@pytest.mark.parametrize("build", [written_earlier, written_later])
def test_an_operand_may_be_written_before_or_after(build: Callable[[Any, Tensor], Tensor]) -> None:
    assert found(build) == Following("norm", "side", RELU)


@pytest.mark.parametrize("build", WRITTEN_MEANWHILE)
def test_without_a_look_at_memory_it_would_be_used(
    build: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "changes", lambda *_: False)
    assert found(build) == Following("norm", "side", RELU)


def test_without_the_other_branch_the_rectifier_behind_it_is_of_no_use() -> None:
    assert Following("norm", "x", RELU).without_other() == Following("norm")
    assert Following("norm", None, RELU).without_other() == Following("norm", None, RELU)


def test_a_residual_network_is_understood() -> None:
    gm = trace(resnet18(weights=None), (torch.ones(2, 3, 64, 64),)).module
    chains = {str(node.target): follow(gm, node) for node in gm.graph.nodes if "conv" in str(node.target)}
    assert chains["conv1"] == Following("bn1", None, RELU)
    for block in ("layer1.0", "layer3.1"):
        assert chains[f"{block}.conv1"] == Following(f"{block}.bn1", None, RELU)
        second = chains[f"{block}.conv2"]
        assert (second.norm, second.bounds) == (f"{block}.bn2", RELU)
        assert second.other is not None
    downsample = chains["layer2.0.conv2"]
    assert downsample.other == "layer2_0_downsample_1"
