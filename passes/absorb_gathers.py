"""conv(gather(x, p), W) == conv(x, W[:, inverse(p)]) and gather(conv(x, W), p) == conv(x, W[p]), for permutations p;
the same for linear layers.

W (O, C, kh, kw), x (N, C, H, W), p (C,) long. A transposed convolution holds W as (C, O, kh, kw).

1. Inputs: all call sites of the layer read the same permutation.
2. Outputs: all call sites are read by nobody but the same permutation. Bias (and the gain of a weight-standardised
   convolution) moves with W.
3. A layer with groups absorbs a permutation that moves channels inside their group only.
A layer is called from several sites if it is shared, or if another layer has the same weight; then all sites must
agree, and all weights change together.
Left alone: a gather that others read as well; a gather along another dimension than the channels. With a reason:
gathers that repeat or drop channels, sites that disagree, permutations that cross groups, an input that an in-place
operator changes between the gather and the layer, layers with hooks or a computed weight, and layers whose parameters
the graph reads by name as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.graph.convolutions import Convolution, channel_dim
from fxprune.graph.editing import (
    Outcome,
    Skip,
    Tensors,
    call_sites,
    called_module,
    calls,
    erase_gather,
    first_reader,
    read_by_name,
)
from fxprune.graph.layers import ChannelGather
from fxprune.graph.memory import Memory
from fxprune.graph.tracing import is_hooked

Layer = Convolution | nn.Linear


@dataclass(frozen=True)
class AbsorbGathers:
    """Store weights in the order in which their channels come, instead of reordering the channels."""

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        rewritten: list[str] = []
        skipped: list[Skip] = []
        tensors, memory, named, callers = Tensors(gm), Memory(gm), read_by_name(gm), call_sites(gm)
        for layers, sites in _layers_by_weight(gm):
            for find, absorb in ((_gathers_before, _absorb_inputs), (_gathers_after, _absorb_outputs)):
                found = find(gm, sites)
                if not found:
                    continue
                reason = _why_not(gm, layers, sites, found, memory, named)
                if not reason:
                    index = called_module(gm, found[0]).index
                    assert isinstance(index, Tensor)
                    if not absorb(tensors, layers, index):
                        reason = "it moves channels between the groups of the layer"
                if reason:
                    skipped.extend(Skip(node.name, reason) for node in dict.fromkeys(found))
                    continue
                rewritten.extend(site.name for site in sites)
                for node in dict.fromkeys(found):
                    erase_gather(gm, node, node.all_input_nodes[0], callers)
        return Outcome(tuple(rewritten), tuple(skipped))


def _why_not(
    gm: fx.GraphModule,
    layers: Sequence[Layer],
    sites: Sequence[fx.Node],
    found: Sequence[fx.Node],
    memory: Memory,
    named: Mapping[int, str],
) -> str:
    gathers = [called_module(gm, node) for node in found]
    index = gathers[0].index
    assert isinstance(index, Tensor)
    if not all(isinstance(gather, ChannelGather) and gather.is_permutation for gather in gathers):
        return "it reads channels twice or not at all"
    if len(found) < len(sites) or not all(torch.equal(gather.index, index) for gather in gathers):  # type: ignore[arg-type]  # buffers
        return "the call sites of the layer read different orders"
    if any(memory.changes(node.all_input_nodes[0], node, node.users) for node in found):
        return "an in-place operator may change its input before the layer reads it"
    if any(is_hooked(layer) for layer in layers):
        return "the layer has hooks or a computed weight"
    for layer in layers:
        if reader := first_reader(layer.parameters(), named):
            return f"{reader} reads a parameter of the layer"
    return ""


def _layers_by_weight(gm: fx.GraphModule) -> list[tuple[list[Layer], list[fx.Node]]]:
    """Layers that share one weight, with all their call sites."""
    by_weight: dict[int, tuple[list[Layer], list[fx.Node]]] = {}
    for node, layer in calls(gm, nn.Module):
        if isinstance(layer, Convolution | nn.Linear):
            layers, sites = by_weight.setdefault(id(layer.weight), ([], []))
            layers.extend([layer] if all(layer is not other for other in layers) else [])
            sites.append(node)
    return list(by_weight.values())


def _gathers_before(gm: fx.GraphModule, sites: Sequence[fx.Node]) -> list[fx.Node]:
    found = [source for site in sites if _moves_channels(gm, source := site.all_input_nodes[0], site)]
    return found if all(user in sites for gather in found for user in gather.users) else []


def _gathers_after(gm: fx.GraphModule, sites: Sequence[fx.Node]) -> list[fx.Node]:
    return [
        user for site in sites if len(site.users) == 1 and _moves_channels(gm, user := next(iter(site.users)), site)
    ]


def _moves_channels(gm: fx.GraphModule, node: fx.Node, layer: fx.Node) -> bool:
    """Whether `node` is a gather along the dimension, counted from the end, of the channels of `layer`."""
    if node.op != "call_module" or not isinstance(gather := called_module(gm, node), ChannelGather):
        return False
    kind = called_module(gm, layer)
    return gather.dim == (channel_dim(kind) if isinstance(kind, Convolution) else -1)


def _absorb_inputs(tensors: Tensors, layers: Sequence[Layer], index: Tensor) -> bool:
    layer = layers[0]
    groups, order = _groups(layer), index.argsort()
    if not _stays_in_groups(order, groups):
        return False
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear) or groups == 1 or layer.transposed:
        new = weight.index_select(0 if _is_transposed(layer) else 1, order)
    else:
        inside = order.reshape(groups, -1) % weight.shape[1]
        new = torch.cat([part.index_select(1, inside[g]) for g, part in enumerate(weight.chunk(groups))])
    tensors.replace(layer.weight, new)
    return True


def _absorb_outputs(tensors: Tensors, layers: Sequence[Layer], order: Tensor) -> bool:
    layer = layers[0]
    groups = _groups(layer)
    if not _stays_in_groups(order, groups):
        return False
    weight = layer.weight.detach()
    if not _is_transposed(layer):
        new = weight.index_select(0, order)
    else:
        inside = order.reshape(groups, -1) % weight.shape[1]
        new = torch.cat([part.index_select(1, inside[g]) for g, part in enumerate(weight.chunk(groups))])
    tensors.replace(layer.weight, new)
    moved: list[Tensor] = []
    for other in layers:
        for attribute in ("bias", "gain"):
            tensor = getattr(other, attribute, None)
            if isinstance(tensor, Tensor) and not any(tensor is done for done in moved):
                moved.append(tensors.replace(tensor, tensor.detach().index_select(0, order)))
    return True


def _groups(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _is_transposed(layer: Layer) -> bool:
    return not isinstance(layer, nn.Linear) and layer.transposed


def _stays_in_groups(order: Tensor, groups: int) -> bool:
    group = torch.arange(order.numel(), device=order.device) // (order.numel() // groups)
    return torch.equal(group[order], group)
