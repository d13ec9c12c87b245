"""Where the blocks of a network end: the values by which a pruned copy is compared with the dense network.

A block is what a network repeats: the convolutions between two residual additions, or between two changes of
resolution. Inside a block a pruned copy may go its own way; what a block gives is read by all that follows.
"""

import copy
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.graph.containers import holds_tensor
from fxprune.graph.contexts import is_switch
from fxprune.graph.editing import called_module, tensor_sources
from fxprune.graph.recording import like

_JOINS = frozenset((operator.add, operator.iadd, torch.add, "add", "add_", torch.cat, torch.concat))
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, torch.relu, torch.relu_, "relu", "relu_",
)  # fmt: skip


def block_ends(gm: fx.GraphModule, values: Mapping[fx.Node, Any]) -> tuple[fx.Node, ...]:
    """The nodes that give what blocks give, in graph order:

    1. *joins*: additions and concatenations of feature maps, of which at least one has no other reader, each with the
       activation that alone reads it;
    2. *forks*: the maps that go into a join and that others read too: there a residual branch, a dense layer or the way
       down of a U-Net begins;
    3. *ends of stages*: what an operator reads that gives a smaller map, or no map, where all that the network knows
       goes through this one value.

    Only what comes after a layer with weights counts. A network without any of these, or whose shapes are unknown, is
    one block: what it returns.

    Args:
        gm: a traced network.
        values: what its nodes give, as in `fxprune.graph.tracing.Trace`.
    """
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    learned = _after_weights(gm)
    maps = {node for node in learned if isinstance(value := values.get(node), Tensor) and value.dim() == 4}
    alone = _alone(gm, values)
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        sources = [source for source in tensor_sources(node, values) if source in maps]
        if node in maps and node.target in _JOINS and len(sources) > 1:
            forks = [source for source in sources if len(source.users) > 1]
            if len(forks) < len(sources):
                found |= {_activated(gm, node), *forks}
        if isinstance(values.get(node), Tensor):
            found |= {source for source in sources if source in alone and _is_smaller(values[node], values[source])}
    if not found:
        returned = next(node for node in gm.graph.nodes if node.op == "output").all_input_nodes
        found = {node for node in returned if node in learned and (node not in values or holds_tensor(values[node]))}
    return tuple(sorted(found, key=position.__getitem__))


def _after_weights(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that something with weights takes part in."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        weighted = node.op == "call_module" and next(called_module(gm, node).parameters(), None) is not None
        parameter = any(source.op == "get_attr" for source in node.all_input_nodes)
        if node.op != "output" and (weighted or parameter or not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _alone(gm: fx.GraphModule, values: Mapping[fx.Node, Any]) -> set[fx.Node]:
    """The nodes after which no tensor that was computed before them is read any more."""
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: set[fx.Node] = set()
    last = -1  # where a tensor from before is read last
    for node, i in position.items():
        if last <= i and isinstance(values.get(node), Tensor):
            found.add(node)
        if node.op != "get_attr" and holds_tensor(values.get(node)):
            last = max(last, *(position[user] for user in node.users), -1)
    return found


def _activated(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The activation that alone reads a node, or else the node."""
    if len(node.users) != 1:
        return node
    reader = next(iter(node.users))
    kind = type(called_module(gm, reader)) if reader.op == "call_module" else reader.target
    return reader if kind in _ACTIVATIONS else node


def _is_smaller(value: Tensor, source: Tensor) -> bool:
    """Whether a value has fewer positions than the feature map that it is computed from, or none."""
    before, after = math.prod(source.shape[2:]), math.prod(value.shape[2:]) if value.dim() == 4 else 0
    return 1 < before > after and value.dim() <= 4


def up_to(gm: fx.GraphModule, ends: Collection[str]) -> fx.GraphModule:
    """The network up to its last block end: a graph that gives what the nodes named `ends` give, as a tuple in graph
    order. Its modules are those of `gm`.
    """
    graph = copy.deepcopy(gm.graph)
    nodes = list(graph.nodes)
    kept = tuple(node for node in nodes if node.name in ends)
    nodes[-1].args = (kept,)
    if not any(map(is_switch, nodes)):  # a context that begins must end
        for node in reversed(nodes[nodes.index(kept[-1]) + 1 : -1]):
            if node.op != "placeholder":
                graph.erase_node(node)
    return like(gm, graph)
