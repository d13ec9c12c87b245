"""TMI-GKP: filter groups that share the change of their weights evenly, and greedily chosen input channels.

Zhong, Zhang, Huang, Xu, "Revisit Kernel Pruning with Lottery Regulated Grouped Convolutions", ICLR 2022. "TMI" is the
ticket magnitude increase: how much the magnitudes of the weights changed since an earlier epoch. Steps and constants
were read from the authors' published code. The result is in overlap form.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from fxprune.errors import PlanError
from fxprune.methods.clustering import Clustering, Labels, Matrix
from fxprune.methods.equal_clusters import SCHEMES
from fxprune.methods.kernel_selection import Balance, select_kernel_groups


@dataclass(frozen=True)
class TmiChoice:
    """Which grouping scheme a layer got, and why.

    Args:
        scheme: the one that won, a name of `SCHEMES`.
        winners: the best scheme by each snapshot, in their order.
    """

    scheme: str
    winners: tuple[str, ...]

    @property
    def votes(self) -> dict[str, int]:
        """How many snapshots each scheme won."""
        return {scheme: self.winners.count(scheme) for scheme in SCHEMES}


def tmi_gkp(
    weight: Matrix,
    snapshots: Sequence[Matrix],
    groups: int,
    kept: int,
    *,
    cost_balancer: Balance = "auto",
    eval_kept_ratio: float = 0.2,
    seed: int = 0,
) -> tuple[Clustering, TmiChoice]:
    """Group the filters of a layer by the scheme that its training snapshots vote for, and choose the channels.

    The schemes do not look at the snapshots, so each runs once. `Clustering.out_order` sorts groups by their first
    filter, the published code by their label; the groups are the same.

    Args:
        weight: `(O, C, *kernel)`, finite.
        snapshots: the weight of the same layer at earlier epochs, in their order, each of the same shape. The paper
            takes every epoch from 35 to 70 of 300.
        groups: `n`, a divisor of `O`.
        kept: `k`, input channels of each group, `1..C`.
        cost_balancer: see `select_kernel_groups`. The authors set it by hand for two of four networks.
        eval_kept_ratio: see `select_kernel_groups`.
        seed: of the schemes; the published one is 0.

    Raises:
        PlanError: no snapshot, one of another shape, `groups` does not divide `O`, or a number is out of range.
    """
    if not snapshots:
        raise PlanError("TMI-GKP needs at least one earlier state of the layer; pass snapshots=[state_dict, ...]")
    for index, snapshot in enumerate(snapshots):
        if snapshot.shape != weight.shape:
            raise PlanError(f"snapshot {index} has shape {snapshot.shape}, the weight {weight.shape}; they must agree")
    partitions = {name: scheme(weight, groups, seed) for name, scheme in SCHEMES.items()}
    winners = tuple(choose_scheme(tmi_scores(weight, snapshot), partitions) for snapshot in snapshots)
    choice = TmiChoice(vote(winners), winners)
    labels = partitions[choice.scheme]
    chosen = select_kernel_groups(weight, labels, kept, cost_balancer, eval_kept_ratio)
    return Clustering.from_labels(labels, chosen), choice


def tmi_scores(final: Matrix, snapshot: Matrix) -> Matrix:
    """How much the magnitudes of each filter changed: the sum of `| |final| - |snapshot| |` over its weights, `(O,)`.

    Args:
        final: `(O, C, *kernel)`.
        snapshot: the same at an earlier epoch.
    """
    result: Matrix = np.abs(np.abs(final) - np.abs(snapshot)).sum(axis=tuple(range(1, final.ndim)))
    return result


def evenness(scores: Matrix, labels: Labels) -> tuple[float, float]:
    """How evenly the scores of filters are spread over groups: small numbers mean evenly.

    Args:
        scores: `(O,)`.
        labels: `(O,)` the group of each filter, `0..n-1`.

    Returns:
        mean and population variance of the `n - 1` gaps between the sums of the groups in descending order; zeros for
        one group.
    """
    gaps = np.diff(np.sort(np.bincount(labels, weights=scores)))
    return (float(gaps.mean()), float(gaps.var())) if len(gaps) else (0.0, 0.0)


def choose_scheme(scores: Matrix, partitions: Mapping[str, Labels]) -> str:
    """The partition that spreads the scores most evenly: smallest `0.5 rank(mean gap) + rank(variance of gaps)`.

    Equal values share their mean rank. Of equal partitions the first wins.

    Args:
        scores: `(O,)`.
        partitions: by name, `(O,)` each.
    """
    means, variances = zip(*(evenness(scores, labels) for labels in partitions.values()), strict=True)
    ranks = 0.5 * rankdata(means) + rankdata(variances)
    return list(partitions)[int(ranks.argmin())]


def vote(winners: Sequence[str]) -> str:
    """The most frequent winner; of those tied the one with the longest run of wins in a row, then the first scheme.

    Args:
        winners: names of `SCHEMES`, at least one.
    """
    counts = Counter(winners)
    runs = {name: max(len(list(run)) for key, run in itertools.groupby(winners) if key == name) for name in counts}
    return max((name for name in SCHEMES if name in counts), key=lambda name: (counts[name], runs[name]))
