"""How much a network suffers as each channel space gives up units, and the scores by which a budget can choose them.

The table of sensitivity is that of kernels (`fxprune.planning.sensitivity`) with a channel space in place of a layer,
so the ways to spend a budget are the same (`fxprune.planning.candidates`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from fxprune.calibration.damage import loss_of
from fxprune.calibration.following import Bounds
from fxprune.calibration.samples import Samples
from fxprune.calibration.subject import Subject
from fxprune.calibration.survey import measured
from fxprune.calibration.unit_damage import Reader, StiffReader, space_damage
from fxprune.channels.units import STAYS, ChannelUnits, Chosen
from fxprune.criteria.variety import Array
from fxprune.graph.convolutions import Layer, convolutions
from fxprune.methods import Labels
from fxprune.planning.candidates import damage_of
from fxprune.planning.sensitivity import Cost, LayerSensitivity, Sensitivity
from fxprune.plans.eligibility import refittable_linears

TRIFLE = 1e-9
"""By how much, relative to the mean, scores that are equal differ, so that the order of elimination decides."""


@dataclass(frozen=True)
class UnitSensitivity:
    """What it costs to remove units.

    Attributes:
        table: of the channel spaces that can lose some; MACs and parameters of a space are what its units alone save.
        order: `(U,)` the units, space by space, in each the first to go first.
    """

    table: Sensitivity
    order: Labels

    def prices(self, cost: Cost) -> Array:
        """What one unit of each space saves of the cost, `(S,)`."""
        return np.array([getattr(space, cost) / len(space.damage) for space in self.table.layers], np.float64)

    def scores(self, table: Sensitivity, prices: Array | None) -> Array:
        """What each unit is worth, `(U,)`: the loss that its removal adds, for each unit of cost that it saves.

        In each space they rise in the order of elimination: they are the slopes of the greatest convex function below
        the loss.

        Args:
            table: `self.table`, or another way to spend a budget on the same spaces.
            prices: what one unit of each space saves, `(S,)`; None counts units.
        """
        slopes = [np.zeros(0)]
        for number, space in enumerate(table.layers):
            losses = np.array([loss_of(damage) for damage in space.damage[::-1]])  # the first units gone first
            rise = isotonic_regression(np.diff(losses)).x if len(losses) > 1 else np.zeros(0)
            rise = np.append(rise, rise[-1:] if len(rise) else 0.0)  # the last one never goes
            price = 1.0 if prices is None else float(prices[number])
            slopes.append(np.maximum(rise, 0) / max(price, np.finfo(np.float64).tiny))
        sizes = [len(slope) for slope in slopes]
        ranked = np.concatenate(slopes)
        place = np.concatenate([np.arange(size) for size in sizes])
        mean = float(ranked.mean()) if len(ranked) else 0.0
        scores = np.empty(len(ranked))
        scores[self.order] = ranked + TRIFLE * (mean or 1.0) * (place + 1)
        return scores


def measure_readers(
    subject: Subject, units: ChannelUnits, seed: int = 0, progress: bool = False
) -> dict[str, Reader | StiffReader]:
    """What the layers that read units lose without some, each where it is called first. Grouped convolutions, whose
    channels stay, are none.

    Args:
        subject: with calibration data.
        units: those of the network.
        seed: of the sampled positions.
        progress: show a bar on stderr.

    Raises:
        CalibrationError: the data do not fit the model, or a layer's values are not finite.
    """
    assert subject.network_batches is not None
    free = {**convolutions(subject.layers), **refittable_linears(subject.layers, subject.trace)}
    names = [name for name, layer in units.layers.items() if layer.reads is not None and (layer.reads != STAYS).any()]

    def reader(name: str, layer: Layer, samples: Samples, bounds: Bounds | None) -> Reader | StiffReader:
        return (Reader if name in free else StiffReader).of(layer, samples, bounds)

    found = measured(
        subject.network,
        subject.network_batches,
        names,
        reader,
        seed=seed,
        rows=subject.effort.rows,
        progress=subject.run or progress,
    )
    return {name: reader.weighed(share) for name, (reader, share) in found.items()}


def measure_units(
    readers: Mapping[str, Reader | StiffReader], units: ChannelUnits, gone: Chosen, given: Labels | None = None
) -> UnitSensitivity:
    """Put together what the readers of each space lose.

    Args:
        readers: see `measure_readers`.
        units: those of the network.
        gone: `(U,)` units that were removed before.
        given: `(U,)` the order of the units, space by space, where it is not to be that of elimination.
    """
    every = np.ones(units.count, dtype=np.bool_)
    whole = round(units.macs(every)), round(units.params(every))
    macs, params = (units.costs_of_one(cost) for cost in ("macs", "params"))
    orders, spaces = [np.zeros(0, dtype=np.intp)], []
    for space, name in enumerate(units.names):
        mine = np.flatnonzero(units.space == space)
        reading = []
        for layer, reader in readers.items():
            reads = units.layers[layer].reads
            assert reads is not None
            own = np.where((reads >= mine[0]) & (reads <= mine[-1]), reads - mine[0], STAYS)
            if (own != STAYS).any():
                reading.append((reader, own))
        fixed = None if given is None else given[mine] - mine[0]
        order, losses = space_damage(reading, len(mine), np.flatnonzero(gone[mine]), fixed)
        orders.append(mine[order])
        damage = tuple(damage_of(loss) for loss in losses)
        spaces.append(LayerSensitivity(name, 1, round(macs[mine].sum()), round(params[mine].sum()), damage))
    return UnitSensitivity(Sensitivity(tuple(spaces), *whole), np.concatenate(orders))
