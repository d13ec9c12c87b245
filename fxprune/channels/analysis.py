"""Walk a traced graph once, with labels in place of tensors, and say which channels share an order and which may be
permuted.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.channels.atoms import Array, Blocks, Tie
from fxprune.channels.interpreter import Port, Scale, State, layer_name
from fxprune.channels.operators import METHODS, function_rule, rule_for
from fxprune.channels.rules import Rule, constant, item, named_item
from fxprune.graph.containers import is_plain
from fxprune.graph.editing import called_module, label
from fxprune.graph.memory import written_values
from fxprune.graph.tracer import METADATA
from fxprune.graph.tracing import is_hooked, trace_leaf
from fxprune.tables import Bar, Cell, Column, Table, Tabular

logger = logging.getLogger("fxprune")


@dataclass(frozen=True)
class ChannelSpace:
    """A set of channels that must share one order.

    Attributes:
        producers: nodes whose channels they are (layers, gathers, parameters).
        channels: number of classes of channels that move as one.
        ties: nodes that tie the producers: adds, concats, shared modules.
        readers: layers that mix these channels.
        permutable: number of channels that may change places with another.
        reason: why the others may not; empty if all may.
    """

    producers: tuple[str, ...]
    channels: int
    ties: tuple[str, ...]
    readers: tuple[str, ...]
    permutable: int
    reason: str


@dataclass(frozen=True, repr=False)
class ChannelAnalysis(Tabular):
    """What is known about the channels of a graph. `str()` gives a table of the channel spaces.

    Attributes:
        blocks: which channels move together, and which may change places.
        ports: where layers and gathers read and write channels.
        scales: parameters that hold one entry a channel.
        boundaries: nodes without a rule, and why.
        labels: label tensor of each node's value.
        ties: which atoms move together, and because of which node.
    """

    blocks: Blocks
    ports: tuple[Port, ...]
    scales: tuple[Scale, ...]
    boundaries: Mapping[str, str]
    labels: Mapping[fx.Node, Any]
    ties: tuple[Tie, ...]

    @cached_property
    def spaces(self) -> tuple[ChannelSpace, ...]:
        """The channel spaces, in graph order of their first producer."""
        starts = self.blocks.starts
        runs = nx.Graph()
        runs.add_nodes_from(range(starts.size))
        causes: dict[int, set[str]] = {}
        for tie in self.ties:
            pairs = np.unique(np.stack([_run(starts, tie.left), _run(starts, tie.right)]), axis=1).T.tolist()
            runs.add_edges_from(pairs)
            for a, _ in pairs:
                causes.setdefault(a, set()).add(tie.cause)
        readers: dict[int, list[str]] = {}
        for port in self.ports:
            if port.kind == "reads":
                for run in np.unique(_run(starts, port.atoms)).tolist():
                    readers.setdefault(run, []).append(port.node.name)
        component = np.zeros(starts.size, dtype=np.int64)
        components = sorted(sorted(c) for c in nx.connected_components(runs))
        for i, members in enumerate(components):
            component[members] = i
        first = self.blocks.first
        home = component[_run(starts, first)] if first.size else first
        writers = {port.node.name for port in self.ports if port.kind == "writes"}
        spaces = []
        for i, members in enumerate(components):
            classes = np.flatnonzero(home == i)
            names = tuple(dict.fromkeys(self.blocks.producers[run] for run in members))
            spaces.append(
                ChannelSpace(
                    producers=tuple(name for name in names if name in writers) or names[:1],
                    channels=classes.size,
                    ties=tuple(sorted(set().union(*(causes.get(run, set()) for run in members)))),
                    readers=tuple(dict.fromkeys(name for run in members for name in readers.get(run, []))),
                    permutable=self._permutable(classes),
                    reason=next(
                        (reason for c in classes.tolist() if (reason := self.blocks.why_fixed(int(first[c])))), ""
                    ),
                )
            )
        return tuple(spaces)

    def _permutable(self, classes: Array) -> int:
        blocks = self.blocks.block_of[classes]
        _, counts = np.unique(blocks[blocks >= 0], return_counts=True)
        return int(counts[counts > 1].sum())

    def brief(self) -> str:
        """What is in it, in a few words."""
        movable = sum(space.permutable > 0 for space in self.spaces)
        return f"{len(self.spaces)} channel spaces, {movable} with channels that may change places" + (
            f"; {len(self.boundaries)} boundaries" if self.boundaries else ""
        )

    def table(self) -> Table:
        """One line for each channel space."""
        paths = {node.name: str(node.target) for node in self.labels if node.op == "call_module"}
        columns = (
            Column("channel space", right=False),
            Column("channels"),
            Column("movable"),
            Column("tied by / fixed because", right=False),
        )
        rows: list[tuple[Cell, ...]] = []
        for space in self.spaces:
            who = paths.get(space.producers[0], space.producers[0]) + (
                f" + {len(space.producers) - 1} more" if len(space.producers) > 1 else ""
            )
            ties = ", ".join(space.ties[:4]) + (", ..." if len(space.ties) > 4 else "")
            why = f"fixed: {space.reason}" if space.permutable < space.channels and space.reason else ""
            movable = Bar(str(space.permutable), space.permutable / max(1, space.channels))
            rows.append((who, str(space.channels), movable, "; ".join(filter(None, (ties, why)))))
        told = ("boundaries (channels keep their order there):",) if self.boundaries else ()
        after = (*told, *(f"  {name}: {reason}" for name, reason in self.boundaries.items()))
        return Table(columns, tuple(rows), (self.brief(),), after)


BLIND = METADATA | {"type", "len", "broadcast_shapes", "_assert"}
"""What is given tensors, gives none, and does not look at their values."""


def reads_values(node: fx.Node) -> bool:
    """Whether a node that gives no tensor but is given some looks at their values: `item()`, and not `size()`."""
    asked = node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target)
    return str(asked) not in BLIND and not str(asked).startswith("is_")


def analyze_channels(module: fx.GraphModule, values: Mapping[fx.Node, Any]) -> ChannelAnalysis:
    """Interpret a graph on labels: one pass over the nodes, without recursion over the graph.

    Args:
        module: a traced model, or one that passes have rewritten.
        values: what each node gives, tensors as meta tensors (`Trace.values`). Where a value is missing, channels keep
            their order.
    """
    state = State(module=module, values=dict(values), written=written_values(module))
    _walk(state, module.graph)
    state.pin_parameters_read_twice()
    blocks = state.atoms.solve()
    return ChannelAnalysis(
        blocks=blocks,
        ports=tuple(state.ports),
        scales=tuple(state.scales),
        boundaries={node.name: reason for node, reason in state.boundaries.items()},
        labels=state.labels,
        ties=tuple(state.atoms.ties),
    )


def _walk(state: State, graph: fx.Graph) -> None:
    last: Tensor | None = None
    for node in graph.nodes:
        state.node = node
        if node not in state.labels:  # the inputs of a nested graph have labels already
            state.labels[node] = _interpret(state)
        for leaf in torch.utils._pytree.tree_leaves(state.labels[node]):
            # Every value is a site: chunks of one tensor that different operators treat are told apart.
            if isinstance(leaf, Tensor) and leaf.numel() > 1 and leaf is not last:
                state.atoms.site(leaf.numpy())
                last = leaf


def _interpret(state: State) -> Any:
    node = state.node
    if node.op == "output":
        state.pin([state.labels[n] for n in node.all_input_nodes], "model output")
        return None
    if node not in state.values:
        return state.boundary("its shape is unknown")
    if node.op == "placeholder":
        return state.unlabelled(state.value)
    if node.op == "get_attr":
        owner, _, attribute = layer_name(node).rpartition(".")
        if node in state.written:
            return state.unlabelled(state.value)  # what is written there meets all its readers
        if not isinstance(state.value, Tensor) or all(
            user.op == "output" or rule_of(state.module, user) is None for user in node.users
        ):
            return state.unlabelled(state.value)
        return state.parameter(owner, attribute)
    if is_plain(state.value):
        return state.boundary("it reads values, in their order") if state.tensors() and reads_values(node) else None
    if not any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(state.value)):
        return state.boundary(f"it gives a {type(state.value).__name__}, which holds what it is given")
    if node.op == "call_module":
        module = called_module(state.module, node)
        if is_hooked(module):
            return state.boundary(f"{node.target} has hooks or a parametrized weight")
        if rule_of(state.module, node) is None:
            labels = _through(state, module)
            return (
                state.boundary(f"no rule for {type(module).__module__}.{type(module).__qualname__}")
                if labels is None
                else labels
            )
    rule = rule_of(state.module, node)
    if rule is None:
        where, name = getattr(node.target, "__module__", None) or "torch", getattr(node.target, "__name__", node.target)
        return state.boundary(f"no rule for {where}.{name}")
    if rule is not constant and not any(
        isinstance(leaf, Tensor)
        for n in node.all_input_nodes
        for leaf in torch.utils._pytree.tree_leaves(state.labels[n])
    ):
        return state.unlabelled(state.value)  # made of sizes only: torch.zeros(x.shape[0], 8)
    if not state.tensors() and rule not in (item, named_item, constant):
        return state.boundary(f"{label(node)} takes several tensors as one argument")
    try:
        return rule(state)
    except Exception as error:  # a call that the rule was not written for: what it tied so far only restricts
        logger.warning(
            "%s: the rule for %s failed, so its channels keep their order", node.name, node.target, exc_info=True
        )
        return state.boundary(f"its rule failed ({type(error).__name__}: {error})")


def rule_of(module: fx.GraphModule, node: fx.Node) -> Rule | None:
    """The rule of the operator that a node calls, or None."""
    if node.op not in ("call_module", "call_method", "call_function"):
        return None
    if node.op == "call_module":
        return rule_for(called_module(module, node))
    return METHODS.get(str(node.target)) if node.op == "call_method" else function_rule(node.target)


def family_of(module: fx.GraphModule, node: fx.Node) -> str:
    """Name of the function in `fxprune.channels.rules` that is, or makes, the rule of a node; empty without one."""
    rule = rule_of(module, node)
    return "" if rule is None else rule.__qualname__.partition(".")[0]


def _through(state: State, module: nn.Module) -> Tensor | None:
    """Labels of a leaf module without a rule or tensors of its own (a user's DropPath): interpret its forward in both
    modes, and tie the two.
    """
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    arguments = tuple(state.concrete(state.node.args))
    results = []
    for training in (False, True):
        inner = trace_leaf(module, training, arguments)
        if inner is None:
            return None
        graph_module, values = inner
        written = written_values(graph_module)
        nested = State(module=graph_module, values=values, atoms=state.atoms, written=written)
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        given = [state.labels[arg] if isinstance(arg, fx.Node) else None for arg in state.node.args]
        nested.labels.update(zip(placeholders, given, strict=False))
        output = graph_module.graph.output_node()
        output_value = output.args[0]
        graph_module.graph.erase_node(output)
        _walk(nested, graph_module.graph)
        if (
            nested.boundaries
            or not isinstance(output_value, fx.Node)
            or not isinstance(nested.labels[output_value], Tensor)
        ):
            return None
        results.append(nested.labels[output_value])
    if results[0].shape != results[1].shape:
        return None
    state.tie(results[0], results[1])
    labels: Tensor = results[0]
    return labels


def _run(starts: Array, atoms: Array) -> Array:
    """Which run of minted atoms each atom belongs to."""
    return np.searchsorted(starts, atoms.reshape(-1), side="right") - 1
