"""Which values share memory, and who writes into it."""

import inspect
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterable

import torch
from torch import fx, nn

from fxprune.graph.convolutions import Convolution
from fxprune.graph.editing import called_module
from fxprune.graph.layers import ChannelGather
from fxprune.graph.norms import NormWithZeros


def is_mutating(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node writes into one of its inputs: `relu(inplace=True)`, `x.mul_(y)`, `x += y`, `out=`."""
    if node.op == "call_module":
        return bool(getattr(called_module(gm, node), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if "out" in node.kwargs or name == "setitem" or (name.endswith("_") and not name.endswith("__")):
        return True
    if getattr(node.target, "__module__", "") == "_operator":
        return name in _INPLACE_OPERATORS
    inplace = node.kwargs.get("inplace", False)
    try:
        bound = (
            inspect.signature(node.target).bind_partial(*node.args, **node.kwargs) if callable(node.target) else None
        )
    except (TypeError, ValueError):  # builtins without a signature have no `inplace` argument
        return bool(inplace)
    return bool(bound.arguments.get("inplace", inplace)) if bound else bool(inplace)


def storage_roots(gm: fx.GraphModule) -> dict[fx.Node, frozenset[fx.Node]]:
    """For each node, the nodes whose memory its value may share, itself included. Only known operators are trusted to
    give new memory.
    """
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in gm.graph.nodes:
        if _gives_new_memory(gm, node):
            roots[node] = frozenset((node,))
        else:
            roots[node] = frozenset((node,)).union(*(roots[source] for source in node.all_input_nodes))
    return roots


def written_values(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """The nodes into whose memory an operator may write, itself or through a view."""
    writers = [node for node in gm.graph.nodes if is_mutating(gm, node) and node.all_input_nodes]
    if not writers:
        return frozenset()
    roots = storage_roots(gm)
    return frozenset(root for node in writers for root in roots[node.all_input_nodes[0]])


def written_attributes(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """The parameters and buffers (`get_attr`) among them."""
    return frozenset(node for node in written_values(gm) if node.op == "get_attr")


class Memory:
    """Who writes into which memory, to tell whether a value is still what it was when a copy of it is left out.

    Taken once; it stays valid while a pass only erases gathers.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._roots = storage_roots(gm)
        self._writers = [node for node in gm.graph.nodes if is_mutating(gm, node)]
        self._written_at = [self._position[writer] for writer in self._writers]  # ascending

    def owns(self, node: fx.Node) -> bool:
        """Whether the value of `node` is memory that no earlier value shares, and that is not the caller's or a
        parameter.
        """
        return node.op not in ("placeholder", "get_attr") and self._roots[node] == {node}

    def changes(self, value: fx.Node, after: fx.Node, readers: Iterable[fx.Node]) -> bool:
        """Whether `value` may be written into between the node `after` and the last of `readers`."""
        start, stop = self._position[after], max((self._position[reader] for reader in readers), default=-1)
        between = self._writers[bisect_right(self._written_at, start) : bisect_left(self._written_at, stop)]
        return any(not self._roots[value].isdisjoint(self._roots[writer]) for writer in between)


_INPLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift iconcat".split()
)

_NEW_MEMORY_MODULES = (
    Convolution,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    NormWithZeros,
    nn.modules.pooling._AvgPoolNd,
    ChannelGather,
)

_NEW_MEMORY_METHODS = frozenset("new_zeros new_ones new_full new_empty".split())

_NEW_MEMORY_FUNCTIONS = frozenset(
    (
        torch.zeros,
        torch.ones,
        torch.full,
        torch.cat,
        torch.stack,
        operator.add,
        operator.mul,
        operator.sub,
        operator.truediv,
        torch.add,
        torch.mul,
    )
)


def _gives_new_memory(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(called_module(gm, node), _NEW_MEMORY_MODULES) and not is_mutating(gm, node)
    if node.op == "call_method":
        return node.target in _NEW_MEMORY_METHODS
    return node.op == "call_function" and node.target in _NEW_MEMORY_FUNCTIONS and "out" not in node.kwargs
