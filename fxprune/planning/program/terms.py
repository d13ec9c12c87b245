"""What may become of each channel space, layer and branch of a network, and what it loses and costs: the numbers of the
integer program (`fxprune.planning.program.integer_program`).

Of a layer that reads one space and writes one, all is exact: multiply-accumulates, parameters and kernels that stay are
counted as they will be, times are those of the table (`fxprune.planning.latency.grid`), bilinear between its points,
with grouped kernels in the same proportion to dense ones as at full width. A layer that reads several spaces, behind a
concatenation, or writes several, has a term for each pair of them, weighed by the shares of its channels: a product of
sums is the sum of the products, so counts stay exact but for the rounding of kernels, and times are as far as they are
bilinear over all widths.

Kernels go only where a narrower layer can be grouped as the wide one was measured, or, where it reads and writes one
space, in half as many groups, and so on; their loss is then multiplied by what the energies of the weights say of so
many groups (`fxprune.planning.latency.budget.damages`). So of several spaces each keeps a multiple of the groups where
kernels go.

Two choices in one layer: the loss of a way to prune its kernels, where a share `r` of its inputs stays, is

    loss(way, r) = loss(way, 1) * (1 + slope * min(1 - r, 1/2)),    slope >= -1,

with the slope of the layer as measured on a narrower network (`fxprune.planning.program.interaction`); of several
spaces the mean over all inputs.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from fxprune.channels.removal import Removable
from fxprune.channels.units import STAYS, Chosen, UnitLayer, Units
from fxprune.methods import Labels
from fxprune.planning.latency.grid import LayerGrid, step_of
from fxprune.planning.latency.table import LatencyTable
from fxprune.planning.program.integer_program import Array, Choice, Floor, IntegerProgram, Part, Space, Term
from fxprune.planning.sensitivity import FLOOR
from fxprune.plans.eligibility import MIN_IN_CHANNELS, MIN_OUT_CHANNELS
from fxprune.plans.shapes import choose_shape

WIDTHS = 8, 32
"""A channel space keeps one of about so many widths: the least, and the most, which small networks have."""
MOST_GONE = 1 / 2
"""The share of its inputs that a layer has lost beyond which its losses by kernels are taken to change no more."""
CELLS = 6_000
"""For all layers together, pairs of widths of which are counted."""
ALIGNED = 8
"""Wide spaces keep multiples of this many channels, so that what they leave divides into groups."""


@dataclass(frozen=True)
class KernelWay:
    """A way to prune the kernels of a convolution.

    Attributes:
        ratio: of kernel groups that go.
        form: as `fxprune.plans.shapes.choose_shape` takes it.
        losses: by number of groups, those that may be, with all inputs of the layer.
        time: relative to that of the dense kernels.
    """

    ratio: float
    form: str
    losses: Mapping[int, float]
    time: float = 1.0


@dataclass(frozen=True)
class Kernels:
    """The ways to prune the kernels of one convolution beside leaving it dense.

    Attributes:
        ways: of them.
        least_group: filters that a group must have at least.
        slope: how their losses change with the inputs that go, see above.
        block, target: see `fxprune.plans.shapes.choose_shape`.
    """

    ways: tuple[KernelWay, ...]
    least_group: int = 1
    slope: float = 0.0
    block: int = 1
    target: str | None = None

    def groups(self, way: int, filters: int) -> int | None:
        """In how many groups so many filters go; None if they cannot."""
        fits = [
            n for n in self.ways[way].losses if filters % n == 0 and filters // n >= self.least_group and n <= filters
        ]
        return max(fits, default=None)

    def kept(self, way: int, filters: int, channels: int) -> float | None:
        """The share of its kernel groups that a layer of so many filters and inputs keeps; None if it cannot."""
        groups = self.groups(way, filters)
        if groups is None or filters < MIN_OUT_CHANNELS or channels < MIN_IN_CHANNELS:
            return None
        chosen = self.ways[way]
        shape = choose_shape(filters, channels, chosen.ratio, groups, chosen.form, self.block, self.target)
        return None if isinstance(shape, str) else shape.kept / channels


@dataclass(frozen=True)
class Losses:
    """What the choices lose, on one scale.

    Attributes:
        order: `(U,)` the units, space by space, in each the first to go first.
        spaces: of each space `(n,)`, entry `k - 1` if its last `k` units stay.
        kernels: by name of the convolution; others stay dense.
        branches: of each branch, by name.
    """

    order: Labels
    spaces: Sequence[Array]
    kernels: Mapping[str, Kernels] = field(default_factory=dict)
    branches: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Selected:
    """A choice in the words of the network.

    Attributes:
        removed: `(U,)` the units that go.
        ratios: of the convolutions whose kernels go.
        groups: of these.
        branches: names of those that go.
    """

    removed: Chosen
    ratios: Mapping[str, float]
    groups: Mapping[str, int]
    branches: tuple[str, ...]


def width_count(layers: int) -> int:
    """How many widths a space may keep where there are so many layers.

    >>> width_count(5), width_count(20), width_count(56)
    (32, 17, 10)
    """
    return int(np.clip(math.sqrt(CELLS / max(1, layers)), *WIDTHS))


def widths_of(size: int, count: int, multiple: int = 1, lanes: int = 1) -> tuple[int, ...]:
    """The numbers of units that a space may keep, falling, the whole first.

    Args:
        size: how many units it has.
        count: about how many widths there are to be.
        multiple: only multiples of this many.
        lanes: see `fxprune.planning.latency.grid.step_of`.

    >>> widths_of(16, 8), widths_of(100, 8)
    ((16, 14, 12, 10, 8, 6, 4, 2, 1), (100, 96, 80, 64, 48, 32, 16, 7))
    """
    step = math.lcm(multiple, step_of(size, lanes))
    share = math.ceil(size / count)
    share = ALIGNED * math.ceil(share / ALIGNED) if share >= ALIGNED else 1 << (share - 1).bit_length()
    stride = step * math.ceil(share / step)
    least = step * math.ceil(FLOOR * size / step)
    kept = {least, *range(stride, size, stride)}
    return (size, *sorted((width for width in kept if least <= width < size), reverse=True))


@dataclass(frozen=True)
class _Side:
    """The channels of one space among those that a layer reads or writes.

    Attributes:
        space: its place; None for those that stay.
        size: how many they are.
        share: of all that the layer has on this side.
        counts: how many stay at each width of the space.
    """

    space: int | None
    size: int
    share: float
    counts: Labels


class NetworkTerms:
    """The choices of one network.

    Args:
        network: its modules by name.
        removable: its units.
        losses: of all choices.
        branches: the modules of each branch that may go, by its name.
        shares: the costs that count, with the share of the dense network that may remain.
        multiple: of how many units a space of so many keeps a multiple.
        table: times, if these count.
    """

    def __init__(
        self,
        network: nn.Module,
        removable: Removable,
        losses: Losses,
        branches: Mapping[str, Collection[str]],
        shares: Mapping[str, float],
        multiple: Callable[[int], int] = lambda size: 1,
        table: LatencyTable | None = None,
    ) -> None:
        self._network, self._removable, self._losses, self._shares = network, removable, losses, shares
        self._units, self._table = removable.units, table
        self._branches = {name: frozenset(branches[name]) for name in losses.branches}
        sizes = np.bincount(self._units.space, minlength=len(self._units.names)).tolist()
        lanes = 1 if table is None else table.lanes
        count = width_count(len(self._units.layers))
        self.widths = [widths_of(size, count, multiple(size), lanes) for size in sizes]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.intp)

    def program(self) -> IntegerProgram:
        """The program of all choices."""
        spaces = [
            Space(losses[np.array(widths) - 1] - losses[-1], self._all_in(place))
            for place, (losses, widths) in enumerate(zip(self._losses.spaces, self.widths, strict=True))
        ]
        parts = [self._layer(name, layer) for name, layer in self._units.layers.items()]
        parts += [*self._other_params(), *self._rest()]
        limits = np.array(list(self._shares.values()))
        return IntegerProgram(spaces, parts, np.array(list(self._losses.branches.values()), np.float64), limits)

    def selected(self, choice: Choice) -> Selected:
        """What a choice means."""
        removed = np.zeros(self._units.count, dtype=np.bool_)
        for place, width in enumerate(choice.widths):
            if width is not None:
                removed[self._goes(place, self.widths[place][width])] = True
        ratios, groups = {}, {}
        for name, kernels in self._losses.kernels.items():
            if way := choice.ways.get(name, 0):
                filters = sum(
                    int(side.counts[self._width(choice, side)]) for side in self._sides(self._units.layers[name].writes)
                )
                ratios[name] = kernels.ways[way - 1].ratio
                groups[name] = kernels.groups(way - 1, filters) or 1
        names = list(self._losses.branches)
        return Selected(removed, ratios, groups, tuple(names[place] for place in sorted(choice.gone)))

    def inputs_left(self, removed: Chosen) -> dict[str, float]:
        """The share of its inputs that each layer keeps without some units."""
        stays = np.append(~removed, True)  # STAYS is the last
        layers = self._units.layers.items()
        return {name: 1.0 if layer.reads is None else float(stays[layer.reads].mean()) for name, layer in layers}

    # --- spaces -------------------------------------------------------------------------------------------------------

    def _goes(self, space: int, kept: int) -> Labels:
        """The units of a space that go if so many stay."""
        order = self._losses.order[self._first[space] : self._first[space + 1]]
        return order[: len(order) - kept]

    def _all_in(self, space: int) -> tuple[int, ...]:
        """The branches that hold all of a space."""
        names = {
            entry.name
            for entry in self._removable.entries
            if np.isin(self._removable.unit_of[entry.atoms], np.arange(*self._first[space : space + 2])).any()
        }
        return tuple(
            place
            for place, modules in enumerate(self._branches.values())
            if names and all(name in modules or name.rpartition(".")[0] in modules for name in names)
        )

    def _sides(self, labels: Units | None) -> list[_Side]:
        """The channels of a layer, by space."""
        if labels is None or not len(labels):
            return [_Side(None, 1, 1.0, np.ones(1, dtype=np.intp))]
        space_of = np.append(self._units.space, STAYS)[labels]
        sides = []
        for space in np.unique(space_of).tolist():
            mine = labels[space_of == space]
            if space == STAYS:
                counts = [len(mine)]
            else:
                counts = [int((~np.isin(mine, self._goes(space, kept))).sum()) for kept in self.widths[space]]
            place = None if space == STAYS else space
            sides.append(_Side(place, len(mine), len(mine) / len(labels), np.array(counts)))
        return sides

    @staticmethod
    def _width(choice: Choice, side: _Side) -> int:
        width = 0 if side.space is None else choice.widths[side.space]
        assert width is not None
        return width

    # --- parts --------------------------------------------------------------------------------------------------------

    def _within(self, name: str) -> tuple[int, ...]:
        """The branches that hold a module."""
        return tuple(place for place, modules in enumerate(self._branches.values()) if name in modules)

    def _layer(self, name: str, layer: UnitLayer) -> Part:
        """A convolution or linear layer."""
        reads, writes = self._sides(layer.reads), self._sides(layer.writes)
        alone = len(reads) == len(writes) == 1
        kernels = self._losses.kernels.get(name)
        floors = () if kernels is None or alone else _floors(kernels, reads, writes)
        terms = []
        for read in reads:
            for write in writes:
                weight = read.share * write.share
                kept, losses = self._kernels(kernels, read, write, alone)
                left = (read.counts / read.size)[:, None, None] * (write.counts / write.size)[:, None] * kept
                costs = [weight * self._cost(name, layer, cost, left, read, write, kernels) for cost in self._shares]
                terms.append(Term(read.space, write.space, weight * losses, np.stack(costs, axis=-1)))
        return Part(name, tuple(terms), self._within(name), floors)

    def _kernels(self, kernels: Kernels | None, read: _Side, write: _Side, alone: bool) -> tuple[Array, Array]:
        """The share of the kernels that are there which stay, and the loss, `(R, W, K)` each; infinite losses where
        something cannot be.
        """
        ways = () if kernels is None else kernels.ways
        kept = np.ones((len(read.counts), len(write.counts), 1 + len(ways)))
        losses = np.zeros(kept.shape)
        losses[:, :, 1:] = np.inf
        if kernels is None:
            return kept, losses
        gone = np.minimum(1 - read.counts / read.size, MOST_GONE)
        for j, filters in enumerate(write.counts.tolist()):
            for number, way in enumerate(ways):
                groups = kernels.groups(number, filters) if alone else max(way.losses)
                if groups is None or filters % groups:
                    continue
                for i, channels in enumerate(read.counts.tolist()):
                    share = kernels.kept(number, filters, channels) if alone else 1 - way.ratio
                    if share is not None:
                        kept[i, j, 1 + number] = share
                        losses[i, j, 1 + number] = way.losses[groups] * max(0.0, 1 + kernels.slope * gone[i])
        return kept, losses

    def _cost(
        self,
        name: str,
        layer: UnitLayer,
        cost: str,
        left: Array,
        read: _Side,
        write: _Side,
        kernels: Kernels | None,
    ) -> Array:
        """A cost of a layer if all of it were of these two sides, as a share of the whole network."""
        if cost == "macs":
            return left * (layer.macs or 0) / max(1, sum(other.macs or 0 for other in self._units.layers.values()))
        if cost == "params":
            return left * self._network.get_parameter(f"{name}.weight").numel() / self._all_params
        dense = self._seconds(name, read, write) / self._total_seconds
        ways = np.array([1.0, *(way.time for way in (() if kernels is None else kernels.ways))])
        return np.asarray(dense[:, :, None] * ways)

    @property
    def _all_params(self) -> int:
        return max(1, sum(parameter.numel() for parameter in self._network.parameters()))

    def _other_params(self) -> list[Part]:
        """Biases, normalizations and what else has parameters, where these count."""
        if "params" not in self._shares:
            return []
        where = {entry.name: entry for entry in self._removable.entries if entry.kind == "outputs"}
        parts = []
        for path, parameter in self._network.named_parameters():
            module, _, attribute = path.rpartition(".")
            if module in self._units.layers and attribute == "weight":
                continue
            entry = where.get(path, where.get(module))
            labels = None if entry is None else self._removable.unit_of[entry.atoms]
            stays = module in self._branches and attribute == "bias"  # what a branch leaves
            terms = []
            for side in self._sides(labels):
                share = side.share * (side.counts / side.size)[None, :, None] * parameter.numel() / self._all_params
                terms.append(self._free(side, "params", share))
            parts.append(Part(f"{path}, a parameter", tuple(terms), () if stays else self._within(module)))
        return parts

    def _free(self, side: _Side, cost: str, share: Array) -> Term:
        """A term of one cost that loses nothing, `(1, W, 1)`."""
        costs = np.zeros((*share.shape, len(self._shares)))
        costs[..., list(self._shares).index(cost)] = share
        return Term(None, side.space, np.zeros(share.shape), costs)

    # --- times --------------------------------------------------------------------------------------------------------

    @property
    def _grids(self) -> dict[str, LayerGrid]:
        return {} if self._table is None else {grid.name: grid for grid in self._table.grids}

    @property
    def _dense_seconds(self) -> dict[str, float]:
        """Of the layers that were timed."""
        assert self._table is not None
        found = {layer.name: layer.seconds for layer in self._table.layers}
        found |= {name: grid.dense for name, grid in self._grids.items()}
        return {name: seconds for name, seconds in found.items() if name in self._units.layers}

    @property
    def _total_seconds(self) -> float:
        assert self._table is not None
        return self._table.seconds

    def _seconds(self, name: str, read: _Side, write: _Side) -> Array:
        """Of a layer with dense kernels, `(R, W)`."""
        shape = len(read.counts), len(write.counts)
        grid = self._grids.get(name)
        if grid is None:
            return np.full(shape, self._dense_seconds.get(name, 0.0))
        return grid.at((read.counts / read.size)[:, None], (write.counts / write.size)[None])

    def _rest(self) -> list[Part]:
        """The time of all that was not timed alone."""
        if self._table is None or "latency" not in self._shares:
            return []
        whole = self._table.rest + sum(layer.seconds for layer in self._table.layers)
        rest = max(0.0, whole - sum(self._dense_seconds.values())) / self._table.seconds
        (side,) = self._sides(None)
        return [Part("the rest, a time", (self._free(side, "latency", np.full((1, 1, 1), rest)),))]


def _floors(kernels: Kernels, reads: Sequence[_Side], writes: Sequence[_Side]) -> tuple[Floor, ...]:
    """What a layer of several spaces must have left to be grouped."""
    groups = max((max(way.losses) for way in kernels.ways), default=1)
    floors = []
    for sides, least in ((reads, MIN_IN_CHANNELS), (writes, max(MIN_OUT_CHANNELS, groups * kernels.least_group))):
        stays = sum(side.size for side in sides if side.space is None)
        counts = {side.space: side.counts.astype(np.float64) for side in sides if side.space is not None}
        if counts:
            floors.append(Floor(counts, least - stays))
    return tuple(floors)
