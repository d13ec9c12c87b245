"""Which convolutions write the same channels, so that with the same groups of filters one order would serve them all.

The blocks of a residual stage add their outputs to one stream: channel `i` of each meets channel `i` of the others. A
grouped convolution gives its filters group by group, so it needs the stream in the order of its groups, or a gather
behind it that puts its output into the order of the stream. Where all who write a stream group its channels alike, the
stream takes that order and none of these gathers remains; dense layers at its ends store the order in their weights.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
from torch import fx

from fxprune.channels import analyze_channels
from fxprune.graph.convolutions import Convolution
from fxprune.graph.editing import calls

Writers: TypeAlias = tuple[tuple[str, ...], ...]
"""Sets of module names, those of a set in graph order; no name is in two."""


def common_writers(gm: fx.GraphModule, values: Mapping[fx.Node, Any]) -> Writers:
    """Find the convolutions that write the same channels in the same order, in sets of two or more.

    A module that is called at several places ties what they write. Channels that may not change places at will are left
    out: some are read in their order (a model output), or others tell them apart (half of them are split off, or padded
    with zeros); the order of the groups would be refused there.

    Args:
        gm: a traced model.
        values: what its nodes give, see `analyze_channels`. Where shapes are unknown there are no sets.
    """
    analysis = analyze_channels(gm, values)
    written = {port.node: port.atoms for port in analysis.ports if port.kind == "writes"}
    ties = nx.Graph()
    fixed: set[str] = set()
    for node, _ in calls(gm, Convolution):
        name = str(node.target)
        ties.add_node(name)
        classes = analysis.blocks.classes[written[node]] if node in written else np.zeros(0, dtype=np.int64)
        blocks = np.unique(analysis.blocks.block_of[classes])
        if blocks.size == 1 and blocks[0] >= 0:
            ties.add_edge(name, classes.tobytes())
        else:
            fixed.add(name)
    sets = (
        tuple(name for name in members if isinstance(name, str))
        for members in nx.connected_components(ties)
        if not members & fixed
    )
    first = {name: place for place, name in enumerate(name for name in ties if isinstance(name, str))}
    ordered = (tuple(sorted(names, key=first.__getitem__)) for names in sets if len(names) > 1)
    return tuple(sorted(ordered, key=lambda names: first[names[0]]))
