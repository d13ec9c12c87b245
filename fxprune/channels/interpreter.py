"""The state that operator rules work on: label tensors, the facts they collect, and the places where channels are read,
written and scaled.

A label tensor has the rank of the value it describes. Along a dimension of size one the labels do not vary: exchanging
atoms treats all positions there alike.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.channels.atoms import UNLABELLED, Array, AtomTable
from fxprune.graph.editing import called_module, label

# A parameter read with get_attr gets an atom for each element (a position embedding has 151 thousand); larger ones keep
# their order.
LARGEST_LABELLED_PARAMETER = 1_000_000
# A reshape that spreads channels over positions (flatten: 25 thousand in VGG) gets an atom for each, up to this many.
LARGEST_SPREAD = 500_000


@dataclass(frozen=True)
class Port:
    """A place where a module meets the channels of a value: it *reads* them, or *writes* them. `atoms[i]` stands at
    position i of dimension `dim`.
    """

    node: fx.Node
    kind: Literal["reads", "writes"]
    dim: int
    atoms: Array


@dataclass(frozen=True)
class Scale:
    """A tensor that holds one entry for each channel along `dim` (or, with `dim` None, for each atom of its flattened
    elements).
    """

    owner: str
    attribute: str
    dim: int | None
    atoms: Array


@dataclass
class State:
    """Everything known while the graph is walked: the labels of each node, and the facts about atoms."""

    module: fx.GraphModule
    values: dict[fx.Node, Any]
    labels: dict[fx.Node, Any] = field(default_factory=dict)
    atoms: AtomTable = field(default_factory=AtomTable)
    ports: list[Port] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    boundaries: dict[fx.Node, str] = field(default_factory=dict)
    written: frozenset[fx.Node] = frozenset()  # whose memory an operator writes into
    node: fx.Node = field(init=False)
    _bound: dict[tuple[int, int | str], Array] = field(default_factory=dict)
    _ruleless: dict[int, str] = field(default_factory=dict)  # tensors of modules that a boundary calls

    # ---- what the current node is given

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Argument of the current call, by position or name."""
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def concrete(self, argument: Any) -> Any:
        """An argument with every node replaced by its value: sizes are ints, tensors are meta tensors."""
        return fx.node.map_arg(argument, lambda node: self.values[node])

    @property
    def value(self) -> Any:
        """What the current node gives."""
        return self.values[self.node]

    def tensors(self) -> list[fx.Node]:
        """Nodes that give the current node its tensors, in order."""
        return [node for node in self.node.all_input_nodes if isinstance(self.values.get(node), Tensor)]

    # ---- label tensors

    def unlabelled(self, value: Any) -> Any:
        """Labels of a value about whose channels nothing is known: their order counts."""
        return torch.utils._pytree.tree_map(
            lambda leaf: torch.full((1,) * leaf.dim(), UNLABELLED) if isinstance(leaf, Tensor) else None,
            value,
            is_leaf=lambda x: isinstance(x, Tensor),
        )

    def mint_along(self, dim: int, count: int, rank: int) -> Tensor:
        """Labels that vary along `dim` only, all new."""
        return along(torch.from_numpy(self.atoms.mint(count, self.node.name)), dim, rank)

    def pin(self, labels: Any, reason: str) -> None:
        """The order of these channels is observed."""
        for leaf in torch.utils._pytree.tree_leaves(labels):
            if isinstance(leaf, Tensor):
                self.atoms.pin(leaf.numpy().reshape(-1), reason)

    def boundary(self, reason: str) -> Any:
        """The current node has no rule: its inputs keep their order, and so does what it gives."""
        self.boundaries[self.node] = reason
        if self.node.op == "call_module":
            called = called_module(self.module, self.node)
            self._ruleless |= {
                id(tensor): layer_name(self.node) for tensor in (*called.parameters(), *called.buffers())
            }
        for node in self.node.all_input_nodes:
            self.pin(self.labels.get(node), reason)
        return self.unlabelled(self.values.get(self.node))

    def tie(self, left: Tensor, right: Tensor) -> None:
        """Tie labels position by position; both have one shape."""
        a, b = left.reshape(-1).numpy(), right.reshape(-1).numpy()
        pairs = np.unique(np.stack([a, b]), axis=1) if a.size > 4096 else np.stack([a, b])
        self.atoms.tie(pairs[0], pairs[1], self.node.name)

    def duplicate(self, labels: Tensor) -> Tensor:
        """New atoms in place of the old ones, each tied to the one it stands for: a second copy of the channels."""
        distinct, inverse = np.unique(labels.numpy(), return_inverse=True)
        fresh = self.atoms.mint(distinct.size, self.node.name)
        self.atoms.tie(fresh, distinct, self.node.name)
        return torch.from_numpy(fresh[inverse.reshape(labels.shape)])

    def channels(self, labels: Tensor, value: Tensor, dim: int) -> Array:
        """One atom for each position along `dim`, as a consumer that treats all else alike sees it.

        Where nothing is known the atoms are new and pinned. Where the labels vary along other dimensions too (after a
        pixel shuffle), each position gets a new atom to which all atoms found there are tied, each in the role of its
        place.
        """
        dim, size = dim % value.dim(), value.shape[dim]
        if labels.shape[dim] == size and labels.numel() == size and not (size == 1 and int(labels) == UNLABELLED):
            return labels.reshape(-1).numpy()
        giver = next((node for node in self.node.all_input_nodes if self.labels.get(node) is labels), self.node)
        fresh = self.atoms.mint(size, giver.name)
        if labels.shape[dim] != size or labels.numel() == 1:
            why = self.boundaries.get(giver, "")
            self.atoms.pin(fresh, f"{label(giver)} fixes their order" + (f": {why}" if why else ""))
            self.pin(labels, "positions that are not channels are read in order")
            return fresh
        rows = labels.movedim(dim, 0).reshape(size, -1).numpy()
        if np.unique(rows).size < sum(np.unique(row).size for row in rows):
            self.pin(labels, "a channel stands in several places of one dimension")
            self.atoms.pin(fresh, "its channels are spread over other dimensions")
            return fresh
        self.atoms.tie(np.repeat(fresh, rows.shape[1]), rows, self.node.name)
        self.atoms.site(rows, np.broadcast_to(np.arange(rows.shape[1]), rows.shape))
        return fresh

    # ---- what modules do with channels

    def reads(self, dim: int, atoms: Array) -> None:
        """The current node mixes the channels `atoms`, which stand along `dim` of its first input."""
        self.ports.append(Port(self.node, "reads", dim, atoms))

    def writes(self, dim: int, atoms: Array) -> None:
        """The current node gives the channels `atoms` along `dim` of its output."""
        self.ports.append(Port(self.node, "writes", dim, atoms))

    def bind(self, owner: str, attribute: str, dim: int, atoms: Array, *, scales: bool) -> None:
        """Entry i of a parameter along `dim` belongs to `atoms[i]`. A second use of the same tensor ties the atoms of
        both.
        """
        tensor = getattr(self.module.get_submodule(owner), attribute, None)
        if isinstance(tensor, Tensor) and tensor.dim() > 0 and self._bind(tensor, dim, atoms) and scales:
            self.scales.append(Scale(owner, attribute, dim, atoms))

    def bind_group(self, owner: str, atoms: Array) -> None:
        """The dimension of a grouped weight that counts inside a group belongs to all `atoms`, group by group."""
        weight = self.module.get_submodule(owner).weight
        assert isinstance(weight, Tensor)
        self._bind(weight, "inside groups", atoms)

    def parameter(self, owner: str, attribute: str) -> Tensor:
        """Labels of a tensor that the graph reads directly: an atom for each element."""
        tensor = getattr(self.module.get_submodule(owner), attribute)
        if not is_floating_parameter(tensor):
            return torch.full((1,) * tensor.dim(), UNLABELLED)
        known = self._bound.get((id(tensor), "elements"))
        atoms = self.atoms.mint(tensor.numel(), self.node.name) if known is None else known
        if known is None:
            self._bound[id(tensor), "elements"] = atoms
            self.scales.append(Scale(owner, attribute, None, atoms))
        return torch.from_numpy(atoms).reshape(tensor.shape)

    def pin_parameters_read_twice(self) -> None:
        """A parameter that a layer owns and the graph reads as well keeps its order: neither use sees the other. So
        does one that is used at a boundary too, be it that the same layer is called there.
        """
        for (key, _), atoms in self._bound.items():
            if key in self._ruleless:
                self.atoms.pin(atoms, f"{self._ruleless[key]} is called at a place without a rule too")
        direct = {key for key, use in self._bound if use == "elements"}
        layered = {key for key, use in self._bound if use != "elements"}
        for (key, _), atoms in self._bound.items():
            if key in direct & layered:
                self.atoms.pin(atoms, "a parameter of the layer is also read directly by the model")

    def _bind(self, tensor: Tensor, use: int | str, atoms: Array) -> bool:
        """Record the atoms of a use of `tensor`; return whether it is the first."""
        first = self._bound.setdefault((id(tensor), use), atoms)
        if first.size != atoms.size:
            self.atoms.pin(
                np.concatenate([first, atoms]),
                f"{label(self.node)} shares a parameter that another layer uses in another way",
            )
        elif first is not atoms:
            self.atoms.tie(first, atoms, self.node.name)
        return first is atoms

    # ---- elementwise combination

    def join(self, operands: Sequence[tuple[Tensor, Sequence[int]]], rank: int) -> Tensor:
        """Labels of an elementwise result; operands are (labels, shape of the value), broadcast against each other from
        the right.

        A dimension of the result varies if some operand varies there and every other either varies too or has size one.
        Operands are tied along such dimensions. What varies along another dimension is told apart by its place there.
        """
        aligned = [(_align(labels, rank), (1,) * (rank - len(shape)) + tuple(shape)) for labels, shape in operands]
        joint = [
            d
            for d in range(rank)
            if any(labels.shape[d] > 1 for labels, _ in aligned)
            and all(labels.shape[d] > 1 or shape[d] == 1 for labels, shape in aligned)
        ]
        covering = [labels for labels, _ in aligned if all(labels.shape[d] > 1 for d in joint)]
        if not joint or not covering:
            for labels, _ in aligned:
                self.pin(labels, f"{label(self.node)} combines it with a value whose order is fixed")
            return torch.full((1,) * rank, UNLABELLED)
        extra = {
            id(labels): [d for d in range(rank) if labels.shape[d] > 1 and d not in joint] for labels, _ in aligned
        }
        exact = next((labels for labels in covering if not extra[id(labels)]), None)
        if exact is None:
            shape = [covering[0].shape[d] if d in joint else 1 for d in range(rank)]
            exact = torch.from_numpy(self.atoms.mint(math.prod(shape), self.node.name)).reshape(shape)
        for labels, _ in aligned:
            if labels is exact or labels.numel() == 1:
                continue
            if not any(labels is other for other in covering):
                self.pin(labels, f"{label(self.node)} spreads it over other channels")
                continue
            self.tie(exact.expand(labels.shape), labels)
            if extra[id(labels)]:
                self.atoms.site(labels.numpy(), _places(labels, extra[id(labels)]))
        return exact

    def source(self) -> tuple[Tensor, Tensor]:
        """Labels and value of the first tensor that the current node is given."""
        node = self.tensors()[0]
        return self.labels[node], self.values[node]

    def operand(self, node: fx.Node) -> tuple[Tensor, Sequence[int]]:
        """Labels and shape of a tensor that a node gives."""
        return self.labels[node], tuple(self.values[node].shape)


# --- label tensors ----------------------------------------------------------------------------------------------------


def along(atoms: Tensor, dim: int, rank: int) -> Tensor:
    """Labels of `rank` dimensions that vary along `dim` only."""
    shape = [1] * rank
    shape[dim % rank] = -1
    return atoms.reshape(shape)


def compress(labels: Tensor) -> Tensor:
    """Shrink every dimension along which the labels do not vary to size one."""
    for d in range(labels.dim()):
        if labels.shape[d] > 1 and (labels.stride(d) == 0 or bool((labels == labels.narrow(d, 0, 1)).all())):
            labels = labels.narrow(d, 0, 1)
    return labels.contiguous()


def varying(labels: Tensor) -> list[int]:
    """Dimensions along which the labels vary."""
    return [d for d in range(labels.dim()) if labels.shape[d] > 1]


def _align(labels: Tensor, rank: int) -> Tensor:
    return labels.reshape((1,) * (rank - labels.dim()) + tuple(labels.shape))


def _places(labels: Tensor, dims: Iterable[int]) -> Array:
    """For each element its position along `dims`, as one number."""
    place = torch.zeros((1,) * labels.dim(), dtype=torch.int64)
    for d in dims:
        place = place * labels.shape[d] + along(torch.arange(labels.shape[d]), d, labels.dim())
    return place.expand(labels.shape).contiguous().numpy()


def layer_name(node: fx.Node) -> str:
    """Module path of a call_module node."""
    assert isinstance(node.target, str)
    return node.target


def is_floating_parameter(tensor: Any) -> bool:
    """Whether a tensor read with get_attr is data that may be stored in another order. Index tables are not."""
    return (
        isinstance(tensor, nn.Parameter | Tensor)
        and tensor.is_floating_point()
        and 0 < tensor.numel() <= LARGEST_LABELLED_PARAMETER
    )
