"""Which layer each gather of a recording belongs to, once the passes have run.

A value that the model's own code sees is what a layer writes, or that behind one permutation, which then belongs to the
layer that writes it. All other gathers belong to the layers that read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from fxprune.graph.convolutions import Convolution, channel_dim
from fxprune.graph.costs import LAYERS
from fxprune.graph.editing import called_module, label
from fxprune.graph.layers import ChannelGather

Order = Tensor | None
"""Positions to read, or None for all in their order."""


class PlacementError(Exception):
    """Layers cannot have the gathers that the passes put beside them.

    Attributes:
        layers: their paths, with the reason.
    """

    def __init__(self, layers: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{path}: {why}" for path, why in layers.items()))
        self.layers = dict(layers)


def placements(gm: fx.GraphModule, layers: Mapping[str, nn.Module]) -> dict[str, tuple[Order, Order]]:
    """For each layer with gathers the order in which it reads, and that in which it gives.

    Args:
        gm: a recording after the passes.
        layers: the user's, by path.

    Raises:
        PlacementError: call sites of a layer ask for different orders, or a gather has no layer to belong to.
    """
    return _Placements(gm, layers).found()


@dataclass(frozen=True)
class _End:
    """A node that reads a value behind gathers.

    Attributes:
        node: it.
        order: which of the value's channels it sees.
        dims: along which dimension, counted from the end; none without gathers.
        source: what it reads, the value or the last gather.
    """

    node: fx.Node
    order: Order
    dims: frozenset[int]
    source: fx.Node


@dataclass
class _Placements:
    """The search for them.

    Attributes:
        gm: the graph.
        layers: the user's, by path.
        ends: who reads each value.
        gives: the order in which each value is given.
        wrong: layers that cannot have their gathers.
    """

    gm: fx.GraphModule
    layers: Mapping[str, nn.Module]
    ends: dict[fx.Node, tuple[_End, ...]] = field(init=False)
    gives: dict[fx.Node, Order] = field(init=False)
    wrong: dict[str, str] = field(default_factory=dict)

    def found(self) -> dict[str, tuple[Order, Order]]:
        """See `placements`."""
        nodes = [node for node in self.gm.graph.nodes if not self._is_gather(node)]
        self.ends = {node: tuple(self._ends(node, None)) for node in nodes}
        self.gives = {node: self._given(node) for node in nodes}
        for sites in self._reads().values():
            if not _agree([order for _, order in sites]):
                for node, _ in sites:
                    self.gives[node] = self.gives[node] if self.gives[node] is not None else self._next(node)
        gives: dict[str, list[Order]] = {}
        for node, give in self.gives.items():
            if self._is_layer(node):
                gives.setdefault(str(node.target), []).append(give)
        reads = {path: [order for _, order in sites] for path, sites in self._reads().items()}
        placed = {}
        for path in reads.keys() | gives.keys():
            asked, given = reads.get(path, [None]), gives.get(path, [None])
            if not _agree(asked) or not _agree(given):
                self.wrong.setdefault(path, "its calls ask for different orders")
            if asked[0] is not None or given[0] is not None:
                placed[path] = asked[0], given[0]
        if self.wrong:
            raise PlacementError(self.wrong)
        return placed

    def _next(self, node: fx.Node) -> Order:
        """The order of the gather through which alone a layer's result is read, as `AgreeReads` leaves it."""
        users = list(node.users)
        if len(users) != 1 or not self._is_layer(node) or not self._is_gather(users[0]):
            return None
        gather = called_module(self.gm, users[0])
        assert isinstance(gather, ChannelGather)
        return gather.index if gather.is_permutation and not gather.is_identity else None

    def _reads(self) -> dict[str, list[tuple[fx.Node, Order]]]:
        """For each layer what its calls read: the value, and the order in which they have to see it as it is given."""
        found: dict[str, list[tuple[fx.Node, Order]]] = {}
        for node, ends in self.ends.items():
            for end in ends:
                if self._takes_gather(end):
                    order = _relative(end.order, self.gives[node])
                    found.setdefault(str(end.node.target), []).append((node, order))
        return found

    def _given(self, node: fx.Node) -> Order:
        """The order in which the value of a node is seen by all that cannot take a gather themselves."""
        ends = self.ends[node]
        seen = [end.order for end in ends if not self._takes_gather(end)]
        if all(order is None for order in seen):
            return None
        reader = next((end.node for end in ends if self._is_layer(end.node)), node)
        where = str((node if self._is_layer(node) else reader).target)
        if not _agree(seen):
            self.wrong[where] = "its result is seen in two orders"
        elif not self._is_layer(node):
            self.wrong[where] = f"a gather would stand behind {label(node)}, in the model's own code"
        elif getattr(self.layers[where], "transposed", True) or not self._along_channels(node, ends):
            self.wrong[where] = "its result is seen in an order in which it cannot give it"
        return seen[0]

    def _ends(
        self, node: fx.Node, order: Order, channels: int = 0, dims: frozenset[int] = frozenset()
    ) -> Iterator[_End]:
        """Readers of a value behind chains of gathers; `node` is the value, of so many channels if that is known, or a
        gather that gives it in `order`.
        """
        for user in node.users:
            if self._is_gather(user):
                gather = called_module(self.gm, user)
                assert isinstance(gather, ChannelGather)
                index = gather.index if order is None else order[gather.index]
                yield from self._ends(user, index, channels or gather.in_channels, dims | {gather.dim})
            else:
                yield _End(user, _tidy(order, channels), dims, node)

    def _takes_gather(self, end: _End) -> bool:
        """Whether a layer can read through the gathers itself: along the dimension that it mixes."""
        if not self._is_layer(end.node) or end.node.all_input_nodes != [end.source]:
            return False
        return end.dims <= {_dim(called_module(self.gm, end.node))}

    def _along_channels(self, node: fx.Node, ends: Sequence[_End]) -> bool:
        dim = _dim(called_module(self.gm, node))
        return all(end.dims <= {dim} for end in ends)

    def _is_gather(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(called_module(self.gm, node), ChannelGather)

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(called_module(self.gm, node), LAYERS)


def _dim(layer: nn.Module) -> int:
    """The dimension that a layer mixes, counted from the end."""
    return channel_dim(layer) if isinstance(layer, Convolution) else -1


def _relative(order: Order, give: Order) -> Order:
    """What a reader that is given channels in the order `give` has to read to see them in `order`."""
    if give is None:
        return order
    back = give.argsort()
    if order is None:
        return back
    return _tidy(back[order], give.numel())


def _tidy(order: Order, channels: int) -> Order:
    """The same, with None for all channels as they come."""
    if order is None or torch.equal(order, torch.arange(channels, device=order.device)):
        return None
    return order


def _agree(orders: Sequence[Order]) -> bool:
    return all(_same(order, orders[0]) for order in orders)


def _same(a: Order, b: Order) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
