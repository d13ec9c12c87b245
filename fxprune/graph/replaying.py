"""A recording that runs on batches of any size, for what calibration does with it.

The recorder writes sizes down as the numbers that they were. Of two recordings at two batch sizes, the numbers that
differ in proportion to the batch are computed from the first input; where others differ, or the steps do, the model
treats its batch in a way that a graph cannot follow.
"""

import operator
from typing import Any

import torch
from torch import fx

from fxprune.errors import TraceError
from fxprune.graph.editing import label
from fxprune.graph.recorder import Constant
from fxprune.graph.recording import Recording

SIZES = (2, 3)
"""Batch sizes of the two recordings."""


def free_batch(small: Recording, large: Recording) -> Recording:
    """Make the batch size of `small`, a recording of one run, free, in place, and return it.

    Args:
        small: recorded with `SIZES[0]` samples, of which the first input counts in its first dimension.
        large: the same model with `SIZES[1]`.

    Raises:
        TraceError: the two differ in more than the batch size.
    """
    graph = small.module.graph
    mine, theirs = list(graph.nodes), list(large.module.graph.nodes)
    if [(n.op, n.name) for n in mine] != [(n.op, n.name) for n in theirs]:
        raise TraceError("the model does other things with a batch of another size")
    batch = _Batch(graph, mine)
    for node, twin in zip(mine, theirs, strict=True):
        if isinstance(node.target, Constant) and not _same_constant(node.target, twin.target):
            raise TraceError(f"{label(node)} is a tensor that differs with the size of the batch")
        node.args, node.kwargs = batch.fit(node, node.args, twin.args), batch.fit(node, node.kwargs, twin.kwargs)
    return small


class _Batch:
    """Computes multiples of the batch size in a graph, each once."""

    def __init__(self, graph: fx.Graph, nodes: list[fx.Node]) -> None:
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self._graph, self._last, self._products = graph, placeholders[-1], dict[int, fx.Node]()
        self._first = placeholders[0]

    def fit(self, node: fx.Node, x: Any, y: Any) -> Any:
        """The arguments `x` of a node, which are `y` in a batch of the other size, with the sizes that differ
        computed.
        """
        if isinstance(x, slice):
            return slice(*(self.fit(node, getattr(x, part), getattr(y, part)) for part in ("start", "stop", "step")))
        if isinstance(x, dict):
            return {key: self.fit(node, part, y[key]) for key, part in x.items()}
        if isinstance(x, list | tuple):
            parts = [self.fit(node, part, other) for part, other in zip(x, y, strict=True)]
            return parts if isinstance(x, list) else tuple(parts)
        if type(x) is not type(y):
            raise TraceError(f"{label(node)}: {x!r} becomes {y!r} in a batch of another size")
        return self._size(node, x, y) if isinstance(x, int | float) and x != y else x

    def _size(self, node: fx.Node, x: float, y: float) -> fx.Node:
        factor = x // SIZES[0] if type(x) is int else 0
        if (factor * SIZES[0], factor * SIZES[1]) != (x, y):
            raise TraceError(f"{label(node)}: {x} becomes {y} where a batch of {SIZES[0]} has {SIZES[1]} samples")
        if factor not in self._products:
            with self._graph.inserting_after(self._last):
                batch = self._graph.call_method("size", (self._first, 0))
            with self._graph.inserting_after(batch):
                self._products[factor] = self._graph.call_function(operator.mul, (batch, factor))
        return self._products[factor]


def _same_constant(mine: Constant, theirs: Any) -> bool:
    return mine.tensor.shape == theirs.tensor.shape and torch.equal(mine.tensor, theirs.tensor)
