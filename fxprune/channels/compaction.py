"""What a graph looks like without some of its channels: which positions of each value stay, and how operators that move
data (slices, views, shuffles) are told so.

A layer or an elementwise operator needs nothing: its tensors get shorter. An operator that moves data may have sizes
written into it, `x[:, :58]` or `x.view(n, 2, 58, h, w)`. Each is executed on the numbers of the elements, once with all
channels and once without the removed ones. Where the results agree it stays; else its sizes are corrected; else it, or
a whole chain of them, becomes one `ChannelGather`. Where nothing helps, removal is refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fxprune.channels import ChannelAnalysis
from fxprune.channels.analysis import family_of, reads_values
from fxprune.channels.atoms import UNLABELLED
from fxprune.channels.interpreter import varying
from fxprune.errors import PassError
from fxprune.graph.containers import holds_tensor
from fxprune.graph.editing import label, new_gather, tensor_sources
from fxprune.graph.layers import ChannelGather
from fxprune.graph.memory import is_mutating, storage_roots

Classes = npt.NDArray[np.bool_]

MOVEMENT = frozenset("dimensionwise item reshape expand repeat pad".split())
"""Families of rules whose operators may have sizes of channels written into them."""

COPIES = frozenset("contiguous clone detach".split())
"""Operators that stand between movements and give what they are given."""

MADE = (torch.zeros, torch.ones, torch.full)
"""Functions that are given sizes first."""

SIZED = frozenset("view reshape expand zeros ones full new_zeros new_ones new_full".split())
"""Operators that are called with the sizes of their result."""

Keep = dict[int, Tensor]
"""Positions that stay along each dimension that loses some."""


class StuckError(PassError):
    """An operator moves or gives channels in a form that cannot lose some of them.

    Attributes:
        node: it, or the value that it reads.
    """

    def __init__(self, node: fx.Node, message: str) -> None:
        super().__init__(message)
        self.node = node


class Compaction:
    """A graph from which channels are removed.

    Args:
        gm: the graph; `apply` changes it in place.
        values: what each node gives on meta tensors, with all channels.
        analysis: of `gm`.
        removed: `(atoms,)` whether each atom goes.
    """

    def __init__(
        self, gm: fx.GraphModule, values: Mapping[fx.Node, Any], analysis: ChannelAnalysis, removed: Classes
    ) -> None:
        self._gm, self._values, self._labels, self._removed = gm, dict(values), dict(analysis.labels), removed
        self._roots = storage_roots(gm)
        self._position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._writers = [node for node in gm.graph.nodes if is_mutating(gm, node)]
        self._shorter: dict[fx.Node, Any] = {}  # what each node gives without the removed channels
        # Nodes that cannot run any more: where their elements come from, and which these are.
        self._virtual: dict[fx.Node, tuple[fx.Node, Any]] = {}

    def apply(self) -> tuple[str, ...]:
        """Correct the operators that move data; return the names of those that were changed.

        Raises:
            StuckError: an operator reads or gives channels in a form that cannot lose some of them.
        """
        changed = []
        for node in list(self._gm.graph.nodes):
            if node not in self._values:
                continue
            if self._is_movement(node) and self._moves_channels(node):
                changed += [node.name] if self._move(node) else []
            elif family_of(self._gm, node) == "constant" and self.keep(self._labels[node]):
                changed += [node.name] if self._resize(node) else []
            else:
                self._shorter[node] = self._without(node)
        for node in reversed(self._virtual):
            if node.users:
                reader = next(iter(node.users))
                raise StuckError(
                    node, f"{label(reader)} reads {label(node)}, which cannot lose some of its channels alone"
                )
            self._gm.graph.erase_node(node)
        return tuple(changed)

    def size(self, node: fx.Node, dim: int) -> int:
        """How many positions of a tensor stay along a dimension, once `apply` has been called."""
        return int(self._shorter[node].shape[dim])

    def positions(self, node: fx.Node, dim: int) -> Tensor | None:
        """The positions of a value that stay along a dimension; None if all do."""
        labels = self._labels.get(node)
        return (self.keep(labels) or {}).get(dim % labels.dim()) if isinstance(labels, Tensor) else None

    def keep(self, labels: Tensor) -> Keep | None:
        """Positions that stay along each dimension of a value with these labels; None if they form no rectangle."""
        atoms = labels.numpy()
        stays = np.ones(atoms.shape, dtype=np.bool_)
        labelled = atoms != UNLABELLED
        stays[labelled] = ~self._removed[atoms[labelled]]
        found: Keep = {}
        whole = np.ones_like(stays)
        for d in varying(labels):
            line = stays.any(axis=tuple(i for i in range(stays.ndim) if i != d))
            if not line.all():
                found[d] = torch.from_numpy(np.flatnonzero(line))
            whole &= line.reshape([-1 if i == d else 1 for i in range(stays.ndim)])
        return found if np.array_equal(whole, stays) else None

    def _shortened(self, node: fx.Node, value: Any) -> Any:
        """A value of a node, or one of its shape, without the removed channels; None if that is no tensor."""
        labels = [leaf for leaf in tree_leaves(self._labels[node]) if isinstance(leaf, Tensor)]
        leaves, spec = tree_flatten(value)
        pending = iter(labels)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                keep = self.keep(next(pending))
                if keep is None:
                    return None
                leaves[i] = shorten(leaf, keep)
        return tree_unflatten(leaves, spec)

    def _without(self, node: fx.Node) -> Any:
        """What a node gives without the removed channels: tensors on the meta device, sizes computed anew."""
        value = self._values[node]
        if holds_tensor(value):
            if self._labels.get(node) is None:
                return value
            shortened = self._shortened(node, value)
            if shortened is None:
                raise StuckError(node, f"{label(node)} gives channels in a form that cannot lose some of them")
            return shortened
        if node.op not in ("call_function", "call_method") or any(s in self._virtual for s in node.all_input_nodes):
            return value
        if reads_values(node) and any(holds_tensor(self._values.get(source)) for source in node.all_input_nodes):
            return value  # of channels that stay
        return self._run(node, self._shorter)

    def _is_movement(self, node: fx.Node) -> bool:
        name = getattr(node.target, "__name__", node.target)
        return name in COPIES or family_of(self._gm, node) in MOVEMENT

    def _moves_channels(self, node: fx.Node) -> bool:
        """Whether an operator moves a removed channel."""
        source = self._source(node)
        if source is None or source in self._virtual:
            return source is not None
        leaves = [*tree_leaves(self._labels[source]), *tree_leaves(self._labels[node])]
        return isinstance(self._values[source], Tensor) and any(
            self.keep(leaf) != {} for leaf in leaves if isinstance(leaf, Tensor)
        )

    def _source(self, node: fx.Node) -> fx.Node | None:
        return next(iter(tensor_sources(node, self._values)), None)

    def _move(self, node: fx.Node) -> bool:
        """Make a movement right; return whether the graph was changed."""
        source = self._source(node)
        assert source is not None
        if source in self._virtual:
            root, numbers = self._virtual[source]
            moved = self._run(node, {**self._values, source: numbers})
        else:
            root, numbers = source, _numbered(self._values[source])
            moved = self._attempt(node, {**self._values, source: numbers})
            if moved is None:
                raise StuckError(node, f"{label(node)} cannot be followed, so it is not known what it moves where")
            expected, given = self._shortened(node, moved), self._shortened(source, numbers)
            if expected is not None:
                for args in (node.args, *self._corrected(node, expected)):
                    before, node.args = node.args, args
                    if _equal(self._attempt(node, {**self._shorter, source: given}), expected):
                        self._shorter[node] = self._without(node)
                        return args is not before
                    node.args = before
        if isinstance(moved, Tensor) and self._gather(node, root, moved):
            return True
        self._virtual[node] = root, moved
        return False

    def _resize(self, node: fx.Node) -> bool:
        """Make a constant with as many channels as stay; return whether the sizes written into it were changed."""
        expected = self._shortened(node, self._values[node])
        for args in (node.args, *self._corrected(node, expected)):
            before, node.args = node.args, args
            found = self._attempt(node, self._shorter)
            if isinstance(found, Tensor) and found.shape == expected.shape:
                self._shorter[node] = expected
                return args is not before
            node.args = before
        raise StuckError(node, f"{label(node)} makes channels whose number cannot be changed")

    def _corrected(self, node: fx.Node, expected: Any) -> Iterator[tuple[Any, ...]]:
        """Arguments whose sizes fit the value without the removed channels."""
        if not isinstance(expected, Tensor) or not isinstance(self._values[node], Tensor):
            return
        if getattr(node.target, "__name__", node.target) in SIZED:
            first = 0 if node.target in MADE else 1  # where the sizes are: torch.zeros(2, 3), x.view(2, 3)
            listed = len(node.args) > first and isinstance(node.args[first], list | tuple)
            given = node.args[first] if listed else node.args[first:]
            if isinstance(given, list | tuple) and len(given) == expected.dim():
                pairs = zip(given, expected.shape, self._values[node].shape, strict=True)
                sizes = tuple(size if old == new or size == -1 else new for size, new, old in pairs)
                yield (*node.args[:first], sizes, *node.args[first + 1 :]) if listed else (*node.args[:first], *sizes)
        elif node.target is F.pad:
            yield (node.args[0], self._pad_widths(node), *node.args[2:])

    def _pad_widths(self, node: fx.Node) -> list[int]:
        """Widths of a padding of which some of the channels go that it adds."""
        labels = self._labels[node]
        widths = [int(width) for width in node.args[1]]  # type: ignore[union-attr, arg-type]  # a list of numbers
        for d, stays in (self.keep(labels) or {}).items():
            i, size = 2 * (labels.dim() - 1 - d), self._values[node].shape[d]
            if i < len(widths):
                before, after = widths[i : i + 2]
                widths[i : i + 2] = int((stays < before).sum()), int((stays >= size - after).sum())
        return widths

    def _gather(self, node: fx.Node, root: fx.Node, moved: Tensor) -> bool:
        """Replace a movement by a gather that reads `root`, if all it does is to move whole channels."""
        numbers = _numbered(self._values[root])
        expected, given = self._shortened(node, moved), self._shortened(root, numbers)
        dims = varying(self._labels[root])
        if expected is None or len(dims) != 1 or expected.dim() != given.dim() or self._is_written_after(node):
            return False
        dim = dims[0]
        lines, wanted = (each.movedim(dim, 0).flatten(1)[:, 0].tolist() for each in (given, expected))
        place = {number: i for i, number in enumerate(lines)}
        index = torch.tensor([place.get(number, 0) for number in wanted], dtype=torch.int64)
        if not _equal(given.index_select(dim, index), expected):
            return False
        gather = ChannelGather(index.to(_device(self._gm)), given.shape[dim], dim - given.dim())
        with self._gm.graph.inserting_before(node):
            new = new_gather(self._gm, root, gather, f"{node.name}_gather")
        node.replace_all_uses_with(new)
        self._virtual[node] = root, moved
        self._values[new], self._labels[new] = self._values[node], self._labels[node]
        self._shorter[new] = self._without(new)
        return True

    def _is_written_after(self, node: fx.Node) -> bool:
        """Whether a later operator writes into the memory that a node may share: a copy would not see it."""
        later = (writer for writer in self._writers if self._position[writer] > self._position[node])
        return any(not self._roots[node].isdisjoint(self._roots[writer]) for writer in later)

    def _run(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
        if node.op == "call_module":
            return self._gm.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a function

    def _attempt(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        try:
            return self._run(node, known)
        except (RuntimeError, ValueError, IndexError, KeyError):  # the sizes do not fit
            return None


def shorten(value: Tensor, keep: Keep) -> Tensor:
    """The positions of a tensor that stay."""
    for d, positions in keep.items():
        if value.shape[d] > 1:  # a dimension of size one stands for all channels
            value = value.index_select(d, positions.to(value.device))
    return value


def _numbered(value: Tensor) -> Tensor:
    """A tensor of the shape of `value` in which every element is its own number; 0 is for what a padding adds."""
    return torch.arange(1, value.numel() + 1).reshape(value.shape)


def _equal(found: Any, expected: Any) -> bool:
    (a, kind), (b, other) = tree_flatten(found), tree_flatten(expected)
    return kind == other and all(
        isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def _device(gm: fx.GraphModule) -> torch.device:
    return next((tensor.device for tensor in gm.parameters()), torch.device("cpu"))
