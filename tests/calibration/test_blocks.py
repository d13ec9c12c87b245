"""Where blocks end: in residual, plain, dense and U-shaped networks, and where nothing is known."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import torch
import torch.nn.functional as F
from recovery_harness import NETS, images, net_of
from torch import Tensor, nn

from fxprune.calibration.blocks import block_ends, up_to
from fxprune.graph.tracing import trace


def ends(model: nn.Module, example: Tensor | None = None) -> list[str]:
    traced = trace(model.eval(), images(2) if example is None else example)
    return [node.name for node in block_ends(traced.module, traced.values)]


def conv(inputs: int = 8, outputs: int = 8, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def test_a_residual_network_ends_its_blocks_with_the_rectifier_behind_each_addition() -> None:
    assert ends(net_of("residual")) == ["relu", "relu_1", "relu_2"]  # the first is where the first block begins


def test_a_plain_network_ends_them_where_the_maps_get_smaller() -> None:
    assert ends(net_of("plain")) == ["_3", "_6"]


def test_where_a_branch_begins_a_block_ends() -> None:
    assert ends(net_of("depthwise")) == ["project_4", "add"]


class Dense(nn.Module):
    """Each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.last = conv(3, 8), conv(8, 8), conv(16, 8), conv(24, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        c = self.c(torch.cat([a, b], 1))
        return self.last(torch.cat([a, b, c], 1))


def test_dense_layers_count_once_and_their_concatenation_at_the_end() -> None:
    assert ends(Dense()) == ["a", "b", "cat_1"]


class Up(nn.Module):
    """Down, up, and the way across."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        return self.c(torch.cat([a, F.interpolate(b, scale_factor=2)], 1))


def test_a_u_net_ends_them_where_the_ways_part_and_meet() -> None:
    assert ends(Up()) == ["relu", "cat"]


class Squeeze(nn.Module):
    """A gate inside a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.gate = conv(3, 8), conv(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x)
        return x + y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))


def test_what_is_pooled_beside_the_stream_is_no_end() -> None:
    assert ends(Squeeze()) == ["stem", "add"]


def test_sizes_that_are_added_are_no_blocks() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x + 1)) * (x.shape[2] + x.shape[3])

    assert ends(Sizes()) == ["mul"]  # what it returns


def test_without_a_block_it_is_what_the_network_returns() -> None:
    assert ends(nn.Sequential(conv(3, 8), nn.ReLU(), conv())) == ["_2"]
    unknown = trace(nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv()).eval(), images(2)).module
    assert [node.name for node in block_ends(unknown, {})] == ["_3"]


def test_the_input_is_no_end() -> None:
    assert ends(nn.Sequential(nn.AvgPool2d(2), conv(3, 8))) == ["_1"]


def test_a_network_up_to_its_ends_gives_what_they_give() -> None:
    for name in NETS:
        model = net_of(name)
        traced = trace(model, images(2))
        found = [node.name for node in block_ends(traced.module, traced.values)]
        given = up_to(traced.module, found)(images(2))
        kept: dict[str, Tensor] = {}

        class Keep(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Tensor:
                value = super().run_node(n)
                kept[n.name] = value  # noqa: B023  # run at once
                return value

        Keep(traced.module).run(images(2))
        assert len(given) == len(found) > 0
        assert all(torch.equal(value, kept[end]) for value, end in zip(given, found, strict=True))
        assert len(up_to(traced.module, found).graph.nodes) < len(traced.module.graph.nodes)  # the head is cut off
