"""What convolutions read in the dense network, for decisions on several layers, which come before the refit."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx

from fxprune.calibration.batches import Batch
from fxprune.calibration.following import Following, follow
from fxprune.calibration.lockstep import Lockstep
from fxprune.calibration.samples import Samples, draw
from fxprune.graph.convolutions import conv_at
from fxprune.graph.editing import call_sites


def survey(
    dense: fx.GraphModule, batches: Sequence[Batch], layers: Collection[str], *, seed: int = 0, progress: bool = False
) -> Iterator[tuple[str, Samples]]:
    """Sample convolutions, each where it is called first, in graph order; additions behind them are left out.

    Args:
        dense: the network, traced. It is only read.
        batches: arguments of forward.
        layers: module paths of the convolutions.
        seed: of the sampled positions.
        progress: show a bar on stderr.

    Raises:
        CalibrationError: the data do not fit the model, or a layer's values are not finite.
    """
    sites = [nodes for nodes in call_sites(dense).values() if str(nodes[0].target) in layers]
    with torch.no_grad(), Lockstep(dense, dense, batches, progress=progress) as network:
        for node, *more in sites:
            name = str(node.target)
            conv = conv_at(dense, name)
            following = Following() if more else follow(dense, node).without_other()
            yield name, draw(name, node.name, conv, following, network.pause_before(node.name), seed)
