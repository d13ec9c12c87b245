"""Run a dense network and its pruned copy side by side over the same batches, pausing before chosen layers.

Refitting goes layer by layer, and each layer needs what the layers before it, already refitted, give it. Starting over
for each layer would take time quadratic in the depth, so the values that later nodes still read are kept for all
batches between two pauses. They are held in memory up to a limit and in temporary files beyond it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from fxprune.calibration.batches import Batch
from fxprune.calibration.mapped import is_mapped, mapped
from fxprune.calibration.stages import Run
from fxprune.errors import CalibrationError
from fxprune.graph.memory import Memory, is_mutating

MEMORY_LIMIT = 3 * 2**30
"""Bytes of intermediate values that are kept in memory; what exceeds them goes to temporary files."""


class Network(fx.Interpreter):
    """One of the two networks: evaluates single nodes against a table of known values."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm.eval())
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.device = next((p.device for p in gm.parameters()), torch.device("cpu"))

    def compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Compute `node` from values that are there, be it in files."""
        for source in node.all_input_nodes:
            values[source] = _load(values[source], self.device)
        self.env = values
        values[node] = self.run_node(node)


@dataclass
class Room:
    """Memory for values: how many bytes there are, and how many are taken."""

    limit: int
    taken: int = 0


@dataclass
class Sample:
    """What is known of one batch in one network.

    Attributes:
        network: which of the two.
        room: that all share.
        values: of its nodes.
        counted: bytes of them that are counted as taken.
    """

    network: Network
    room: Room
    values: dict[fx.Node, Any] = field(default_factory=dict)
    counted: int = 0

    def count(self) -> None:
        """Count the values that are held in memory at present."""
        held = sum(map(_bytes, self.values.values()))
        self.room.taken += held - self.counted
        self.counted = held

    def value_kept(self, name: str) -> Any:
        """The value of a node whose turn is next, kept for then if there is room. Nothing that it is computed from may
        change before.
        """
        node, value = self.network.nodes[name], self.value(name)
        if self.room.taken + _bytes(value) <= self.room.limit:
            self.values[node] = value
            self.count()
        return value

    def value(self, name: str) -> Any:
        """The value of a node, computed ahead of its turn and forgotten again if need be."""
        ahead = dict(self.values)
        pending = [self.network.nodes[name]]
        while pending:
            node = pending[-1]
            missing = [] if node in ahead else [source for source in node.all_input_nodes if source not in ahead]
            pending += missing
            if not missing:
                pending.pop()
                if node not in ahead:
                    self.network.compute(node, ahead)
        return _load(ahead[self.network.nodes[name]], self.network.device)


class Lockstep:
    """Two networks of equal structure, and how far each has come on each batch. Use it in a `with` statement.

    Args:
        dense: the reference.
        pruned: a trace of the same model with other weights; they may change while the networks are paused. If it is
            `dense` itself, that one network is run once.
        batches: arguments of forward. They are not changed.
        progress: show a bar on stderr; or the run of which this is one pass.
        memory_limit: see `MEMORY_LIMIT`.

    Raises:
        CalibrationError: the networks differ in structure.
    """

    def __init__(
        self,
        dense: fx.GraphModule,
        pruned: fx.GraphModule,
        batches: Sequence[Batch],
        *,
        progress: bool | Run = False,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self._networks = Network(dense), Network(pruned)
        if list(self._networks[0].nodes) != list(self._networks[1].nodes):
            raise CalibrationError("the two networks differ in structure; pass traces of one model")
        self._graph = list(dense.graph.nodes)
        self._memory = Memory(dense)
        self._writers = {node.name for node in self._graph if is_mutating(dense, node)}
        self._last_use = {source.name: i for i, node in enumerate(self._graph) for source in node.all_input_nodes}
        self._position = 0
        self.samples: list[tuple[Sample, Sample]] = []
        self._room = Room(memory_limit)
        for _ in batches:
            first = Sample(self._networks[0], self._room)
            self.samples.append((first, first if pruned is dense else Sample(self._networks[1], self._room)))
        placeholders = [node for node in self._graph if node.op == "placeholder"]
        written = {node for node in placeholders if self._memory.changes(node, node, [self._graph[-1]])}
        for batch, pair in zip(batches, self.samples, strict=True):
            for sample in _distinct(pair):
                for node, argument in zip(placeholders, batch, strict=False):
                    sample.values[sample.network.nodes[node.name]] = _on(
                        argument, sample.network.device, own=node in written
                    )
                sample.count()
        self._run = progress if isinstance(progress, Run) else None
        shown = progress is True
        self._progress = tqdm(total=len(self._graph), desc="calibrating", unit="node", disable=not shown)
        self._folder = tempfile.TemporaryDirectory(prefix="fxprune-", ignore_cleanup_errors=True)

    def __enter__(self) -> "Lockstep":
        """Nothing to do: the temporary folder exists."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget all values and remove the temporary folder."""
        self.samples.clear()
        self._progress.close()
        if self._run is not None:
            if error is None:
                self._run.advance(1 - self._position / len(self._graph))
            else:
                self._run.close()
        self._folder.cleanup()

    def pause_before(self, name: str) -> Sequence[tuple[Sample, Sample]]:
        """Run both networks on all batches up to a node that they have not passed yet, and return the batches.

        Raises:
            CalibrationError: the network cannot be run on the batch.
        """
        stop = next(i for i, node in enumerate(self._graph) if node.name == name)
        for number, pair in enumerate(self.samples):
            for sample in _distinct(pair):
                self._advance(sample, stop, number)
        self._progress.update(stop - self._position)
        if self._run is not None:
            self._run.advance((stop - self._position) / len(self._graph))
        self._position = stop
        return self.samples

    def can_look_ahead(self, name: str, to: str, stops: frozenset[str]) -> bool:
        """Whether, at a pause before `name`, the value that node `to` will have is known already.

        It is if no node of `stops` takes part in it, whose weights may still change, and nothing writes into what it
        is computed from.
        """
        position = {node: i for i, node in enumerate(self._graph)}
        start, end = (self._networks[0].nodes[name] for name in (name, to))
        pending, seen = [end], set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if self._memory.changes(node, start, [end]):
                return False
            if position[node] >= position[start]:
                if node.name in stops or node.name in self._writers:
                    return False
                pending += node.all_input_nodes
        return True

    def _advance(self, sample: Sample, stop: int, number: int) -> None:
        for i in range(self._position, stop):
            node = sample.network.nodes[self._graph[i].name]
            if node not in sample.values:  # else a placeholder, or kept
                try:
                    sample.network.compute(node, sample.values)
                except Exception as error:  # any operator of any model
                    raise CalibrationError(
                        f"calibration batch {number} does not fit the model: {node.name} fails: {error}"
                    ) from error
            for known in (*node.all_input_nodes, node):
                if self._last_use.get(known.name, i) <= i:  # a value without readers is forgotten at once
                    sample.values.pop(known, None)
        sample.count()
        if self._room.taken > self._room.limit:
            for node, value in sample.values.items():
                if node.op not in ("get_attr", "placeholder"):
                    sample.values[node] = self._file(node, value)
            sample.count()

    def _file(self, node: fx.Node, value: Any) -> Any:
        """Move a value to a file, unless that would part it from its aliases while one of them is written into."""
        if not isinstance(value, Tensor) or not _bytes(value):
            return value
        original = self._networks[0].nodes[node.name]
        if self._memory.changes(original, original, [self._graph[-1]]):
            return value
        return mapped(value, self._folder.name)


def _distinct(pair: tuple[Sample, Sample]) -> Sequence[Sample]:
    return pair[:1] if pair[0] is pair[1] else pair


def _on(argument: Any, device: torch.device, own: bool) -> Any:
    """An argument as a network takes it: a copy of its own where it writes into it, else itself, if it is there."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, copy=True) if own else leaf if is_mapped(leaf) else leaf.to(device)

    return tree_map(moved, argument)


def _load(value: Any, device: torch.device) -> Any:
    """Bring a tensor that was put into a file back to the device; all others are there."""
    return value.to(device) if isinstance(value, Tensor) and is_mapped(value) else value


def _bytes(value: Any) -> int:
    """Memory of a value; none if it is mapped to a file."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if not is_mapped(t))
