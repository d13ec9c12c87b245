"""What can be removed from a network as a whole: units of channels, and what the layers cost without some of them.

A *unit* is a set of channels that can only go together: filter 3 of two convolutions whose results are added, the
channel of the depthwise convolution between, and the input channels that read it. Units of one channel space stand side
by side; a space keeps at least one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Units = npt.NDArray[np.int64]
Chosen = npt.NDArray[np.bool_]

STAYS = -1
"""In place of a unit: the channel belongs to none and stays."""


@dataclass(frozen=True)
class UnitLayer:
    """A convolution or linear layer, dense, and to which units its channels belong.

    Attributes:
        writes: `(O,)` the unit of each filter (output feature), or `STAYS`.
        reads: `(C,)` the unit of each input channel, or `STAYS`; None if each filter has its own input channel
            (depthwise), so that the cost is proportional to the filters alone.
        macs: of one image, over all calls; None if the shapes are unknown.
        params: weights and biases.
        prunable: it is a dense convolution whose filters are scored.
    """

    writes: Units
    reads: Units | None
    macs: int | None
    params: int
    prunable: bool


@dataclass(frozen=True)
class ChannelUnits:
    """The units of a network.

    Attributes:
        space: `(U,)` the channel space of each unit, `0..S - 1`, ascending.
        names: `(S,)` a name for each space, that of its first layer.
        layers: every convolution and linear layer of the network, by module path, in graph order.
        fixed: convolutions whose filters all stay, and why.
    """

    space: Units
    names: tuple[str, ...]
    layers: Mapping[str, UnitLayer]
    fixed: Mapping[str, str]

    @property
    def count(self) -> int:
        """Number of units, `U`."""
        return len(self.space)

    def macs(self, kept: Chosen) -> float:
        """Multiply-accumulates of one image with the `kept (U,)` units alone; all of them gives the dense network's."""
        return sum((layer.macs or 0) * share for layer, share in self._shares(kept))

    def params(self, kept: Chosen) -> float:
        """Weights (and biases, as a share of the weights) of the same."""
        return sum(layer.params * share for layer, share in self._shares(kept))

    def costs_of_one(self, cost: str) -> npt.NDArray[np.float64]:
        """What the dense network saves without each unit alone, `(U,)`, in `"macs"` or `"params"`."""
        saved = np.zeros(self.count)
        for layer in self.layers.values():
            writes = self._share_of_one(layer.writes)
            reads = np.zeros(self.count) if layer.reads is None else self._share_of_one(layer.reads)
            saved += (getattr(layer, cost) or 0) * (writes + reads - writes * reads)
        return saved

    def _share_of_one(self, labels: Units) -> npt.NDArray[np.float64]:
        """The share of the channels that belong to each unit."""
        return np.bincount(labels[labels != STAYS], minlength=self.count) / max(1, len(labels))

    def _shares(self, kept: Chosen) -> list[tuple[UnitLayer, float]]:
        """Share of the weights of each layer that is left."""
        stays = np.append(kept, True)  # STAYS is the last
        return [
            (
                layer,
                float(stays[layer.writes].mean()) * (1.0 if layer.reads is None else float(stays[layer.reads].mean())),
            )
            for layer in self.layers.values()
        ]


def positions(labels: Units) -> Units:
    """How many equal ones stand before each of `labels`, which ascend."""
    return np.arange(len(labels)) - np.searchsorted(labels, labels)
