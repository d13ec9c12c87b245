"""Put the result of the exact passes, made on a recording, into a copy of the user's own model.

After the passes every order is stored in parameters or stands as a gather beside a layer, which then becomes a part of
that layer (`fxprune.exact.placements`). Class, attributes and forward of the model stay, and so does what they see.
"""

import copy
from collections.abc import Mapping, Set

import torch
from torch import Tensor, fx, nn

from fxprune.exact.placements import PlacementError, placements
from fxprune.graph.convolutions import Convolution
from fxprune.graph.copying import copied, standing_for
from fxprune.graph.editing import read_by_name
from fxprune.graph.gathered import put_gathers_into
from fxprune.graph.layers import ChannelGather
from fxprune.graph.norms import NormWithZeros
from fxprune.plans.eligibility import parameters_of_several_modules

COUNTS = (
    "groups", "in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels",
    "num_parameters", "normalized_shape",
)  # fmt: skip
"""Attributes in which layers repeat what their parameters say."""


@torch.no_grad()
def operate(masked: nn.Module, gm: fx.GraphModule) -> nn.Module:
    """A copy of `masked`, the user's model, whose layers hold what those of the graph hold now.

    Args:
        masked: the model that was recorded.
        gm: its recording after the passes.

    Raises:
        PlacementError: gathers have no layer to belong to.
    """
    before = dict(masked.named_modules())
    placed = placements(gm, before)
    result = copied(masked)
    modules = dict(result.named_modules())
    renewed: dict[int, Tensor] = {}
    shared, named = parameters_of_several_modules(gm), read_by_name(gm)
    for path, layer in gm.named_modules():
        own = modules.get(path)
        if own is None or isinstance(layer, ChannelGather):
            continue
        if isinstance(layer, NormWithZeros) and type(layer) is not type(own):
            become(own, layer)
            continue
        read, give = placed.get(path, (None, None))
        _transfer(own, before[path], layer, renewed)
        if (give is not None or (read is not None and _is_dense(own))) and _is_used_elsewhere(layer, shared, named):
            raise PlacementError({path: "its parameters are used elsewhere too, in their order"})
        if read is not None and _is_dense(own):
            _reorder_inputs(own, read)
            read = None
        if read is None and give is None:
            continue
        if give is not None:
            _give_in_order(own, give)
        put_gathers_into(own, read, give, _channels(before[path]))
    return result


def become(own: nn.Module, layer: nn.Module) -> None:
    """Make a module what another is, in place: whoever refers to it sees that."""
    training = own.training
    own.__class__ = type(layer)
    vars(own).clear()
    vars(own).update(vars(copy.deepcopy(layer)))
    own.train(training)


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
                renewed[id(tensor)] = standing_for(target, tensor.detach().clone())
            mine[name] = renewed[id(tensor)]  # type: ignore[assignment]  # a parameter replaces a parameter
    for name in COUNTS:
        value = vars(layer).get(name)
        if value is not None and vars(own).get(name) not in (None, value):
            setattr(own, name, value)


def _channels(conv: nn.Module) -> int:
    assert isinstance(conv, Convolution)
    return conv.in_channels


def _is_used_elsewhere(layer: nn.Module, shared: Set[int], named: Mapping[int, str]) -> bool:
    """Whether another layer, or the model's own code, has parameters of a layer."""
    return any(id(parameter) in shared or id(parameter) in named for parameter in layer.parameters())


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
