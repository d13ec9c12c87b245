"""Choose filter groups and their input channels together, so that the kept kernels weigh the most.

The problem: split the `O` filters into `n` groups of equal size and let each group keep `k` of the `C` input channels,
so that the sum of `importance[f, c]` over the kept kernels is largest. Alternate between the two halves, each of which
has an exact solution when the other is fixed, so the sum never falls:

1. channels, given the groups: in overlap form each group takes its `k` heaviest channels; in partition form the
   channels are dealt out `C / n` to a group by a balanced assignment.
2. filters, given the kept channels: a balanced assignment of filters to groups.

This is block-wise co-clustering by alternating minimization (Banerjee, Dhillon, Ghosh, Merugu, Modha, "A Generalized
Maximum Entropy Approach to Bregman Co-clustering", JMLR 8, 2007, section 4) with equal-size groups. It finds a local
optimum, hence the several starts.

Where channels are kept in aligned blocks, a block takes the place of a channel and weighs what its channels weigh.

Several layers may have to group their filters alike. Then the filters of all are dealt out together, for the sum of
what the layers keep, and each layer has channels of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fxprune.errors import PlanError
from fxprune.methods.clustering import Clustering, Labels, Mask, Matrix
from fxprune.plans import Form
from fxprune.plans.fields import check_divisible

# Alternations per start; planning ResNet-50 needs fewer than 20 in every layer.
MAX_ROUNDS = 30
# A gain below this share of the largest score is rounding noise: accepting it could make the search walk in circles.
NOISE = 1e-12


class Layer(NamedTuple):
    """What one of several layers with the same groups of filters brings along.

    Args:
        importance: `(O, C)`, or `(O, C / block)` if it is that of blocks.
        kept: `k`, channels or blocks of each group.
        form: see `cocluster`.
    """

    importance: Matrix
    kept: int
    form: Form


def cocluster(
    importance: Matrix,
    groups: int,
    kept: int,
    form: Form = "overlap",
    seed: int = 0,
    restarts: int = 4,
    block: int = 1,
    labels: Labels | None = None,
) -> Clustering:
    """Group the filters and choose the input channels of each group so that the kept importance is large.

    Args:
        importance: `(O, C)` weight of each kernel, finite and non-negative.
        groups: `n`, a divisor of `O`.
        kept: `k`, input channels of each group, `1..C`; `C / n` in partition form.
        form: `"overlap"`: kept sets may share channels; `"partition"`: each channel goes to exactly one group.
        seed: of the random starts. Global random state is neither read nor changed.
        restarts: random starts beside the spectral one; the best result wins.
        block: channels are kept in runs of this many that start at its multiples; it divides `C` and `k`.
        labels: `(O,)` the group of each filter, every group equally often, if it is decided already: then only the
            channels are chosen.

    Raises:
        PlanError: the filters, the channels of the partition form, or the blocks do not divide.
    """
    filters, channels = importance.shape
    check_divisible(filters, groups)
    if not 1 <= kept <= channels or (form == "partition" and kept * groups != channels):
        raise PlanError(f"{groups} groups cannot keep {kept} of {channels} channels each in {form} form")
    if channels % block or kept % block:
        raise PlanError(f"{kept} of {channels} channels cannot be kept in blocks of {block}; use a divisor of both")
    units = in_blocks(importance, block)
    if labels is None:
        layer = Layer(units, kept // block, form)
        labels, (chosen,), history = _best_start([layer], groups, seed, restarts)
    else:
        totals = group_totals(units, labels)
        chosen = choose_channels(totals, kept // block, form)
        history = [float(totals[chosen].sum())]
    chosen = chosen.repeat(block, axis=1)
    cost = None
    if block > 1:
        totals = group_totals(importance, labels)
        free = choose_channels(totals, kept, form, chosen)
        cost = share_lost(float(totals[chosen].sum()), float(totals[free].sum()))
    return Clustering.from_labels(labels, chosen, tuple(history), cost)


def common_groups(layers: Sequence[Layer], groups: int, seed: int = 0, restarts: int = 4) -> Labels:
    """Group filters once for several layers, so that the shares of their importance that they keep are large in sum.

    Args:
        layers: two or more with equally many filters. One without any importance has no say.
        groups: see `cocluster`, as for `seed` and `restarts`.

    Returns:
        the group of each filter `(O,)`, for the `labels` of `cocluster`.

    Raises:
        PlanError: the filters do not divide.
    """
    check_divisible(len(layers[0].importance), groups)
    tiny = np.finfo(np.float64).tiny
    shares = [layer._replace(importance=layer.importance / max(layer.importance.sum(), tiny)) for layer in layers]
    return _best_start(shares, groups, seed, restarts)[0]


def in_blocks(importance: Matrix, block: int) -> Matrix:
    """Importance of aligned blocks of channels: `(N, C)` to `(N, C / block)`."""
    blocks: Matrix = importance.reshape(len(importance), -1, block).sum(axis=2)
    return blocks


def share_lost(kept: float, free: float) -> float:
    """Share of `free`, what could be kept, that `kept` falls short of; 0 if it does not."""
    return max(0.0, 1 - kept / free) if free > 0 else 0.0


def group_totals(importance: Matrix, labels: Labels) -> Matrix:
    """Importance `(n, C)` of each channel to each group of filters."""
    totals: Matrix = np.equal.outer(np.arange(int(labels.max()) + 1), labels).astype(importance.dtype) @ importance
    return totals


def alternate(importance: Matrix, labels: Labels, kept: int, form: Form) -> tuple[Labels, Mask, list[float]]:
    """Improve a balanced grouping until neither half-step gains.

    Args:
        importance: `(O, C)`.
        labels: `(O,)` the group of each filter, every group equally often.
        kept: `k`.
        form: see `cocluster`.

    Returns:
        labels `(O,)`, chosen channels `(n, C)` bool, and the kept importance after each half-step.
    """
    (search,) = _alternate([Layer(importance, kept, form)], [labels])
    return search.labels, search.masks[0], search.history


def _best_start(
    layers: Sequence[Layer], groups: int, seed: int, restarts: int
) -> tuple[Labels, list[Mask], list[float]]:
    """The best of a search from the spectral start and of some from random ones."""
    generator = np.random.default_rng(seed)
    first, *others = (layer.importance for layer in layers)
    together = np.concatenate([first, *others], axis=1) if others else first
    ranks = np.arange(len(together)) * groups // len(together)  # balanced labels by rank: 0..0 1..1 ...
    starts = [ranks[np.argsort(np.argsort(_spectral_coordinate(together), kind="stable"))]]
    if groups > 1:
        starts += [generator.permutation(ranks) for _ in range(restarts)]
    best = max(_alternate(layers, starts), key=lambda search: search.history[-1])  # the first of equals
    return best.labels, best.masks, best.history


@dataclass
class _Search:
    """Where the search from one start stands.

    Attributes:
        labels: `(O,)`.
        chosen: the channels of each layer; None before the first step.
        history: see `alternate`.
    """

    labels: Labels
    chosen: list[Mask | None]
    history: list[float] = field(default_factory=list)

    @property
    def masks(self) -> list[Mask]:
        """The channels of each layer after a step."""
        return [mask for mask in self.chosen if mask is not None]

    @property
    def rests(self) -> bool:
        """Whether the last two half-steps gained nothing."""
        return len(self.history) > 2 and self.history[-1] <= self.history[-3] * (1 + NOISE)


def _alternate(layers: Sequence[Layer], starts: Sequence[Labels]) -> list[_Search]:
    """See `alternate`, from several starts. They go step by step together: to read the importance from memory takes
    longer than to add it up, and one product reads it for all of them.
    """
    searches = [_Search(labels, [None] * len(layers)) for labels in starts]
    groups, active = int(starts[0].max()) + 1, searches
    for _ in range(MAX_ROUNDS):
        members = np.concatenate([np.equal.outer(np.arange(groups), search.labels) for search in active])
        kept, score = np.zeros(len(active)), np.zeros((len(active), len(starts[0]), groups))  # (starts, O, n)
        for number, layer in enumerate(layers):
            totals = (members.astype(layer.importance.dtype) @ layer.importance).reshape(len(active), groups, -1)
            for i, search in enumerate(active):
                found = choose_channels(totals[i], layer.kept, layer.form, search.chosen[number])
                search.chosen[number] = found
                kept[i] += float(totals[i][found].sum())
            together = np.concatenate([search.masks[number] for search in active]).astype(layer.importance.dtype)
            score += (layer.importance @ together.T).reshape(-1, len(active), groups).swapaxes(0, 1)
        for search, before, gained in zip(active, kept.tolist(), score, strict=True):
            search.labels = assign_balanced(gained, search.labels)
            search.history += [before, float(gained[np.arange(len(gained)), search.labels].sum())]
        active = [search for search in active if not search.rests]
        if not active:
            break
    return searches


def choose_channels(totals: Matrix, kept: int, form: Form, before: Mask | None = None) -> Mask:
    """Choose the channels of each group so that the kept importance is largest: `(n, C)` bool.

    Args:
        totals: `(n, C)` importance of each channel to each group.
        kept: `k`.
        form: see `cocluster`.
        before: an earlier choice from which the search of the partition form may start.
    """
    groups, channels = totals.shape
    if form == "partition":
        dealt = np.arange(channels) * groups // channels if before is None else before.argmax(axis=0)
        return np.equal.outer(np.arange(groups), assign_balanced(totals.T, dealt))
    chosen = np.zeros(totals.shape, dtype=np.bool_)
    np.put_along_axis(chosen, np.argsort(-totals, axis=1, kind="stable")[:, :kept], True, axis=1)
    return chosen


def assign_balanced(score: Matrix, labels: Labels) -> Labels:
    """Assign rows to columns, equally many to each column, so that the sum of the chosen scores is largest.

    The result is exact. An assignment is a flow, and it is optimal if and only if no cycle of moves between columns
    gains (Klein, "A primal method for minimal cost flows", Management Science 14, 1967). Cycles of two columns are
    the bulk; all those of one pair are cancelled at once by a sort. Longer ones are cancelled one by one. Unlike a
    general assignment solver this takes the previous result as its start and works on `N x n` numbers, not `N x N`.

    Args:
        score: `(N, n)`.
        labels: `(N,)` a balanced assignment to start from; it is not changed, and the result never scores less.
    """
    labels = labels.copy()
    columns = score.shape[1]
    if columns == 1:
        return labels
    noise = NOISE * float(np.abs(score).max())
    gains, movers = np.empty((columns, columns)), np.empty((columns, columns), dtype=np.intp)
    every = np.arange(columns)
    touched = every.tolist()
    while True:
        # The best move out of a column changes only with its rows.
        own = every[touched, None]
        rows = np.nonzero(labels == own)[1].reshape(len(touched), -1)  # ascending, (touched, N / n)
        difference = score[rows]
        difference -= score[rows, own][:, :, None]  # (touched, N / n, n)
        best, which = difference.argmax(axis=1), every[: len(touched), None]
        gains[touched] = difference[which, best, every]
        movers[touched] = rows[which, best]
        gains[touched, touched] = -np.inf
        both = gains + gains.T
        pair = divmod(int(both.argmax()), columns)
        if both[pair] > noise:
            _split_pair(score, labels, *pair)
            touched = list(pair)
            if columns > 2:
                continue
        if columns == 2:  # one sort is optimal, and there are no longer cycles
            return labels
        touched = _gaining_cycle(gains, noise)
        if not touched:
            return labels
        for source, target in zip(touched, touched[1:] + touched[:1], strict=True):
            labels[movers[source, target]] = target


def _split_pair(score: Matrix, labels: Labels, a: int, b: int) -> None:
    """Assign the rows of two columns anew, in place: those that gain most from `a` over `b` go to `a`."""
    rows = np.flatnonzero((labels == a) | (labels == b))
    order = rows[np.argsort(score[rows, b] - score[rows, a], kind="stable")]
    labels[order[: len(rows) // 2]] = a
    labels[order[len(rows) // 2 :]] = b


def _gaining_cycle(gains: Matrix, noise: float) -> list[int]:
    """Columns `[a, b, ...]` such that the moves a to b, b to ..., ... to a gain more than `noise`; `[]` if none do.

    Bellman and Ford's search: a walk that still gains in round `n` has been through a cycle.
    """
    columns = len(gains)
    walk, parent = np.zeros(columns), np.zeros(columns, dtype=np.intp)
    for _ in range(columns):
        longer = walk[:, None] + gains
        source = longer.argmax(axis=0)
        reached = longer[source, np.arange(columns)]
        improved = reached > walk + noise / columns
        if not improved.any():
            return []
        walk = np.where(improved, reached, walk)
        parent = np.where(improved, source, parent)
    node = int(np.flatnonzero(improved)[0])
    for _ in range(columns):  # step back into the cycle
        node = int(parent[node])
    cycle = [node]
    while int(parent[cycle[-1]]) != node:
        cycle.append(int(parent[cycle[-1]]))
    cycle.reverse()
    gain = sum(gains[a, b] for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return cycle if gain > noise else []


def _spectral_coordinate(importance: Matrix, steps: int = 12) -> npt.NDArray[np.float64]:
    """One number for each filter; filters that need the same channels are near each other.

    The second left singular vector of the importance with its row and column sums scaled away (Dhillon, "Co-clustering
    documents and words using bipartite spectral graph partitioning", KDD 2001, section 4). The first pair is known in
    closed form and is projected out; a few power steps suffice for a start.
    """
    rows, columns = np.sqrt(importance.sum(axis=1)), np.sqrt(importance.sum(axis=0))
    row_scale = np.divide(1, rows, out=np.zeros_like(rows), where=rows > 0)
    column_scale = np.divide(1, columns, out=np.zeros_like(columns), where=columns > 0)
    leading = rows / max(float(np.linalg.norm(rows)), np.finfo(np.float64).tiny)
    vector = np.random.default_rng(0).standard_normal(len(rows))
    for _ in range(steps):
        vector = vector - leading * (leading @ vector)
        vector = row_scale * (importance @ (column_scale**2 * ((row_scale * vector) @ importance)))
        vector /= max(float(np.linalg.norm(vector)), np.finfo(np.float64).tiny)
    result: npt.NDArray[np.float64] = vector * row_scale
    return result
