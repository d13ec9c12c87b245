"""f(gather(x, p)) == gather(f(x), p) for every channelwise f, so a permutation sinks through its whole channel space to
the layers at its ends.

One step for all spaces: the analysis of channels says which permutations leave the network unchanged. Each gather that
is a permutation wishes for the order in which it would be the identity, of the channels it gives or else of those it
reads. The order with which gathers that move most bytes in sum would be identities is served first: those of layers
that add up in one stream may wish for the same.

1. Where a layer writes channels whose order changes, a gather follows it; where a layer reads them, the inverse gather
   precedes it.
2. Parameters with one entry a channel (BatchNorm, depthwise convolution, PReLU, layer scale) are stored in the new
   order.
Left alone: gathers that read a channel twice or not at all, and those whose wish is refused, with the reason. Where
convolutions read aligned blocks, only whole blocks move: what would tear them apart stays directly after the
convolution that it restores, of which `FuseConvs` makes it a part.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.channels import ChannelAnalysis, Port, Reordering, Scale, analyze_channels
from fxprune.channels.atoms import TOLD_APART, Array
from fxprune.channels.orders import Read, known_reads, new_order
from fxprune.graph.editing import (
    KEPT_BECAUSE,
    Outcome,
    Skip,
    Tensors,
    called_module,
    calls,
    gather_after,
    gather_before,
    label,
)
from fxprune.graph.layers import ChannelGather
from fxprune.graph.values import CarriedValues


@dataclass(frozen=True)
class SinkGathers:
    """Choose an order for every channel space so that as many gathers as possible become identities, and move the
    permutations to its ends.

    Attributes:
        values: what the nodes give, to know shapes.
        block: convolutions that read aligned blocks of this many channels, or of a divisor of it, shall go on doing so.
    """

    values: CarriedValues
    block: int = 1

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        values = self.values.of(gm)
        analysis = analyze_channels(gm, values)
        reordering = Reordering(analysis.blocks)
        aligned = [read for read in known_reads(gm, analysis, self.block) if read.block > 1]
        skipped = tuple(_serve_wishes(gm, analysis, reordering, values, aligned))
        return Outcome(reorder(gm, analysis, reordering.permutation()), skipped)


def reorder(gm: fx.GraphModule, analysis: ChannelAnalysis, moved: Array) -> tuple[str, ...]:
    """Give every channel space of `gm` another order, in place, and return the layers that read or write it.

    Args:
        gm: the analyzed graph.
        analysis: of `gm`.
        moved: for each atom the one that takes its place, as `Reordering.permutation` returns it.

    Raises:
        PassError: `moved` takes an atom out of a value in which it stands.
    """
    rewritten = []
    for port in analysis.ports:
        if np.array_equal(moved[port.atoms], port.atoms):
            continue
        index = new_order(port.atoms, moved)
        rewritten.append(port.node.name)
        device = next(iter(called_module(gm, port.node).state_dict().values())).device
        if port.kind == "writes":
            gather_after(gm, port.node, ChannelGather(torch.from_numpy(index).to(device), index.size, port.dim))
        else:
            inverse = torch.from_numpy(np.argsort(index)).to(device)
            gather_before(gm, port.node, ChannelGather(inverse, index.size, port.dim))
    tensors = Tensors(gm)
    for scale in analysis.scales:
        if not np.array_equal(moved[scale.atoms], scale.atoms):
            _reorder_parameter(gm, tensors, scale, new_order(scale.atoms, moved))
    return tuple(rewritten)


def _serve_wishes(
    gm: fx.GraphModule,
    analysis: ChannelAnalysis,
    reordering: Reordering,
    values: Mapping[fx.Node, Any],
    aligned: Sequence[Read],
) -> Iterator[Skip]:
    """Serve the wish of each permuting gather, the one that saves most first, and yield those refused."""
    ports: dict[tuple[fx.Node, str], Port] = {(port.node, port.kind): port for port in analysis.ports}
    permutations = [
        (node, gather)
        for node, gather in calls(gm, ChannelGather)
        if gather.is_permutation and (node, "reads") in ports
    ]
    wishes: dict[fx.Node, tuple[tuple[Array, Array], ...]] = {}
    orders: dict[fx.Node, set[bytes]] = {}
    saved: Counter[bytes] = Counter()
    for node, gather in permutations:
        index = gather.index.cpu().numpy()
        given, read = ports[node, "writes"].atoms, ports[node, "reads"].atoms
        wishes[node] = (given, given[np.argsort(index)]), (read, read[index])
        orders[node] = {_order_of(analysis, *wish) for wish in wishes[node]}
        for order in orders[node]:
            saved[order] += values[node].numel()
    for node in sorted(wishes, key=lambda node: -max(saved[order] for order in orders[node])):
        refusals = []
        for places, atoms in wishes[node]:
            refusal = _what_breaks(aligned, reordering, places, atoms) if aligned else ""
            refusals.append(refusal or reordering.wish(places, atoms, node.name))
            if not refusals[-1]:
                break
        else:
            reason = next((refusal for refusal in refusals if refusal != TOLD_APART), TOLD_APART)
            node.meta[KEPT_BECAUSE] = reason
            yield Skip(node.name, reason)


def _order_of(analysis: ChannelAnalysis, places: Array, atoms: Array) -> bytes:
    """The same for wishes that ask for the same order of the same channels."""
    classes = analysis.blocks.classes
    return np.unique(classes[places] * analysis.blocks.count + classes[atoms]).tobytes()


def _what_breaks(aligned: Sequence[Read], reordering: Reordering, places: Array, atoms: Array) -> str:
    """Why a wish may not be served, as far as aligned blocks go.

    Each wish is judged alone: of two that move whole blocks and agree where they meet, both together do.
    """
    alone = Reordering(reordering.blocks)
    if alone.wish(places, atoms, ""):
        return ""  # it will be refused for another reason
    moved = alone.permutation()
    torn = next((read for read in aligned if not read.stays_aligned(moved)), None)
    return f"it would tear apart the blocks of {torn.block} channels that {label(torn.node)} reads" if torn else ""


def _reorder_parameter(gm: fx.GraphModule, tensors: Tensors, scale: Scale, index: Array) -> None:
    tensor = getattr(gm.get_submodule(scale.owner), scale.attribute)
    assert isinstance(tensor, Tensor)
    order = torch.from_numpy(index).to(tensor.device)
    data = tensor.detach()
    tensors.replace(
        tensor,
        data.reshape(-1)[order].reshape(data.shape) if scale.dim is None else data.index_select(scale.dim, order),
    )
