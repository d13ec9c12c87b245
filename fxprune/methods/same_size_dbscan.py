"""Same-size DBSCAN: density clusters of embedded filters, cut and filled until all have the same size.

One of the three groupings of TMI-GKP (Zhong, Zhang, Huang, Xu, "Revisit Kernel Pruning with Lottery Regulated Grouped
Convolutions", ICLR 2022); steps and constants were read from the authors' published code.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.stats import rankdata

from fxprune.methods.clustering import Labels, Matrix
from fxprune.plans.fields import check_divisible

# Output dimensions of t-SNE that are tried, and its options.
DIMENSIONS = range(2, 8)
LEARNING_RATE = 200.0
ITERATIONS = 1000
# Above so many filters exact t-SNE, quadratic and ten times slower at 512 than at 128, gives way to Barnes and Hut's
# approximation, which exists for 2 and 3 dimensions only.
EXACT_FILTERS = 256
BARNES_HUT_DIMENSIONS = (2, 3)
# Neighbours that make a point a core, in tenths of the size of a group, rounded up.
TENTHS = range(5, 12)
# Radii are tried in such steps, from 0 until just above half of the largest distance.
RADIUS_STEP = 0.05
# A search along the radius gives up after this share of its length in failures (two labels or fewer), and after a tenth
# of that share once it has met half of the clusters wanted.
FAILURES = 0.25


class Trial(NamedTuple):
    """One point of the grid: the embedding it used, its labels, and the two numbers by which trials are ranked."""

    points: Matrix
    labels: Labels
    surplus: int
    variance: float


def same_size_dbscan(weight: Matrix, groups: int, seed: int = 0) -> Labels:
    """Group filters by DBSCAN on a t-SNE embedding of their directions, then make the groups equal in size.

    A grid over the dimension of t-SNE, DBSCAN's number of neighbours and its radius is ranked by
    `rank(| labels - (groups + 1) |) + 0.5 rank(variance of their sizes)`, the noise counting as a label; `equalize`
    mends the sizes of the best.

    t-SNE amplifies rounding, so the groups may differ between versions of scikit-learn. On one core a layer takes
    0.8 s for 16 filters, 1 s for 32, 2 s for 64 and 8 s for 512, where the grid is smaller, see `EXACT_FILTERS`.

    Args:
        weight: `(O, C, kh, kw)`, finite.
        groups: `n`, a divisor of `O`.
        seed: of t-SNE; the published one is 0.

    Returns:
        the group of each filter `(O,)`, `0..n-1`, every group equally often.

    Raises:
        PlanError: `groups` does not divide `O`.
    """
    filters = len(weight)
    check_divisible(filters, groups)
    if groups in (1, filters):  # one grouping only; t-SNE needs a perplexity, the size of a group, below O
        return np.arange(filters) * groups // filters
    flat = weight.reshape(filters, -1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    directions = np.divide(flat, norms, out=np.zeros_like(flat), where=norms > 0)
    if not pdist(directions).any():  # filters of one direction: nothing to see
        return np.arange(filters) * groups // filters
    trials = list(_trials(directions, groups, seed))
    if not trials:
        return equalize(directions, np.zeros(filters, dtype=np.intp), groups)
    ranks = rankdata([trial.surplus for trial in trials]) + 0.5 * rankdata([trial.variance for trial in trials])
    best = trials[int(ranks.argmin())]
    return equalize(best.points, best.labels, groups)


def _trials(directions: Matrix, groups: int, seed: int) -> Iterator[Trial]:
    from sklearn.manifold import TSNE  # takes most of a second to load

    width = len(directions) // groups
    exact = len(directions) <= EXACT_FILTERS
    for dimension in DIMENSIONS if exact else BARNES_HUT_DIMENSIONS:
        points: Matrix = TSNE(
            dimension,
            perplexity=width,
            learning_rate=LEARNING_RATE,
            max_iter=ITERATIONS,
            init="random",
            method="exact" if exact else "barnes_hut",
            random_state=seed,
        ).fit_transform(directions)
        points = points.astype(np.float64)
        points -= points.mean(axis=0)
        spread = points.std(axis=0)
        points = np.divide(points, spread, out=points, where=spread > 0)
        distances = squareform(pdist(points))
        by_rank = np.sort(distances, axis=1)
        radii = [float(np.finfo(np.float64).tiny)]
        while radii[-1] <= distances.max() / 2:
            radii.append(radii[-1] + RADIUS_STEP)
        for tenths in TENTHS:
            core_radius = by_rank[:, -(-width * tenths // 10) - 1]  # of each point, itself counted among its neighbours
            yield from _along_radius(points, distances, core_radius, radii, groups)


def _along_radius(
    points: Matrix, distances: Matrix, core_radius: Matrix, radii: Sequence[float], groups: int
) -> Iterator[Trial]:
    tree = density_tree(distances, core_radius)
    patience = int(len(radii) * FAILURES)
    failures, promising = 0, False
    for radius in radii:
        labels = dbscan(distances, core_radius, tree, radius)
        sizes = np.unique(labels, return_counts=True)[1]
        if groups > 2:
            if len(sizes) <= 2:
                failures += 1
                if failures >= (patience * 0.1 if promising else patience):
                    return
            elif len(sizes) >= groups / 2:
                promising = True
        yield Trial(points, labels, abs(len(sizes) - (groups + 1)), float(sizes.var()))


def density_tree(distances: Matrix, core_radius: Matrix) -> Matrix:
    """Single-linkage tree of the mutual reachability `max(distance, both core radii)`.

    Cut at a radius it gives the clusters of DBSCAN's cores for that radius (Campello, Moulavi, Sander, "Density-Based
    Clustering Based on Hierarchical Density Estimates", PAKDD 2013, section 3): one tree serves all radii.

    Args:
        distances: `(O, O)`.
        core_radius: `(O,)` the smallest radius at which each point is a core.
    """
    reach = np.maximum(distances, np.maximum.outer(core_radius, core_radius))
    np.fill_diagonal(reach, 0)
    tree: Matrix = linkage(squareform(reach, checks=False), "single")
    return tree


def dbscan(distances: Matrix, core_radius: Matrix, tree: Matrix, radius: float) -> Labels:
    """DBSCAN's labels at one radius: clusters in the order of their first core, a border point in the first, noise -1.

    Args:
        distances: `(O, O)`.
        core_radius: `(O,)`, see `density_tree`.
        tree: of `density_tree`.
        radius: at most so far away is a neighbour.
    """
    labels = np.full(len(distances), -1, dtype=np.intp)
    cores = np.flatnonzero(core_radius <= radius)
    if len(cores):
        _, first, cluster = np.unique(fcluster(tree, radius, "distance")[cores], return_index=True, return_inverse=True)
        labels[cores] = np.argsort(np.argsort(first))[cluster]
        others = np.flatnonzero(core_radius > radius)
        near = distances[np.ix_(others, cores)] <= radius
        reached = near.any(axis=1)
        labels[others[reached]] = np.where(near, labels[cores], len(labels)).min(axis=1)[reached]
    return labels


def equalize(points: Matrix, labels: Labels, groups: int) -> Labels:
    """Cut, fill and dissolve clusters until there are `groups` of equal size.

    Too few clusters: of those above the final size, the one with the highest label gives its members farthest from its
    centroid to a new cluster. Too many: those with the lowest labels, the noise first, lose their members one by one;
    then clusters above the final size lose those farthest from the centroid. The member that moves is the one with the
    largest difference between its two farthest destinations, and it moves to the FARTHEST, as in the published code,
    although the nearest was surely meant: the groups depend on it, so it is kept.

    Args:
        points: `(O, features)`.
        labels: `(O,)` any integers.
        groups: `n`, a divisor of `O`.

    Returns:
        the group of each point `(O,)`, `0..n-1`, every group equally often.
    """
    labels = labels.copy()
    width = len(points) // groups
    while True:
        names, members, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        if len(names) == groups and (sizes == width).all():
            return members
        centroids = np.stack([points[members == cluster].mean(axis=0) for cluster in range(len(names))])
        from_own = np.linalg.norm(points - centroids[members], axis=1)
        outward = np.argsort(-from_own, kind="stable")  # all points, the farthest from its centroid first
        surplus = len(names) - groups
        if surplus < 0:
            largest_label = np.flatnonzero(sizes > width)[-1]
            labels[outward[members[outward] == largest_label][:width]] = names[-1] + 1
            continue
        if surplus > 0:
            movable = outward[members[outward] < surplus]
        else:
            excess = [outward[members[outward] == c][: sizes[c] - width] for c in np.flatnonzero(sizes > width)]
            movable = np.concatenate(excess)
        destinations = np.flatnonzero((sizes < width) & (np.arange(len(names)) >= surplus))
        distances = cdist(points[movable], centroids[destinations])
        ordered = np.sort(distances, axis=1)
        margin = ordered[:, -1] - (ordered[:, -2] if len(destinations) > 1 else 0)
        mover = int(margin.argmax())
        labels[movable[mover]] = names[destinations[distances[mover].argmax()]]
