"""Which layer each gather of a recording belongs to, once the passes have run.

A value that the model's own code sees is what a layer writes, or that behind one permutation, which then belongs to the
layer that writes it. All other gathers belong to the layers that read. Where a layer is called at several places and
would read in different orders there (a head on all levels of a pyramid), the writers give in the order of the first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

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
        source: what it reads, the value or the last gather.
    """

    node: fx.Node
    order: Order
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
        for path, sites in self._reads().items():
            if not _agree([order for _, order in sites]):
                self._adjust(path, sites)
        gives: dict[str, list[Order]] = {}
        for node, give in self.gives.items():
            if self._is_layer(node):
                gives.setdefault(str(node.target), []).append(give)
        reads = {path: [order for _, order in sites] for path, sites in self._reads().items()}
        placed = {}
        for path in reads.keys() | gives.keys():
            read, give = reads.get(path, [None]), gives.get(path, [None])
            if not _agree(read) or not _agree(give):
                self.wrong.setdefault(path, "its calls ask for different orders")
            if read[0] is not None or give[0] is not None:
                placed[path] = read[0], give[0]
        if self.wrong:
            raise PlacementError(self.wrong)
        return placed

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
        elif not self._can_give(node):
            self.wrong[where] = "its result is seen in an order in which it cannot give it"
        return seen[0]

    def _adjust(self, path: str, sites: Sequence[tuple[fx.Node, Order]]) -> None:
        """Make the writers of what a layer reads give it so that all calls read in the order of the first."""
        first = sites[0][1]
        for node, order in sites[1:]:
            if _same(order, first) or not self._can_give(node) or self.gives[node] is not None:
                continue
            if not all(self._takes_gather(end) for end in self.ends[node]):
                continue  # the model's own code sees it too
            weight = self.layers[str(node.target)].weight
            assert isinstance(weight, Tensor)
            self.gives[node] = _moving(first, order, weight.shape[0])

    def _ends(self, node: fx.Node, order: Order) -> Iterator[_End]:
        """Readers of a value behind chains of gathers; `node` is the value, or a gather that gives it in `order`."""
        for user in node.users:
            if self._is_gather(user):
                gather = called_module(self.gm, user)
                assert isinstance(gather, ChannelGather)
                yield from self._ends(user, gather.index if order is None else order[gather.index])
            else:
                yield _End(user, order, node)

    def _takes_gather(self, end: _End) -> bool:
        return self._is_layer(end.node) and end.node.all_input_nodes == [end.source]

    def _is_gather(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(called_module(self.gm, node), ChannelGather)

    def _is_layer(self, node: fx.Node) -> bool:
        kinds = nn.modules.conv._ConvNd | nn.Linear
        return node.op == "call_module" and isinstance(called_module(self.gm, node), kinds)

    def _can_give(self, node: fx.Node) -> bool:
        layer = self.layers.get(str(node.target)) if node.op == "call_module" else None
        return isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed


def _moving(wanted: Order, order: Order, channels: int) -> Order:
    """The order `p` in which a value of so many channels has to be given so that who reads `wanted` of it reads
    `order` of the value itself, `p[wanted] == order`; None if there is none.
    """
    whole = torch.arange(channels)
    a, b = (whole if o is None else o.cpu() for o in (wanted, order))
    pairs = torch.unique(torch.stack([a, b]), dim=1) if a.shape == b.shape else torch.zeros(2, 0, dtype=torch.int64)
    sources, targets = pairs
    if not len(sources) or len(sources.unique()) < len(sources) or len(targets.unique()) < len(targets):
        return None
    p = torch.empty_like(whole)
    free, left = torch.ones(2, channels, dtype=torch.bool)
    free[sources], left[targets] = False, False
    p[sources], p[free] = targets, whole[left]
    device = next((o.device for o in (order, wanted) if o is not None), p.device)
    return p.to(device)


def _relative(order: Order, give: Order) -> Order:
    """What a reader that is given channels in the order `give` has to read to see them in `order`."""
    if give is None:
        return order
    back = give.argsort()
    if order is None:
        return back
    read = back[order]
    return None if torch.equal(read, torch.arange(give.numel(), device=read.device)) else read


def _agree(orders: Sequence[Order]) -> bool:
    return all(_same(order, orders[0]) for order in orders)


def _same(a: Order, b: Order) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
