"""A pruned network that does not compute the residual branches that went.

The last layer of a branch whose weight is zero gives its bias, whatever it reads (`fxprune.channels.branches`); so the
bias takes its place, and what is computed for it alone is left out. All other nodes stay, under their names.
"""

import copy
from collections.abc import Collection

import torch
from torch import fx

from fxprune.channels.branches import Branch, residual_branches
from fxprune.graph.editing import called_module
from fxprune.graph.memory import is_mutating
from fxprune.graph.recording import like
from fxprune.graph.tracing import Trace


def without_branches(pruned: Trace, names: Collection[str]) -> fx.GraphModule:
    """The graph of a network without some of its branches, around the same modules: it gives what the network gives in
    evaluation mode.

    Args:
        pruned: the network, in which the weights of the last layers of these branches are zero.
        names: of these layers.
    """
    if not names:
        return pruned.module
    found, _ = residual_branches(pruned.module, pruned.values)
    graph = copy.deepcopy(pruned.module.graph)
    nodes = dict(zip(pruned.module.graph.nodes, graph.nodes, strict=True))
    for name in names:
        branch = found[name]
        end = nodes[branch.end]
        end.replace_all_uses_with(_constant(pruned, branch, graph, nodes[branch.stream], end))
        for node in reversed(branch.nodes):
            if not nodes[node].users:
                graph.erase_node(nodes[node])
    return like(pruned.module, graph)


def _constant(pruned: Trace, branch: Branch, graph: fx.Graph, stream: fx.Node, end: fx.Node) -> fx.Node:
    """The bias of the last layer, for all positions; with memory of its own where something may write into it."""
    bias = called_module(pruned.module, branch.end)._parameters.get("bias")
    written = any(is_mutating(pruned.module, node) for node in (*branch.tail, branch.sum))
    with graph.inserting_before(end):
        zero = graph.call_function(torch.zeros_like, (stream,)) if written or bias is None else None
        if bias is None:
            assert zero is not None
            return zero
        trailing = pruned.values[branch.end].dim() - 2
        constant = graph.call_method("reshape", (graph.get_attr(f"{branch.name}.bias"), -1, *[1] * trailing))
        return constant if zero is None else graph.call_function(torch.add, (zero, constant))
