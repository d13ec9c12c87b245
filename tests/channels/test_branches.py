"""Which residual branches can go, and why others stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fxprune.channels.branches import residual_branches
from fxprune.graph.tracing import trace


class Net(nn.Module):
    """Applies `run(self, stream)` behind a stem."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.run = nn.Conv2d(3, 4, 1), run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.stem(x))


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def found(net: nn.Module) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    traced = trace(net, (torch.randn(2, 3, 6, 6),))
    branches, refused = residual_branches(traced.module, traced.values)
    return {name: branch.modules for name, branch in branches.items()}, refused


def test_a_branch_has_all_that_serves_it_alone() -> None:
    def gated(net: Any, s: Tensor) -> Tensor:
        b = net.a(s)
        return s + net.norm(net.b(b * net.gate(F.adaptive_avg_pool2d(b, 1)).sigmoid()))

    net = Net(gated, a=conv(), gate=nn.Conv2d(4, 4, 1), b=conv(), norm=nn.BatchNorm2d(4))
    assert found(net) == ({"norm": ("a", "gate", "b", "norm")}, {})


def test_either_order_of_the_sum() -> None:
    assert found(Net(lambda net, s: torch.add(net.a(s), s), a=conv()))[0] == {"a": ("a",)}


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(lambda: Net(lambda net, s: net.a(s) + net.b(s), a=conv(), b=conv()), id="two of equal rank"),
        pytest.param(lambda: Net(lambda net, s: torch.relu(s) + net.a(s), a=conv()), id="of another value"),
        pytest.param(lambda: Net(lambda net, s: torch.cat([s, net.a(s)], 1), a=conv()), id="no sum"),
        pytest.param(lambda: Net(lambda net, s: torch.add(s, net.a(s), alpha=2), a=conv()), id="a weighted sum"),
    ],
)
def test_no_branch(net: Callable[[], nn.Module]) -> None:
    assert found(net()) == ({}, {})


def test_a_value_with_another_reader_is_no_branch() -> None:
    def twice(net: Any, s: Tensor) -> Tensor:
        b = net.a(s)
        return s + b + b.mean()

    assert found(Net(twice, a=conv()))[0] == {}


def _in_place(net: Any, s: Tensor) -> Tensor:
    return s + net.a(F.relu(s, inplace=True))


def _into_stream(net: Any, s: Tensor) -> Tensor:
    return s.add_(net.a(s))


def _hooked() -> nn.Module:
    net = Net(lambda net, s: s + net.a(s), a=conv())
    net.get_submodule("a").register_forward_hook(lambda *_: None)
    return net


def _tied() -> nn.Module:
    net = Net(lambda net, s: net.b(s + net.a(s)), a=conv(), b=conv())
    net.get_submodule("b").weight = net.get_submodule("a").weight
    return net


@pytest.mark.parametrize(
    "net, reason",
    [
        pytest.param(
            lambda: Net(lambda net, s: s + net.a(s).mean((2, 3), keepdim=True), a=conv()), "it ends in mean", id="mean"
        ),
        pytest.param(
            lambda: Net(lambda net, s: s + net.n(net.a(s)), a=conv(), n=nn.GroupNorm(2, 4)), "GroupNorm", id="norm"
        ),
        pytest.param(
            lambda: Net(lambda net, s: s + net.n(net.a(s)), a=conv(), n=nn.BatchNorm2d(4, affine=False)),
            "no weight of its own",
            id="no weight",
        ),
        pytest.param(
            lambda: Net(lambda net, s: s + net.a(s), a=weight_norm(conv())), "no weight of its own", id="computed"
        ),
        pytest.param(_hooked, "hooks", id="hooks"),
        pytest.param(_tied, "shares its parameters", id="tied"),
        pytest.param(
            lambda: Net(lambda net, s: net.a(s + net.a(s)), a=conv()), "layer a is called elsewhere", id="called twice"
        ),
        pytest.param(
            lambda: Net(lambda net, s: s + net.a(net.n(s)) + net.n(s), a=conv(), n=nn.BatchNorm2d(4)),
            "layer n is called elsewhere",
            id="statistics elsewhere",
        ),
        pytest.param(lambda: Net(lambda net, s: s + net.a(s), a=nn.Conv2d(4, 4, 6)), "another shape", id="broadcast"),
        pytest.param(lambda: Net(_in_place, a=conv()), "in place", id="stream changed on the way"),
        pytest.param(lambda: Net(_into_stream, a=conv()), "in place", id="added into the stream"),
    ],
)
def test_why_a_branch_stays(net: Callable[[], nn.Module], reason: str) -> None:
    branches, refused = found(net())
    assert branches == {}
    (told,) = refused.values()
    assert reason in told
