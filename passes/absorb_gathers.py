"""conv(gather(x, p), W) == conv(x, W[:, inverse(p)]) and gather(conv(x, W), p) == conv(x, W[p]), for permutations p;
the same for linear layers.

W (O, C, kh, kw), x (N, C, H, W), p (C,) long. A transposed convolution holds W as (C, O, kh, kw).

1. Inputs: all call sites of the layer read the same permutation.
2. Outputs: all call sites are read by nobody but the same permutation. Bias (and the gain of a weight-standardised
   convolution) moves with W.
3. A layer with groups absorbs a permutation that moves channels inside their group only.
A layer is called from several sites if it is shared, or if another layer has the same weight; then all sites must
agree, and all weights change together.
Left alone: a gather that others read as well. With a reason: sites that disagree, and permutations that cross groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.layers import ChannelGather
from fxprune.rewriting import Outcome, Skip, Tensors, calls, erase_gather

Layer = nn.modules.conv._ConvNd | nn.Linear


@dataclass(frozen=True)
class AbsorbGathers:
    """Store weights in the order in which their channels come, instead of reordering the channels."""

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        rewritten: list[str] = []
        skipped: list[Skip] = []
        tensors = Tensors(gm)
        for layers, sites in _layers_by_weight(gm):
            for absorb, found in (
                (_absorb_inputs, _gathers_before(gm, sites)),
                (_absorb_outputs, _gathers_after(gm, sites)),
            ):
                if not found:
                    continue
                gathers = [gm.get_submodule(str(node.target)) for node in found]
                index = gathers[0].index
                assert isinstance(index, Tensor)
                if len(found) < len(sites) or not all(
                    isinstance(g, ChannelGather) and g.is_permutation and torch.equal(g.index, index) for g in gathers
                ):
                    skipped.extend(
                        Skip(node.name, "the call sites of the layer read different orders") for node in found
                    )
                elif not absorb(tensors, layers, index):
                    skipped.extend(
                        Skip(node.name, "it moves channels between the groups of the layer") for node in found
                    )
                else:
                    rewritten.extend(site.name for site in sites)
                    for node in dict.fromkeys(found):
                        erase_gather(gm, node, node.all_input_nodes[0])
        return Outcome(tuple(rewritten), tuple(skipped))


def _layers_by_weight(gm: fx.GraphModule) -> list[tuple[list[Layer], list[fx.Node]]]:
    """Layers that share one weight, with all their call sites."""
    by_weight: dict[int, tuple[list[Layer], list[fx.Node]]] = {}
    for node, layer in calls(gm, nn.Module):
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            layers, sites = by_weight.setdefault(id(layer.weight), ([], []))
            layers.extend([layer] if all(layer is not other for other in layers) else [])
            sites.append(node)
    return list(by_weight.values())


def _gathers_before(gm: fx.GraphModule, sites: Sequence[fx.Node]) -> list[fx.Node]:
    found = [source for site in sites if _is_gather(gm, source := site.all_input_nodes[0])]
    return found if all(user in sites for gather in found for user in gather.users) else []


def _gathers_after(gm: fx.GraphModule, sites: Sequence[fx.Node]) -> list[fx.Node]:
    return [user for site in sites if len(site.users) == 1 and _is_gather(gm, user := next(iter(site.users)))]


def _is_gather(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), ChannelGather)


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
