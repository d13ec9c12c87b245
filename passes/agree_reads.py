"""conv(gather(y, q)) == conv(gather(z, p)) for z = gather(y, r), if gather(r, p) == q: a layer that reads in order p at
one place can do so at another too, if what it reads there is given in the order r.

x, y, z (N, C, H, W); p, q (A,) and r (C,) long, r a permutation. In a user's own module a gather is a part of the layer
that follows it, so that a layer has one, wherever it is called: a head on all levels of a pyramid, or a layer that a
recording sees in several runs.

1. Where a layer reads without a gather at one place, it shall do so at all; else all read as the first does. The
   channel spaces of what the others read get the order that makes it so. Behind grouped convolutions a gather that does
   nothing yet makes them free: it takes what they cannot store.
Left alone: layers whose wish is refused, because their channels are told apart or in an order that counts. They cannot
be grouped in a user's module.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from fxprune.channels import Reordering, analyze_channels
from fxprune.channels.atoms import Array
from fxprune.graph.convolutions import Convolution, channel_dim
from fxprune.graph.costs import LAYERS
from fxprune.graph.editing import Outcome, Skip, call_sites, called_module, calls, gather_after
from fxprune.graph.layers import ChannelGather
from fxprune.graph.values import CarriedValues
from fxprune.passes.sink_gathers import reorder


@dataclass(frozen=True)
class AgreeReads:
    """Make each layer read in the same order wherever it is called.

    Attributes:
        values: what the nodes give, to know shapes.
    """

    values: CarriedValues

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        several = [sites for layer, sites in call_sites(gm).items() if isinstance(layer, LAYERS) and len(sites) > 1]
        several = [sites for sites in several if len({_order(gm, node) for node in sites}) > 1]
        if not several:
            return Outcome()
        for node, conv in calls(gm, Convolution):
            if 1 < conv.groups < conv.in_channels:
                index = torch.arange(conv.out_channels, device=conv.weight.device)
                gather_after(gm, node, ChannelGather(index, conv.out_channels, channel_dim(conv)))
        analysis = analyze_channels(gm, self.values.of(gm))
        reordering = Reordering(analysis.blocks)
        read = {port.node: port.atoms for port in analysis.ports if port.kind == "reads"}
        skipped = []
        for sites in several:
            if refusal := _serve(gm, sites, read, reordering):
                skipped.append(Skip(sites[0].name, refusal))
        return Outcome(reorder(gm, analysis, reordering.permutation()), tuple(skipped))


def _serve(gm: fx.GraphModule, sites: list[fx.Node], read: Mapping[fx.Node, Array], reordering: Reordering) -> str:
    """Wish for the orders in which all sites read alike; return why not, or an empty string."""
    values = [_source(gm, node) or node for node in sites]  # what meets the channels: a gather, or the layer itself
    if any(value not in read for value in values):
        return "nothing is known of the channels that it reads"
    indices = [_index(gm, value, read[value].size) for value in values]
    plain = next((i for i, value in enumerate(values) if value in sites), 0)
    wanted = indices[plain]
    for value, index, node in zip(values, indices, sites, strict=True):
        if index.shape != wanted.shape or int(wanted.max()) >= read[value].size:
            return "it reads other numbers of channels at its places"
        if refusal := reordering.wish(read[value][wanted], read[value][index], node.name):
            return refusal
    return ""


def _source(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The gather that a layer reads, if it reads one."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or source.op != "call_module" or not isinstance(called_module(gm, source), ChannelGather):
        return None
    return source


def _index(gm: fx.GraphModule, node: fx.Node, channels: int) -> Array:
    """Which channels reach the layer: by a gather, or as they come."""
    module = called_module(gm, node)
    return module.index.cpu().numpy() if isinstance(module, ChannelGather) else np.arange(channels)


def _order(gm: fx.GraphModule, node: fx.Node) -> bytes:
    source = _source(gm, node)
    return b"" if source is None else _index(gm, source, 0).tobytes()
