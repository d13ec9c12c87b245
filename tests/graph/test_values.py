"""Values that are carried from pass to pass are those that a run of the rewritten graph gives."""

from collections.abc import Callable

import pytest
import torch
from passes_harness import gather, image
from torch import Tensor, fx, nn

import fxprune.graph.values as values_module
from fxprune.graph.editing import gather_before
from fxprune.graph.tracing import trace
from fxprune.graph.values import CarriedValues, meta_values

META = (image().to("meta"),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that were run on meta tensors."""
    done: list[fx.GraphModule] = []
    run: Callable[..., object] = meta_values

    def counted(gm: fx.GraphModule, inputs: tuple[object, ...]) -> object:
        done.append(gm)
        return run(gm, inputs)

    monkeypatch.setattr(values_module, "meta_values", counted)
    return done


def graph() -> tuple[fx.GraphModule, fx.Node]:
    gm = trace(Net().double(), image()).module
    return gm, next(node for node in gm.graph.nodes if node.name == "b")


def same(found: object, expected: object) -> bool:
    assert isinstance(found, dict)
    assert isinstance(expected, dict)
    shapes = [{node: (v.shape, v.dtype, v.device) for node, v in side.items()} for side in (found, expected)]
    return shapes[0] == shapes[1]


def test_only_new_gathers_are_found_anew(runs: list[fx.GraphModule]) -> None:
    gm, node = graph()
    runs.clear()
    carried = CarriedValues(META)
    carried.of(gm)
    gather_before(gm, node, gather((0, 0, 2), 4))
    gather_before(gm, node, gather((1, 1, 0, 2, 2, 2), 3))
    node.args = (node.all_input_nodes[0].all_input_nodes[0].all_input_nodes[0],)  # b reads four channels
    assert same(carried.of(gm), meta_values(gm, META)[0])
    assert len(runs) == 1


def test_another_new_node_runs_the_graph_again(runs: list[fx.GraphModule]) -> None:
    gm, node = graph()
    runs.clear()
    carried = CarriedValues(META)
    carried.of(gm)
    with gm.graph.inserting_after(node):
        gm.graph.call_function(torch.flatten, (node, 1))
    assert same(carried.of(gm), meta_values(gm, META)[0])
    assert len(runs) == 2
    carried.forget()
    carried.of(gm)
    assert len(runs) == 3


def test_what_a_trace_knows_is_not_found_again(runs: list[fx.GraphModule]) -> None:
    found = trace(Net().double(), image())
    runs.clear()
    assert same(CarriedValues(found.inputs, found.values).of(found.module), dict(found.values))
    assert not runs
    assert CarriedValues(()).of(found.module) == {}
