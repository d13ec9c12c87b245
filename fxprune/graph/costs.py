"""What the layers of a graph cost: parameters and multiply-accumulates."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.graph.editing import calls


def layer_costs(gm: fx.GraphModule, values: Mapping[fx.Node, Any]) -> dict[str, tuple[int, int | None]]:
    """Parameters, and MACs of one image over all calls (None if shapes are unknown), of each convolution and linear
    layer, by module path.
    """
    costs: dict[str, tuple[int, int | None]] = {}
    batch = batch_size(gm, values)
    for node, layer in calls(gm, nn.Module):
        if not isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            continue
        params, macs = costs.get(str(node.target), (sum(p.numel() for p in layer.parameters()), 0))
        value = values.get(node)
        costs[str(node.target)] = (
            params,
            None
            if macs is None or not isinstance(value, Tensor)
            else macs + _macs(layer, node, value, values) // batch,
        )
    return costs


def total_macs(costs: Mapping[str, tuple[int, int | None]]) -> int | None:
    """MACs of all layers for one image; None if a shape is unknown."""
    return known_sum(macs for _, macs in costs.values())


def known_sum(counts: Iterable[int | None]) -> int | None:
    """The sum; None if a summand is."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def _macs(layer: nn.Module, node: fx.Node, value: Tensor, values: Mapping[fx.Node, Any]) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        source = values.get(node.all_input_nodes[0])
        return (source.numel() if isinstance(source, Tensor) else 0) * math.prod(weight.shape[1:])
    return value.numel() * math.prod(weight.shape[1:])


def batch_size(gm: fx.GraphModule, values: Mapping[fx.Node, Any]) -> int:
    """Number of samples in the inputs that the values were found for; 1 if no input has a batch dimension."""
    placeholders = [values.get(node) for node in gm.graph.nodes if node.op == "placeholder"]
    tensors = [leaf for leaf in tree_leaves(placeholders) if isinstance(leaf, Tensor) and leaf.dim() > 1]
    return max(1, tensors[0].shape[0]) if tensors else 1
