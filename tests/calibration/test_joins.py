"""Joins: which sums and concatenations a value has to pass, and how much of them it is."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.calibration.joins import joins_after, share_of_own
from fxprune.calibration.lockstep import Lockstep
from fxprune.graph.tracing import trace


class Branches(nn.Module):
    """A stream, a branch of two convolutions that is added, and one that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.inner = nn.Conv2d(16, 16, 1)
        self.outer = nn.Conv2d(16, 16, 1)
        self.side = nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.last(torch.cat([x, self.side(x)], 1))


def branches() -> Branches:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branches().eval()


def images() -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_joins_with_what_does_not_depend_on_the_value() -> None:
    graph = trace(branches(), images()).module
    nodes = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    found = joins_after(graph, nodes)
    names = {name: [(join.node.name, [t.name for t in join.own]) for join in joins] for name, joins in found.items()}
    # All that the stem writes comes of it; the sum goes into both terms of the concatenation.
    assert names == {
        "stem": [],
        "inner": [("add", ["outer"])],
        "outer": [("add", ["outer"])],
        "side": [("cat", ["side"])],
        "last": [],
    }


def test_shares_by_hand() -> None:
    model, data = branches(), images()
    graph = trace(model, data).module
    nodes = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    joins = joins_after(graph, nodes)
    shares = {}
    with torch.no_grad(), Lockstep(graph, graph, [(data[:5],), (data[5:],)]) as network:
        for name in ("inner", "side"):
            (join,) = joins[name]
            shares[name] = share_of_own(join, [sample for sample, _ in network.pause_before(join.node.name)])
        x = model.stem(data).relu()
        y = model.outer(model.inner(x).relu())
        z = model.side(x + y)

    def variance(value: Tensor) -> float:
        return float(value.var((0, 2, 3), correction=0).sum())

    assert shares["inner"] == pytest.approx(variance(y) / variance(x + y), rel=0.2)  # means are those of each batch
    assert shares["side"] == pytest.approx(variance(z) / (variance(z) + variance(x + y)), rel=0.2)
    assert all(0 < share < 0.9 for share in shares.values())


def test_a_layer_inside_of_a_weak_branch_suffers_little() -> None:
    damages = {}
    for scale in (1.0, 0.1):
        model = branches()
        with torch.no_grad():
            model.outer.weight.mul_(scale)
        table = fxprune.measure_sensitivity(model, calibration=images())
        damages[scale] = {layer.name: layer.at(0.5) for layer in table.layers}
    weak, strong = damages[0.1], damages[1.0]
    assert 0.005 < weak["inner"] / strong["inner"] < 0.05  # about the square of the scale
    assert weak["last"] == pytest.approx(strong["last"], rel=0.5)


class Clipped(nn.Module):
    """Two alike convolutions before rectifiers; the bias of one puts it far beyond the upper bound nearly always."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.conv = nn.Conv2d(16, 16, 1)
        self.act = nn.ReLU6()
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(self.stem(x))))


def test_what_is_cut_off_neither_counts_as_signal_nor_as_error() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Clipped().eval()
    with torch.no_grad():  # half of the filters vary by much where nothing passes, and are exact with two channels
        assert model.conv.bias is not None
        model.conv.weight[:8] = 0
        model.conv.weight[:8, :2] = 100
        model.conv.bias[:8] = -1e4
    options = {"calibration": images(), "groups": 1, "ignore": ("stem", "head")}
    (clipped,) = fxprune.measure_sensitivity(model, **options).layers  # type: ignore[arg-type]
    model.act = nn.Identity()  # type: ignore[assignment]
    (whole,) = fxprune.measure_sensitivity(model, **options).layers  # type: ignore[arg-type]
    assert clipped.at(0.875) > 100 * whole.at(0.875)
