"""Choose the input channels that a group of filters keeps, so that the kept kernels differ and speak for the others.

The objective and the greedy search are those of TMI-GKP (Zhong, Zhang, Huang, Xu, "Revisit Kernel Pruning with Lottery
Regulated Grouped Convolutions", ICLR 2022), read from the authors' published code. With the similarity
`s = 1 - distance` of kernel groups, the kept set `K` should make small

    cost(K) = sum of s over pairs in K  -  balance * sum over p not in K of the m largest s between p and K

The distance is not normalized: large kernels are far from all others, so they are kept.
"""

import math
from typing import Literal

import numpy as np
from scipy.spatial.distance import cdist

from fxprune.errors import PlanError
from fxprune.methods.clustering import Labels, Mask, Matrix

Balance = float | Literal["auto"]


def select_kernel_groups(
    weight: Matrix, labels: Labels, kept: int, cost_balancer: Balance = "auto", eval_kept_ratio: float = 0.2
) -> Mask:
    """Choose the channels of each group by the greedy search of TMI-GKP.

    The published code keeps `int((1 - ratio) * (C + 1))` channels, which is one more than `(1 - ratio) * C` for some
    ratios that do not divide; here the caller counts.

    Args:
        weight: `(O, C, kh, kw)`, finite.
        labels: `(O,)` the group of each filter, `0..n-1`.
        kept: `k`, channels of each group, `1..C`.
        cost_balancer: `balance` of the objective, 0 or more; `"auto"` gives both sums the same number of pairs.
        eval_kept_ratio: `m` is this share of `kept`, rounded down.

    Returns:
        chosen channels `(n, C)`, `kept` in each row.

    Raises:
        PlanError: a number is out of range.
    """
    channels = weight.shape[1]
    if not 1 <= kept <= channels:
        raise PlanError(f"a group cannot keep {kept} of {channels} channels; use 1 to {channels}")
    if not 0 <= eval_kept_ratio <= 1:
        raise PlanError(f"eval_kept_ratio is {eval_kept_ratio!r}; it must be a share, 0 to 1")
    if cost_balancer != "auto" and not (
        isinstance(cost_balancer, int | float) and math.isfinite(cost_balancer) and cost_balancer >= 0
    ):
        raise PlanError(f"cost_balancer is {cost_balancer!r}; it must be 'auto' or a number, 0 or more")
    nearest = int(eval_kept_ratio * kept)
    balance = equal_pairs(channels, kept, nearest) if cost_balancer == "auto" else cost_balancer
    chosen = np.zeros((int(labels.max()) + 1, channels), dtype=np.bool_)
    for group, row in enumerate(chosen):
        row[select_greedily(similarity(weight[labels == group]), kept, nearest, balance)] = True
    return chosen


def similarity(filters: Matrix) -> Matrix:
    """`1 - ` Euclidean distance between the kernel groups of one group of filters.

    Args:
        filters: `(d, C, *kernel)`.

    Returns:
        `(C, C)`, 1 on the diagonal; it may be negative.
    """
    kernels = filters.swapaxes(0, 1).reshape(filters.shape[1], -1)
    result: Matrix = 1 - cdist(kernels, kernels)
    return result


def equal_pairs(channels: int, kept: int, nearest: int) -> float:
    """The balance at which both sums of the objective have equal weight: pairs in the first over pairs in the second.

    0 where the second sum is empty.
    """
    pairs = (channels - kept) * nearest
    return kept * (kept - 1) / 2 / pairs if pairs else 0.0


def selection_cost(similarity: Matrix, kept: Labels, nearest: int, balance: float) -> float:
    """The objective, see the module.

    Args:
        similarity: `(C, C)` symmetric.
        kept: `(k,)` the channels kept, each once.
        nearest: `m`, `0..k`.
        balance: weight of the second sum.
    """
    among = similarity[np.ix_(kept, kept)]
    cost = float(among.sum() - among.trace()) / 2
    if nearest:
        others = np.delete(similarity, kept, axis=0)[:, kept]  # (C - k, k)
        cost -= balance * float(np.partition(others, len(kept) - nearest, axis=1)[:, len(kept) - nearest :].sum())
    return cost


def select_greedily(similarity: Matrix, kept: int, nearest: int, balance: float) -> Labels:
    """Grow a set from every channel, always by the one least similar to the set; keep the set of smallest cost.

    The growth sees only the first sum of the objective. The lowest channel wins among equals, and of sets of equal cost
    the one with the lowest start.

    Args:
        similarity: `(C, C)` symmetric.
        kept: `k`, `1..C`.
        nearest: `m`, `0..k`.
        balance: weight of the second sum.

    Returns:
        the channels kept `(k,)`, ascending.
    """
    channels = len(similarity)
    starts = np.arange(channels)
    sets = starts[:, None]  # (C, size), a row for each start
    score = similarity.copy()  # (C, C): to each start, the summed similarity of each channel to its set
    score[starts, starts] = np.inf
    for _ in range(kept - 1):
        added = score.argmin(axis=1)
        sets = np.column_stack([sets, added])
        score += similarity[added]
        score[starts, added] = np.inf
    best: Labels = starts[:kept]
    best_cost = np.inf
    for candidate in dict.fromkeys(map(tuple, np.sort(sets, axis=1).tolist())):  # many starts end in the same set
        cost = selection_cost(similarity, np.array(candidate), nearest, balance)
        if cost < best_cost:
            best, best_cost = np.array(candidate), cost
    return best
