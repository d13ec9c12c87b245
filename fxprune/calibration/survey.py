"""What layers read in the dense network, for decisions on several layers, which come before the refit."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

import torch
from torch import fx

from fxprune.calibration.batches import Batch
from fxprune.calibration.following import Bounds, Following, end_of, follow
from fxprune.calibration.joins import Join, joins_after, share_of_own
from fxprune.calibration.lockstep import Lockstep
from fxprune.calibration.samples import MAX_ROWS, Samples, draw
from fxprune.graph.convolutions import Layer, conv_at, layer_at
from fxprune.graph.editing import call_sites

T = TypeVar("T")


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


def measured(
    dense: fx.GraphModule,
    batches: Sequence[Batch],
    layers: Collection[str],
    measure: Callable[[str, Layer, Samples, Bounds | None], T],
    *,
    seed: int = 0,
    rows: int = MAX_ROWS,
    progress: bool = False,
) -> dict[str, tuple[T, float]]:
    """Measure layers, each where it is called first, with what is added behind them where that is known.

    Args:
        dense: see `survey`, as for the others.
        batches: see there.
        layers: module paths of convolutions and linear layers.
        measure: what is asked of each: its name, itself, its samples, and the bounds of the rectifier that reads it.
        seed: of the sampled positions.
        rows: about how many of these there are at most.
        progress: show a bar on stderr.

    Returns:
        for each layer what was measured, and the share of an error of its output that is left where the branches in
        which it stands end (`fxprune.calibration.joins`).

    Raises:
        CalibrationError: the data do not fit the model, or a layer's values are not finite.
    """
    sites = {name: nodes[0] for nodes in call_sites(dense).values() if (name := str(nodes[0].target)) in layers}
    position = {node: i for i, node in enumerate(dense.graph.nodes)}
    found: dict[str, T] = {}
    with torch.no_grad(), Lockstep(dense, dense, batches, progress=progress) as network:
        following = {name: _followed(dense, node, network) for name, node in sites.items()}
        joins = joins_after(dense, {name: end_of(dense, node, following[name]) for name, node in sites.items()})
        shares = dict.fromkeys((join for through in joins.values() for join in through), 1.0)
        stops: list[tuple[str | Join, fx.Node]] = [*sites.items(), *((join, join.node) for join in shares)]
        for what, node in sorted(stops, key=lambda stop: position[stop[1]]):
            samples = network.pause_before(node.name)
            if isinstance(what, Join):
                shares[what] = share_of_own(what, [sample for sample, _ in samples])
                continue
            layer = layer_at(dense, what)
            drawn = draw(what, node.name, layer, following[what], samples, seed, rows)
            found[what] = measure(what, layer, drawn, following[what].bounds)
    return {name: (what, math.prod(shares[join] for join in joins[name])) for name, what in found.items()}


def _followed(dense: fx.GraphModule, node: fx.Node, network: Lockstep) -> Following:
    """What follows a layer, as far as it is known before the layer is called."""
    following = follow(dense, node)
    known = not following.other or network.can_look_ahead(node.name, following.other, frozenset())
    return following if known else following.without_other()
