"""Where a value meets others, in additions and concatenations, and how much of what comes out is its own.

An error inside a branch is relative to the branch. Where that is added to a stream of four times its variance, a fifth
of the sum is the branch, and so much of the error is left; a layer that writes the stream itself has no such luck.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

from fxprune.calibration.lockstep import Sample
from fxprune.graph.editing import is_addition

_CONCATENATIONS = frozenset((torch.cat, torch.concat, torch.concatenate))


@dataclass(frozen=True)
class Join:
    """A node in which a value meets others.

    Attributes:
        node: the addition or concatenation.
        own: those of its terms that depend on the value.
        others: those that do not.
    """

    node: fx.Node
    own: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]


def joins_after(gm: fx.GraphModule, starts: Mapping[str, fx.Node]) -> dict[str, tuple[Join, ...]]:
    """The joins through which all that comes of a value has to pass (the post-dominators of its node), in order.

    Args:
        gm: the network, traced.
        starts: the node of each value, by any name.
    """
    graph = nx.DiGraph((source, node) for node in gm.graph.nodes for source in node.all_input_nodes)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    if output not in graph:
        return dict.fromkeys(starts, ())
    after: dict[fx.Node, fx.Node] = nx.immediate_dominators(graph.reverse(copy=False), output)
    found = {}
    for name, start in starts.items():
        mine = {start, *nx.descendants(graph, start)} if start in graph else {start}
        joins, node = [], start
        while (following := after.get(node)) is not None and following is not node:
            node = following
            if terms := _terms(node):
                own = tuple(term for term in terms if term in mine)
                if len(own) < len(terms):
                    joins.append(Join(node, own, tuple(term for term in terms if term not in mine)))
        found[name] = tuple(joins)
    return found


def share_of_own(join: Join, samples: Sequence[Sample]) -> float:
    """The variance of the terms that depend on the value, about the mean of each channel, relative to that of what
    comes out: in `[0, 1]`.

    Args:
        join: of the network.
        samples: of it, at a pause before the join.
    """
    parts: list[tuple[float, float]] = []
    for sample in samples:
        mine, others = ([sample.value(term.name) for term in terms] for terms in (join.own, join.others))
        if not all(isinstance(value, Tensor) and value.dim() > 1 for value in (*mine, *others)):
            return 1.0
        if is_addition(join.node):
            parts.append((_variance(mine[0]), _variance(mine[0] + others[0])))
        else:
            own = sum(map(_variance, mine))
            parts.append((own, own + sum(map(_variance, others))))
    own, whole = (sum(part) for part in zip(*parts, strict=True))
    return min(1.0, own / whole) if whole > 0 else 1.0


def _terms(node: fx.Node) -> tuple[fx.Node, ...]:
    """What an addition or concatenation puts together; nothing for other nodes."""
    if is_addition(node):
        return tuple(term for term in node.args if isinstance(term, fx.Node))
    return tuple(node.all_input_nodes) if node.target in _CONCATENATIONS else ()


def _variance(value: Tensor) -> float:
    """Sum of squares about the mean of each channel of a batch `(N, C, ...)`."""
    channels = value.detach().transpose(0, 1).flatten(1).float()
    return float(channels.var(1, correction=0).sum(dtype=torch.float64)) * channels.shape[1]
