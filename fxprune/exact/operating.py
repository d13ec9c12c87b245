"""Put the result of the exact passes, made on a recording, into a copy of the user's own model.

After the passes every order is stored in parameters or stands as a gather beside a layer. Class, attributes and forward
of the model stay, and so does what they see: a value that user code sees is what a layer writes, or that behind one
permutation, which then belongs to the layer that writes it. All other gathers belong to the layers that read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.graph.copying import copied
from fxprune.graph.editing import called_module, label
from fxprune.graph.gathered import can_give_in_order, put_gathers_into
from fxprune.graph.layers import ChannelGather

Order = Tensor | None
"""Positions to read, or None for all in their order."""

COUNTS = (
    "groups", "in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels",
    "num_parameters", "normalized_shape",
)  # fmt: skip
"""Attributes in which layers repeat what their parameters say."""


class PlacementError(Exception):
    """A layer cannot have the gathers that the passes put beside it.

    Attributes:
        layer: its path.
    """

    def __init__(self, layer: str, why: str) -> None:
        super().__init__(why)
        self.layer = layer


@torch.no_grad()
def operate(masked: nn.Module, gm: fx.GraphModule) -> nn.Module:
    """A copy of `masked`, the user's model, whose layers hold what those of the graph hold now.

    Args:
        masked: the model that was recorded.
        gm: its recording after the passes.

    Raises:
        PlacementError: a gather has no layer to belong to.
    """
    before = dict(masked.named_modules())
    placed = _Placements(gm, before).found()
    result = copied(masked)
    modules = dict(result.named_modules())
    renewed: dict[int, Tensor] = {}
    for path, layer in gm.named_modules():
        own = modules.get(path)
        if own is None or isinstance(layer, ChannelGather):
            continue
        read, give = placed.get(path, (None, None))
        _transfer(own, before[path], layer, renewed)
        if read is not None and _is_dense(own):
            _reorder_inputs(own, read)
            read = None
        if read is None and give is None:
            continue
        if give is not None:
            _give_in_order(own, give)
        put_gathers_into(own, read, give)
    return result


def _transfer(own: nn.Module, before: nn.Module, layer: nn.Module, renewed: dict[int, Tensor]) -> None:
    """Bring the tensors and counts of a layer of the graph into the user's.

    Args:
        own: the layer to change.
        before: the same layer in the model that was recorded, with which the graph shares what no pass has changed.
        layer: of the graph.
        renewed: what stands in place of each tensor of the graph that has another shape: tied ones stay tied.
    """
    for mine, old, new in (
        (own._parameters, before._parameters, layer._parameters),
        (own._buffers, before._buffers, layer._buffers),
    ):
        for name, tensor in new.items():
            target = mine.get(name)
            if tensor is None or target is None or tensor is old.get(name):
                continue
            if target.shape == tensor.shape:
                target.copy_(tensor)  # in place: an optimizer's list, and ties, stay
                continue
            if id(tensor) not in renewed:
                data = tensor.detach().clone()
                is_parameter = isinstance(target, nn.Parameter)
                renewed[id(tensor)] = nn.Parameter(data, target.requires_grad) if is_parameter else data
            mine[name] = renewed[id(tensor)]  # type: ignore[assignment]  # a parameter replaces a parameter
    for name in COUNTS:
        value = vars(layer).get(name)
        if value is not None and vars(own).get(name) not in (None, value):
            setattr(own, name, value)


def _is_dense(layer: nn.Module) -> bool:
    """Whether any permutation of what the layer reads can go into its weight."""
    return isinstance(layer, nn.Linear) or getattr(layer, "groups", 0) == 1


def _reorder_inputs(layer: nn.Module, read: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dim = 0 if getattr(layer, "transposed", False) else 1
    weight.copy_(weight.index_select(dim, read.argsort()))


def _give_in_order(layer: nn.Module, give: Tensor) -> None:
    """Store filters in the order in which they are given."""
    for tensor in (layer.weight, layer.bias):
        if isinstance(tensor, Tensor):
            tensor.copy_(tensor.index_select(0, give))


# --- which gather belongs to which layer ------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class _Placements:
    """Where the gathers of a graph go.

    Attributes:
        gm: the graph.
        layers: the user's, by path.
    """

    gm: fx.GraphModule
    layers: Mapping[str, nn.Module]

    def found(self) -> dict[str, tuple[Order, Order]]:
        """For each layer with gathers the order in which it reads, and that in which it gives.

        Raises:
            PlacementError: call sites of a layer ask for different ones, or there is no layer.
        """
        reads: dict[str, list[Order]] = {}
        gives: dict[str, list[Order]] = {}
        for node in self.gm.graph.nodes:
            if self._is_gather(node):
                continue
            ends = list(self._ends(node, None))
            give = self._given(node, ends)
            if self._is_layer(node):
                gives.setdefault(str(node.target), []).append(give)
            for end in ends:
                if self._takes_gather(end):
                    reads.setdefault(str(end.node.target), []).append(_relative(end.order, give))
        placed = {}
        for path in reads.keys() | gives.keys():
            read, give = (_agreed(path, orders.get(path, [None])) for orders in (reads, gives))
            if read is not None or give is not None:
                placed[path] = read, give
        return placed

    def _given(self, node: fx.Node, ends: Sequence[_End]) -> Order:
        """The order in which the value of a node is seen by all that cannot take a gather themselves."""
        seen = [end.order for end in ends if not self._takes_gather(end)]
        if all(order is None for order in seen):
            return None
        reader = next((end.node for end in ends if self._is_layer(end.node)), node)
        where = str((node if self._is_layer(node) else reader).target)
        if not all(_same(order, seen[0]) for order in seen):
            raise PlacementError(where, "its result is seen in two orders")
        if not self._is_layer(node):
            raise PlacementError(where, f"a gather would stand behind {label(node)}, in the model's own code")
        if not can_give_in_order(self.layers[where]):
            raise PlacementError(where, "its result is seen in an order in which it cannot give it")
        return seen[0]

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


def _relative(order: Order, give: Order) -> Order:
    """What a reader that is given channels in the order `give` has to read to see them in `order`."""
    if give is None:
        return order
    back = give.argsort()
    if order is None:
        return back
    read = back[order]
    return None if torch.equal(read, torch.arange(give.numel(), device=read.device)) else read


def _agreed(path: str, orders: Sequence[Order]) -> Order:
    """What all calls of a layer ask for."""
    if not all(_same(order, orders[0]) for order in orders):
        raise PlacementError(path, "its calls ask for different orders")
    return orders[0]


def _same(a: Order, b: Order) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
