"""Which filters go: scores of units, variety among them, and the units that a ratio or a budget removes.

A unit is a set of filters that can only go together (`fxprune.channels.units`). What it is worth is the error that its
readers are left with (`fxprune.planning.unit_sensitivity`), or the sum of the kernel scores of `fxprune.criteria` over
its filters and their input channels. What that sum is at filter level:

- `l1`: the norm of Li et al. 2017, section 3.1, as published. `l2`: the squared norm; coupled filters make one longer
  vector, whose squared norm it is.
- `Taylor`: sum of `(w * gradient)^2` over all weights, as Molchanov et al., CVPR 2019, section 3, have it for a set of
  weights (not the square of the sum).
- `activation`: energies of inputs that are taken as uncorrelated add up.
- `movement`: `sum |w - w_0|` over the weights (Zhou et al. 2019). The library of the authors of filter variety had
  `|mean(w) - mean(w_0)|` at the time of their paper, later the former. We use the former: a filter that turns without a
  change of its mean has moved.
- `magnitude_increase`: `sum |w| - |w_0|`, the same in both readings but for the size. Each filter of a layer gets the
  same offset, that of the lowest kernel times the input channels, so layers compare by an arbitrary zero: use it with
  local scope.
- `random`: any order within a space is equally likely. Sums of many draws are nearly equal, so a global ranking takes
  the extremes from layers with few input channels; `random_units` has no such preference.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csc_array

from fxprune.channels.units import STAYS, ChannelUnits, Chosen, Units, positions
from fxprune.criteria.variety import Array
from fxprune.errors import PlanError
from fxprune.methods import Labels, Matrix
from fxprune.planning.latency.grid import NetworkTimes, step_of
from fxprune.planning.patterns import match_patterns
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import ENOUGH, TOLERANCE, Cost
from fxprune.plans.shapes import kept_channels

# Share of a space that a global ranking leaves, at least. One unit would do for a valid network, but a space that one
# criterion thinks little of would become a bottleneck that no other layer makes up for ("layer collapse" of Tanaka,
# Kunin, Yamins, Ganguli, NeurIPS 2020). A sixteenth interferes late: with l1 and l2 on trained ResNet-20 and ResNet-56
# not up to a ratio of 0.7, and at 0.85 in a few spaces, which would keep one filter of 64.
FLOOR = 1 / 16
# Positions and costs that differ by less, relative to them, are equal.
NOISE = 1e-9


def choose_units(
    units: ChannelUnits,
    scores: Array,
    request: Request,
    gone: Chosen | None = None,
    comparable: bool = False,
    times: NetworkTimes | None = None,
) -> Chosen:
    """Choose the units to remove, those with the lowest scores of each space; of equal ones the last goes first.

    Local scope takes the same share of each space. Global scope ranks all units by their score over the mean of their
    space, as Torch-Pruning does by default, and leaves at least `FLOOR` of each space. Scores have another scale in
    each layer, which Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks for Resource
    Efficient Inference", ICLR 2017, "Normalization", divide by their l2 norm; the mean does not depend on the size of
    the space. Units that are gone count in it, with the score they have: the mean of the others alone would rise with
    each step of a gradual schedule, and a space that lost much lose more.

    A larger ratio removes a superset. Budgets are met by the ratio, or the threshold, that comes nearest from above,
    and then by single units out of turn, which may differ from one budget to the next; `gone` keeps them nested.

    Args:
        units: the units of the network.
        scores: `(U,)` finite, 0 or more, high means keep.
        request: how much goes: `ratio`, or one or more of `macs`, `params` and `latency`, `scope` and `round_to`. A
            pattern of ratios stands for the spaces of the layers that it matches, other spaces stay whole. Budgets are
            kept, and one of them met, within 1 %; if steps of `round_to` are too coarse for that, the nearest below.
        gone: `(U,)` units that were removed before and stay so. If they are more than is asked for, no others go.
        comparable: the scores have the same scale everywhere: a global ranking takes them as they are.
        times: for `latency`: those of the network. Filters then go in steps that save time: each space keeps multiples
            of as many as the processor computes at once (`fxprune.planning.latency.grid.step_of`) and of `round_to`.

    Returns:
        `(U,)` True for the units that are removed, `gone` included.

    Raises:
        PlanError: layers of one space are asked for different ratios, the MACs are unknown, or so much cannot be
            removed; the message says how much.
    """
    gone = np.zeros(units.count, dtype=np.bool_) if gone is None else gone
    _check(units, scores, request, gone)
    sizes = np.bincount(units.space, minlength=len(units.names))
    steps = _Steps.make(units, sizes, scores, gone, request, comparable, times)
    ratio = request.filter_ratio
    if ratio is None:
        taken = _within(units, steps, _Budgets.make(units, steps, gone, request, times))
    elif request.scope != "global":
        asked = _ratios(units, ratio)[steps.space] * sizes[steps.space]
        taken = steps.forced | (steps.removable & (asked - steps.middle > NOISE))
    else:
        assert not isinstance(ratio, Mapping)
        taken = _lowest(steps, units.count, ratio)
    removed = gone.copy()
    removed[steps.order] |= np.repeat(taken, steps.size)
    return removed


def random_units(units: ChannelUnits, removed: Chosen, seed: int) -> Chosen:
    """As many units of each space as `removed (U,)`, drawn at random: the control of a lottery ticket.

    With the same seed, more units are a superset. Global random state is neither read nor changed.
    """
    counts = np.bincount(units.space, removed, minlength=len(units.names))
    order = np.lexsort((np.random.default_rng(seed).random(units.count), units.space))
    drawn = np.empty(units.count, dtype=np.bool_)
    drawn[order] = positions(units.space) < counts[units.space]
    return drawn


@dataclass(frozen=True)
class _Steps:
    """The units in the order in which they go, space by space, cut into steps of units that go at once.

    Attributes:
        order: `(U,)` the units: by space, in each those that are gone, then by ascending score.
        size: `(E,)` how many of them make up each step.
        space: `(E,)` of each step.
        middle: `(E,)` how many units of its space must be asked for so that removing the step is nearer than not.
        forced: `(E,)` steps with units that are gone.
        removable: `(E,)` steps that leave enough of their space.
        ranking: the forced and the removable steps in the order in which the network loses them, the forced first. Each
            beginning of it is a legal choice.
    """

    order: Labels
    size: Labels
    space: Units
    middle: Array
    forced: Chosen
    removable: Chosen
    ranking: Labels

    @classmethod
    def make(
        cls,
        units: ChannelUnits,
        sizes: Labels,
        scores: Array,
        gone: Chosen,
        request: Request,
        comparable: bool = False,
        times: NetworkTimes | None = None,
    ) -> "_Steps":
        lanes = 1 if times is None else times.lanes
        steps = [math.lcm(request.multiple(size), step_of(size, lanes)) for size in sizes.tolist()]
        round_to = np.array(steps, np.intp)
        order = np.lexsort((-np.arange(units.count), scores, ~gone, units.space))
        position = positions(units.space)
        rounded = round_to[units.space]
        left = (sizes[units.space] - 1 - position) // rounded * rounded  # kept when the step of the unit is gone
        first = np.flatnonzero(np.diff(units.space, prepend=-1) | np.diff(left, prepend=-1))
        size = np.diff(first, append=units.count)
        space = units.space[first]
        middle = position[first] + size / 2
        least = np.maximum(1, np.ceil(FLOOR * sizes)) if request.scope == "global" else np.ones(len(sizes))
        least = np.ceil(least / round_to) * round_to
        removable = left[first] >= least[space]
        forced = np.logical_or.reduceat(gone[order], first) & removable if len(first) else removable
        fraction = middle / sizes[space]
        if request.scope == "global":
            # A step goes when more than half of it would: rounding to the nearest.
            scale = 1.0 if comparable else _means(units.space, sizes, scores)
            key = (scores / scale)[order[first + size // 2]]
        else:
            key = fraction
        ranking = np.lexsort((-space, fraction, key, ~forced))
        return cls(order, size, space, middle, forced, removable, ranking[removable[ranking]])

    def beginning(self, count: int) -> Chosen:
        """The first `count` steps of the ranking, `(E,)`."""
        taken = np.zeros(len(self.size), dtype=np.bool_)
        taken[self.ranking[:count]] = True
        return taken

    def next(self, taken: Chosen) -> Labels:
        """The next step of each space, in the order of the ranking."""
        return _first_of_space(self.space, self.ranking[~taken[self.ranking]])

    def last(self, taken: Chosen) -> Labels:
        """The step of each space that was taken last and can be given back."""
        return _first_of_space(self.space, self.ranking[(taken & ~self.forced)[self.ranking]][::-1])


class _Widths:
    """How wide layers are without some steps: the shares of filters and of input channels of each of `L` layers that
    remain, for many choices at once. Each step takes a share of both.

    Attributes:
        whole: `(L,)` the shares of the dense network, 1.
    """

    def __init__(self, units: ChannelUnits, steps: _Steps, gone: Chosen) -> None:
        step = np.empty(units.count, dtype=np.intp)
        step[steps.order] = np.repeat(np.arange(len(steps.size)), steps.size)
        self._takes = [_taken_shares(channels, step, gone, len(steps.size)) for channels in _both(units)]
        self._left = shares_left(units, gone)
        self.whole = np.ones(len(units.layers))

    def of(self, taken: Chosen) -> list[Array]:
        """Writes and reads, `(L,)` each, without the steps `taken (E,)`."""
        return [left - takes @ taken.astype(np.float64) for left, takes in zip(self._left, self._takes, strict=True)]

    def in_steps(self, steps: Labels) -> list[Matrix]:
        """What each of the steps `(M,)` takes of them, `(L, M)` each."""
        return [takes[:, steps].toarray() for takes in self._takes]


class _Costs:
    """What of something remains without some steps, for many choices at once.

    Args:
        widths: of the layers.
        price: what there is of it, from shares of filters and of input channels that remain.
    """

    def __init__(self, widths: _Widths, price: Callable[[Array, Array], Array]) -> None:
        self._widths, self._price = widths, price

    @property
    def total(self) -> float:
        """What there is with all channels."""
        return float(self._price(self._widths.whole, self._widths.whole))

    def of(self, taken: Chosen) -> float:
        """What is left without the steps `taken (E,)`."""
        return float(self._price(*self._widths.of(taken)))

    def without(self, taken: Chosen, more: Labels) -> Array:
        """What is left without each of the steps `more (M,)` besides, one at a time: `(M,)`."""
        shares = zip(self._widths.of(taken), self._widths.in_steps(more), strict=True)
        writes, reads = (left[:, None] - takes for left, takes in shares)
        return self._price(writes, reads)

    def swapped(self, taken: Chosen, back: Labels, more: Labels) -> Matrix:
        """What is left if one of `back (B,)` is given back and one of `more (M,)` taken in its place: `(B, M)`."""
        shares = zip(self._widths.of(taken), *map(self._widths.in_steps, (back, more)), strict=True)
        writes, reads = (left[:, None, None] + given[:, :, None] - takes[:, None, :] for left, given, takes in shares)
        return self._price(writes, reads)


class _Products(_Costs):
    """MACs or parameters: those of a layer are the product of both its remaining shares, so that they are quadratic in
    the steps.
    """

    def __init__(self, units: ChannelUnits, widths: _Widths, cost: Cost) -> None:
        layers = units.layers.values()
        dense = np.array([layer.params if cost == "params" else layer.macs or 0 for layer in layers], np.float64)
        super().__init__(widths, lambda writes, reads: np.tensordot(dense, writes * reads, 1))
        self._dense = dense

    @property
    def total(self) -> float:
        """Of the dense network."""
        return float(self._dense.sum())

    def swapped(self, taken: Chosen, back: Labels, more: Labels) -> Matrix:
        """The same with the product of two differences multiplied out: no array over layers, steps back and steps
        taken.
        """
        shares = zip(self._widths.of(taken), self._widths.in_steps(back), strict=True)
        writes, reads = (left[:, None] + given for left, given in shares)
        writes_less, reads_less = self._widths.in_steps(more)
        weighted = self._dense[:, None]
        return np.asarray(
            (self._dense @ (writes * reads))[:, None]
            - (weighted * writes).T @ reads_less
            - (weighted * reads).T @ writes_less
            + self._dense @ (writes_less * reads_less)
        )


@dataclass(frozen=True)
class _Budgets:
    """Several costs as one: the largest of what is left, each relative to what may be. 1 meets them all.

    Attributes:
        asked: the share of each that may remain, by name.
        costs: in the same order.
    """

    asked: Mapping[str, float]
    costs: Sequence[_Costs]

    @classmethod
    def make(
        cls, units: ChannelUnits, steps: _Steps, gone: Chosen, request: Request, times: NetworkTimes | None
    ) -> "_Budgets":
        widths = _Widths(units, steps, gone)
        costs: list[_Costs] = [_Products(units, widths, cost) for cost in request.budgets]
        if request.latency is not None:
            assert times is not None
            costs.append(_Costs(widths, times))
        return cls(request.shares, costs)

    @cached_property
    def _allowed(self) -> list[float]:
        shares = zip(self.asked.values(), self.costs, strict=True)
        return [max(share * cost.total, np.finfo(np.float64).tiny) for share, cost in shares]

    def each(self, taken: Chosen) -> dict[str, float]:
        """What is left of each relative to what may be."""
        found = zip(self.asked, self.costs, self._allowed, strict=True)
        return {name: cost.of(taken) / allowed for name, cost, allowed in found}

    def of(self, taken: Chosen) -> float:
        """Without the steps `taken (E,)`."""
        return max(self.each(taken).values())

    def without(self, taken: Chosen, more: Labels) -> Array:
        """Without each of the steps `more (M,)` besides, one at a time: `(M,)`."""
        found = zip(self.costs, self._allowed, strict=True)
        return np.max([cost.without(taken, more) / allowed for cost, allowed in found], axis=0)

    def swapped(self, taken: Chosen, back: Labels, more: Labels) -> Matrix:
        """With one of `back (B,)` given back and one of `more (M,)` taken in its place: `(B, M)`."""
        found = zip(self.costs, self._allowed, strict=True)
        return np.max([cost.swapped(taken, back, more) / allowed for cost, allowed in found], axis=0)


def _within(units: ChannelUnits, steps: _Steps, budgets: _Budgets) -> Chosen:
    """The steps to take so that about what may remain does."""
    low, high = int(np.count_nonzero(steps.forced)), len(steps.ranking)
    taken, everything = steps.beginning(low), steps.beginning(high)
    if budgets.of(taken) <= 1 + NOISE:
        return taken
    least = budgets.each(everything)
    worst = max(least, key=least.__getitem__)
    if least[worst] > 1 + TOLERANCE:
        share = budgets.asked[worst]
        raise PlanError(
            f"{worst}={share:.4g} cannot be reached by removing filters: with all but the least that each of the "
            f"{len(units.names)} channel spaces keeps removed, {least[worst] * share:.4g} remains; ask for more "
            f"than that, or let more layers be pruned ({len(units.fixed)} convolutions stay whole)"
        )
    while low < high:  # the longest beginning that costs the target or more
        count = (low + high + 1) // 2
        low, high = (count, high) if budgets.of(steps.beginning(count)) >= 1 else (low, count - 1)
    # From there on the next step is too dear, and those after it that are not fill the gap.
    taken = steps.beginning(low)
    nearest, miss = taken, math.inf
    while True:
        ahead = steps.next(taken)
        found, its_miss = _nearest(steps, budgets, taken, ahead)
        if its_miss < miss:
            nearest, miss = found, its_miss
        fitting = ahead[budgets.without(taken, ahead) >= 1]
        if miss <= ENOUGH or not len(fitting):
            return nearest
        taken[fitting[0]] = True


def _nearest(steps: _Steps, budgets: _Budgets, taken: Chosen, ahead: Labels) -> tuple[Chosen, float]:
    """Of a choice, of it with one more step, and of it with one step for another, the nearest to what may remain.

    Also how far it is from that: what is above it by more than `TOLERANCE` is farther than all that is below.
    """
    back = steps.last(taken)
    swapped = budgets.swapped(taken, back, ahead)
    swapped[steps.space[back][:, None] == steps.space[ahead]] = np.inf  # the same units again, out of order
    found = np.concatenate([[budgets.of(taken)], budgets.without(taken, ahead), swapped.ravel()])
    misses = np.where(found > 1 + TOLERANCE, found, np.abs(found - 1))
    best = int(np.argmax(misses <= misses.min() + NOISE))  # the simplest of equals
    miss, best = float(misses[best]), best - 1
    chosen = taken.copy()
    if best >= len(ahead):
        given, best = divmod(best - len(ahead), len(ahead))
        chosen[back[given]] = False
    if best >= 0:
        chosen[ahead[best]] = True
    return chosen, miss


def _lowest(steps: _Steps, count: int, ratio: float) -> Chosen:
    """The beginning of the ranking whose number of units is nearest to `ratio` of all."""
    wanted = count - kept_channels(count, ratio)
    removed = np.cumsum(np.concatenate([[0], steps.size[steps.ranking]]))
    if wanted > removed[-1]:
        raise PlanError(
            f"ratio={ratio:.4g} cannot be reached in a global ranking, which leaves {FLOOR:.4g} of each channel space, "
            f"and round_to units at least; the largest ratio is {removed[-1] / count:.4g}, or use scope='local'"
        )
    nearest = int(np.argmin(np.abs(removed - wanted)))
    return steps.beginning(max(nearest, int(np.count_nonzero(steps.forced))))


def _ratios(units: ChannelUnits, ratio: float | Mapping[str, float]) -> Array:
    """The ratio of each space, `(S,)`."""
    if not isinstance(ratio, Mapping):
        return np.full(len(units.names), ratio)
    spaces = {
        name: np.unique(units.space[layer.writes[layer.writes != STAYS]]).tolist()
        for name, layer in units.layers.items()
    }
    names = [*(name for name, found in spaces.items() if found), *units.fixed]
    asked: dict[int, tuple[str, float]] = {}
    for name, value in match_patterns("ratio", ratio, names).items():
        for space in spaces.get(name, ()):
            other, before = asked.setdefault(space, (name, value))
            if before != value:
                raise PlanError(
                    f"ratio: {other} is to lose {before:.4g} and {name} {value:.4g}, but their filters can only go "
                    "together; give both the same ratio"
                )
    return np.array([asked.get(space, ("", 0.0))[1] for space in range(len(units.names))])


def _first_of_space(space: Units, steps: Labels) -> Labels:
    """Those of `steps` that are the first of their space."""
    return steps[np.sort(np.unique(space[steps], return_index=True)[1])]


def _means(space: Units, sizes: Labels, scores: Array) -> Array:
    """The mean score of the space of each unit, `(U,)`; 1 where all are 0."""
    means = np.bincount(space, scores, minlength=len(sizes)) / sizes
    return np.where(means > 0, means, 1)[space]


def _taken_shares(channels: list[Units | None], step: Labels, gone: Chosen, count: int) -> csc_array:
    """The share of the channels of each layer that each step takes: `(L, E)`, sparse."""
    where, layers, shares = [], [], []
    for layer, labels in enumerate(channels):
        if labels is not None:
            taken = labels[labels != STAYS]
            taken = taken[~gone[taken]]
            where.append(step[taken])
            layers.append(np.full(len(taken), layer))
            shares.append(np.full(len(taken), 1 / len(labels)))
    if not where:
        return csc_array((len(channels), count))
    entries = np.concatenate(shares), (np.concatenate(layers), np.concatenate(where))
    return csc_array(entries, shape=(len(channels), count))


def _both(units: ChannelUnits) -> tuple[list[Units | None], list[Units | None]]:
    """To which units the filters of each layer belong, and its input channels."""
    layers = units.layers.values()
    return [layer.writes for layer in layers], [layer.reads for layer in layers]


def shares_left(units: ChannelUnits, gone: Chosen) -> tuple[Array, Array]:
    """The shares of its filters and input channels that each layer has without units `gone (U,)`: `(L,)` each."""
    stays = np.append(~gone, True)  # STAYS is the last
    writes, reads = (
        np.array([1.0 if labels is None else stays[labels].mean() for labels in channels]) for channels in _both(units)
    )
    return writes, reads


def _check(units: ChannelUnits, scores: Array, request: Request, gone: Chosen) -> None:
    """See that the arguments of `choose_units` fit together."""
    if request.macs is not None and any(layer.macs is None for layer in units.layers.values()):
        raise PlanError("macs: the shapes of the model are not known; pass example_inputs, or use ratio or params")
    for what, array in (("scores", scores), ("gone", gone)):
        if array.shape != (units.count,):
            raise PlanError(f"{what} has shape {array.shape}; there must be one for each of the {units.count} units")
    if not (np.isfinite(scores) & (scores >= 0)).all():
        raise PlanError("scores are negative, NaN or infinite; they must be 0 or more")
    alive = np.bincount(units.space, ~gone, minlength=len(units.names))
    for name, count in zip(units.names, alive, strict=True):
        if not count:
            raise PlanError(f"{name}: all of its filters are gone; one of each channel space must stay")
