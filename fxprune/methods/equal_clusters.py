"""Split the filters of a convolution into groups of equal size, by three published schemes.

The schemes are the candidates among which TMI-GKP chooses (Zhong, Zhang, Huang, Xu, "Revisit Kernel Pruning with
Lottery Regulated Grouped Convolutions", ICLR 2022). Their constants were read from the authors' published code. Each is
an embedding of the filters followed by a clustering into equal sizes; labels of groups carry no meaning.
"""

from collections.abc import Callable, Mapping

import numpy as np
from scipy.linalg import eigh
from scipy.spatial.distance import cdist

from fxprune.methods.clustering import Labels, Matrix
from fxprune.methods.same_size_dbscan import same_size_dbscan
from fxprune.plans.fields import check_divisible

# Equal-size k-means: restarts, steps of each, and the squared shift of the centres, as a share of the mean variance of
# a feature, at which a run has converged: those of the KMeans of scikit-learn that the published port is built on.
RESTARTS = 10
MAX_STEPS = 300
TOLERANCE = 1e-4
# Nearest neighbours in the graph of the spectral scheme.
NEIGHBOURS = 16
# The spectral scheme uses one eigenvector for each so many filters.
FILTERS_PER_EIGENVECTOR = 8


def kernel_pca(weight: Matrix, groups: int, seed: int = 0) -> Labels:
    """Equal-size k-means on the kernel principal components of the filters.

    The kernel of filters `a` and `b` is `0.5 (a.b)^2 + 0.5 exp(-|a - b|^2 / D)`, `D` the length of a filter. All
    components of positive variance are kept, so distances are those of the kernel.

    Args:
        weight: `(O, C, kh, kw)`, finite.
        groups: `n`, a divisor of `O`.
        seed: of the starts of k-means.

    Returns:
        the group of each filter `(O,)`, `0..n-1`, every group equally often.

    Raises:
        PlanError: `groups` does not divide `O`.
    """
    flat = weight.reshape(len(weight), -1)
    gram = 0.5 * (flat @ flat.T) ** 2 + 0.5 * np.exp(-cdist(flat, flat, "sqeuclidean") / flat.shape[1])
    noise = len(flat) * np.finfo(np.float64).eps * float(gram.max())
    gram -= gram.mean(axis=0)
    gram -= gram.mean(axis=1, keepdims=True)
    variances, directions = eigh(gram)
    positive = variances > noise
    if not positive.any():  # all filters are equal: any grouping is as good
        return equal_size_kmeans(np.zeros((len(flat), 1)), groups, seed)
    return equal_size_kmeans(directions[:, positive] * np.sqrt(variances[positive]), groups, seed)


def spectral(weight: Matrix, groups: int, seed: int = 0) -> Labels:
    """Equal-size k-means on the first eigenvectors of a graph in which filters of like direction are neighbours.

    Two filters are joined if each is among the 16 nearest of the other by the cosine distance. The coordinates are the
    `O // 8` eigenvectors of smallest eigenvalue of the random-walk Laplacian `1 - degree^-1 adjacency` (a number of
    eigenvectors that does not depend on `groups`; it is the published one).

    Deviations from the published code, each where its result is arbitrary. With 17 filters or fewer its graph is
    complete, all eigenvalues but one coincide, and the groups are rounding noise that no weight enters; here such
    layers use `O // 2` neighbours, the share that 32 filters have. Below 16 filters it uses only the constant
    eigenvector; here at least two. The eigenvectors come from the symmetric Laplacian, which has the same ones up to
    the scale of its rows: they are real.

    Args, returns and errors as in `kernel_pca`.
    """
    filters = len(weight)
    from sklearn.metrics.pairwise import cosine_distances  # scikit-learn takes most of a second to load

    distance = cosine_distances(weight.reshape(filters, -1))  # 1 from a filter of zeros to any other
    neighbours = NEIGHBOURS if filters > NEIGHBOURS + 1 else max(1, filters // 2)
    near = np.zeros((filters, filters), dtype=np.bool_)
    np.put_along_axis(near, np.argsort(distance, axis=1, kind="stable")[:, : neighbours + 1], True, axis=1)
    adjacency = (near & near.T).astype(np.float64)
    np.fill_diagonal(adjacency, 1)  # among many equal filters one may not be its own neighbour
    scale = 1 / np.sqrt(adjacency.sum(axis=1))
    _, vectors = eigh(np.eye(filters) - adjacency * np.outer(scale, scale))
    coordinates = vectors[:, : max(2, filters // FILTERS_PER_EIGENVECTOR)] * scale[:, None]
    return equal_size_kmeans(coordinates / np.linalg.norm(coordinates, axis=0), groups, seed)


SCHEMES: Mapping[str, Callable[[Matrix, int, int], Labels]] = {
    "kernel_pca": kernel_pca,
    "spectral": spectral,
    "dbscan": same_size_dbscan,
}
"""The schemes by name: `(weight, groups, seed) -> labels`. Of equal ones TMI-GKP prefers the first."""


def equal_size_kmeans(points: Matrix, groups: int, seed: int = 0) -> Labels:
    """k-means whose clusters all have the same size.

    The variation of ELKI's tutorial "Same-size k-means", as in the Python port that TMI-GKP uses: greedy k-means++
    starts; points go in index order to the nearest centre that has room; then pairs of points swap, see `_assign`; of
    10 runs the one with the smallest sum of squared distances wins.

    Args:
        points: `(O, features)`, at least one feature.
        groups: `n`, a divisor of `O`.
        seed: of the starts.

    Returns:
        the group of each point `(O,)`, `0..n-1`, every group equally often.

    Raises:
        PlanError: `groups` does not divide `O`.
    """
    check_divisible(len(points), groups)
    points = points - points.mean(axis=0)
    tolerance = TOLERANCE * float(points.var(axis=0).mean())
    from sklearn.cluster import kmeans_plusplus

    random = np.random.RandomState(seed)  # what kmeans_plusplus takes
    best, best_inertia = np.arange(len(points)) * groups // len(points), np.inf
    for _ in range(RESTARTS):
        labels, inertia = _run(points, kmeans_plusplus(points, groups, random_state=random)[0], tolerance)
        if inertia < best_inertia:
            best, best_inertia = labels, inertia
    return best


def _run(points: Matrix, centres: Matrix, tolerance: float) -> tuple[Labels, float]:
    """Alternate assignment and centres until these rest; one more assignment to the best centres that were met."""
    width = len(points) // len(centres)
    best_centres, best_inertia = centres, np.inf
    for _ in range(MAX_STEPS):
        labels, inertia = _assign(cdist(points, centres, "sqeuclidean"), width)
        members = np.argsort(labels, kind="stable").reshape(len(centres), width)
        moved = points[members].mean(axis=1)
        if inertia < best_inertia:
            best_centres, best_inertia = moved, inertia
        shift, centres = float(((moved - centres) ** 2).sum()), moved
        if shift <= tolerance:
            break
    return _assign(cdist(points, best_centres, "sqeuclidean"), width)


def _assign(distances: Matrix, width: int) -> tuple[Labels, float]:
    """Assign points to centres, `width` to each, by rooms that fill up and then one pass of swaps.

    The pass visits points from the farthest from its centre to the nearest. A point swaps with the first visited one
    whose centre it is nearer to, if both together gain.

    Args:
        distances: `(O, n)` squared.
        width: `O / n`.

    Returns:
        labels `(O,)` and the sum of the distances.
    """
    filters, groups = distances.shape
    room = [width] * groups
    first = np.empty(filters, dtype=np.intp)
    for point, preferences in enumerate(np.argsort(distances, axis=1, kind="stable").tolist()):
        first[point] = next(group for group in preferences if room[group])
        room[first[point]] -= 1

    own = distances[np.arange(filters), first]
    order = np.argsort(-own, kind="stable")
    own, here = own[order], first[order]
    by_point, by_group = distances[order], np.ascontiguousarray(distances[order].T)
    for point in range(1, filters):
        there = by_point[point, here[:point]]  # from the point to the centres of those visited before
        gains = (there < own[:point]) & (there + by_group[here[point], :point] < own[:point] + own[point])
        other = int(gains.argmax())
        if gains[other]:
            here[point], here[other] = here[other], here[point]
            own[point], own[other] = by_point[point, here[point]], by_point[other, here[other]]
    labels = np.empty_like(first)
    labels[order] = here
    return labels, float(own.sum())
