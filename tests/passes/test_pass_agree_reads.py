"""AgreeReads: a layer that is called at several places reads in one order at all of them, and the function stays."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.exact.placements import PlacementError, placements
from fxprune.exact.verification import difference
from fxprune.graph.editing import calls
from fxprune.graph.layers import ChannelGather
from fxprune.graph.tracing import trace
from fxprune.graph.values import CarriedValues
from fxprune.passes import AgreeReads


class Pyramid(nn.Module):
    """A head on two levels, of which one is read by a function too."""

    def __init__(self, seen: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.first, self.second = (ChannelGather(torch.randperm(8), 8, -3) for _ in range(2))
        self.head, self.seen = nn.Conv2d(8, 4, 1), seen

    def forward(self, x: Tensor) -> Any:
        low, high = self.a(x), self.b(x).relu()
        results = self.head(self.first(low)), self.head(self.second(high))
        return (*results, high) if self.seen else results


def prepared(seen: bool = False) -> tuple[Pyramid, fx.GraphModule, CarriedValues]:
    torch.manual_seed(0)
    net = Pyramid(seen).eval()
    traced = trace(net, torch.zeros(2, 3, 8, 8))
    return net, traced.module, CarriedValues(traced.inputs, traced.values)


def same(net: nn.Module, gm: fx.GraphModule) -> bool:
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        gm.recompile()
        return difference(gm(x), net(x))[1] <= 1e-6


def test_the_head_reads_in_one_order_and_can_be_a_part_of_a_module() -> None:
    net, gm, values = prepared()
    with pytest.raises(PlacementError, match="head: its calls ask for different orders"):
        placements(gm, dict(net.named_modules()))
    outcome = AgreeReads(values)(gm)
    assert outcome.rewritten
    assert not outcome.skipped
    assert same(net, gm)
    placed = placements(gm, dict(net.named_modules()))
    assert placed["head"][0] is not None
    assert torch.equal(placed["head"][0], net.first.index)


def test_what_is_seen_in_its_order_cannot_be_given_in_another() -> None:
    net, gm, values = prepared(seen=True)
    outcome = AgreeReads(values)(gm)
    assert [skip.node for skip in outcome.skipped] == ["head"]
    assert not outcome.rewritten
    assert same(net, gm)


def test_where_all_agree_nothing_is_done() -> None:
    _, gm, values = prepared()
    for _, gather in calls(gm, ChannelGather):
        gather.index.copy_(torch.arange(8).flip(0))
    before = len(gm.graph.nodes)
    assert AgreeReads(values)(gm).rewritten == ()
    assert len(gm.graph.nodes) == before
