"""Equal-size clustering: every scheme gives groups of one size, follows the filters, and agrees with its definition."""

import warnings

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from sklearn.cluster import DBSCAN

from fxprune.errors import PlanError
from fxprune.methods import Labels, Matrix, equal_clusters, same_size_dbscan
from fxprune.methods.equal_clusters import SCHEMES, equal_size_kmeans, kernel_pca, spectral

FAST = {name: scheme for name, scheme in SCHEMES.items() if name != "dbscan"}


@pytest.fixture
def short_tsne(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small grid and few iterations: what is tested here does not depend on a good embedding."""
    monkeypatch.setattr(same_size_dbscan, "ITERATIONS", 250)  # the fewest that scikit-learn takes
    monkeypatch.setattr(same_size_dbscan, "DIMENSIONS", (2,))


def random_weight(filters: int, channels: int = 3, size: int = 3, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((filters, channels, size, size))


def clustered_weight(filters: int, groups: int, seed: int = 0) -> tuple[Matrix, Labels]:
    """Filters near `groups` distinct directions, in random order, and the direction of each."""
    generator = np.random.default_rng(seed)
    truth = generator.permutation(np.arange(filters) * groups // filters)
    centres = generator.standard_normal((groups, 4, 3, 3))
    return centres[truth] + 0.05 * generator.standard_normal((filters, 4, 3, 3)), truth


def partition(labels: Labels) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == group).tolist()) for group in np.unique(labels)}


def sum_of_squares(points: Matrix, labels: Labels) -> float:
    return sum(float(points[labels == group].var(axis=0).sum()) * int((labels == group).sum()) for group in set(labels))


def is_even(labels: Labels, groups: int) -> bool:
    return bool((np.bincount(labels, minlength=groups) == len(labels) // groups).all())


@pytest.mark.usefixtures("short_tsne")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "filters,groups", [(2, 2), (6, 2), (6, 3), (12, 4), (15, 5), (16, 8), (18, 6), (36, 4), (8, 1)]
)
def test_groups_have_equal_sizes(scheme: str, filters: int, groups: int) -> None:
    labels = SCHEMES[scheme](random_weight(filters, size=1 if filters == 12 else 3), groups, 0)
    assert labels.shape == (filters,)
    assert is_even(labels, groups)


@pytest.mark.usefixtures("short_tsne")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_odd_layers_get_equal_groups_without_a_warning(scheme: str) -> None:
    twins = np.repeat(random_weight(4), 4, axis=0)
    dead = random_weight(16)
    dead[::2] = 0
    scaled = random_weight(1) * np.arange(1, 17)[:, None, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weight in (np.zeros((16, 3, 3, 3)), np.ones((16, 3, 3, 3)), twins, dead, scaled, 1e-9 * random_weight(16)):
            for groups in (1, 2, 4, 16):
                assert is_even(SCHEMES[scheme](weight, groups, 0), groups)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_that_do_not_divide_are_refused(scheme: str) -> None:
    with pytest.raises(PlanError, match="12 filters do not divide into 5 groups"):
        SCHEMES[scheme](random_weight(12), 5, 0)


@pytest.mark.parametrize("filters,groups", [(12, 4), (24, 4), (32, 8), (64, 8)])
def test_kernel_pca_finds_plain_clusters_in_any_order_of_the_filters(filters: int, groups: int) -> None:
    weight, truth = clustered_weight(filters, groups)
    assert partition(kernel_pca(weight, groups)) == partition(truth)
    order = np.random.default_rng(1).permutation(filters)
    assert partition(kernel_pca(weight[order], groups)) == partition(truth[order])


def test_spectral_finds_plain_clusters_that_its_graph_separates() -> None:
    """Two groups of more than 16 filters; with more groups the published number of eigenvectors is too small."""
    weight, truth = clustered_weight(48, 2)
    assert partition(spectral(weight, 2)) == partition(truth)


def test_dbscan_finds_plain_clusters() -> None:
    weight, truth = clustered_weight(32, 4)
    assert partition(SCHEMES["dbscan"](weight, 4, 0)) == partition(truth)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_seed_decides_and_global_random_state_is_left_alone(scheme: str) -> None:
    weight = random_weight(16)
    np.random.seed(7)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    first, again = SCHEMES[scheme](weight, 4, 3), SCHEMES[scheme](weight, 4, 3)
    assert first.tolist() == again.tolist()
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_small_layers_are_grouped_by_their_weights() -> None:
    """With the published 16 neighbours the graph of 16 filters is complete, and no weight matters."""
    partitions = [partition(spectral(random_weight(16, seed=seed), 8)) for seed in range(3)]
    assert partitions[0] != partitions[1] != partitions[2]


def test_kernel_pca_has_the_distances_of_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[Matrix] = []
    monkeypatch.setattr(equal_clusters, "equal_size_kmeans", lambda points, *_: embedded.append(points))
    weight = random_weight(10)
    kernel_pca(weight, 2)
    flat = weight.reshape(10, -1)

    def kernel(a: Matrix, b: Matrix) -> float:
        return 0.5 * float(a @ b) ** 2 + 0.5 * float(np.exp(-((a - b) ** 2).sum() / 27))

    for i in range(10):
        for j in range(10):
            squared = kernel(flat[i], flat[i]) + kernel(flat[j], flat[j]) - 2 * kernel(flat[i], flat[j])
            assert ((embedded[0][i] - embedded[0][j]) ** 2).sum() == pytest.approx(squared, abs=1e-9 * 27**2)


def refined_slowly(distances: Matrix, width: int) -> list[int]:
    """The assignment of equal-size k-means, point by point, as its tutorial tells it."""
    points, groups = distances.shape
    labels = [-1] * points
    for point in range(points):
        labels[point] = min((g for g in range(groups) if labels.count(g) < width), key=lambda g: distances[point, g])
    visited: list[int] = []
    for point in sorted(range(points), key=lambda p: -distances[p, labels[p]]):
        for other in visited:
            mine, its = labels[point], labels[other]
            if mine != its and distances[point, its] < distances[other, its]:
                before = distances[point, mine] + distances[other, its]
                if distances[point, its] + distances[other, mine] < before:
                    labels[point], labels[other] = its, mine
                    break
        visited.append(point)
    return labels


@pytest.mark.parametrize("seed", range(20))
def test_assignment_is_that_of_the_tutorial(seed: int) -> None:
    distances = np.random.default_rng(seed).random((20, 5)) ** 2
    labels, total = equal_clusters._assign(distances, 4)
    assert labels.tolist() == refined_slowly(distances, 4)
    assert total == pytest.approx(distances[np.arange(20), labels].sum(), rel=1e-12)


def test_kmeans_is_better_than_chance_and_control() -> None:
    points = np.random.default_rng(0).standard_normal((48, 5))
    found = sum_of_squares(points, equal_size_kmeans(points, 6))
    generator = np.random.default_rng(1)
    chance = [sum_of_squares(points, generator.permutation(np.arange(48) * 6 // 48)) for _ in range(300)]
    assert found < min(chance)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_samples", [1, 2, 4, 7])
def test_dbscan_by_tree_is_dbscan(seed: int, min_samples: int) -> None:
    points = np.random.default_rng(seed).standard_normal((40, 2)).round(1)  # rounded: equal distances, equal points
    distances = squareform(pdist(points))
    core_radius = np.sort(distances, axis=1)[:, min_samples - 1]
    tree = same_size_dbscan.density_tree(distances, core_radius)
    seen = set()
    for radius in np.arange(1, 20) * 0.1 + 1e-6:
        expected = DBSCAN(eps=radius, min_samples=min_samples, metric="precomputed").fit(distances).labels_
        assert same_size_dbscan.dbscan(distances, core_radius, tree, radius).tolist() == expected.tolist()
        seen.add(len(set(expected.tolist())))
    assert len(seen) > 1  # the radii meet different numbers of clusters


@pytest.mark.parametrize(
    "sizes", [(16,), (8, 8), (4, 4, 4, 4), (13, 1, 1, 1), (1,) * 16, (2, 3, 5, 5, 1), (6, 6, 2, 2)]
)
@pytest.mark.parametrize("noise", [False, True])
def test_equalizing_any_sizes(sizes: tuple[int, ...], noise: bool) -> None:
    points = np.random.default_rng(0).standard_normal((16, 2))
    labels = np.repeat(np.arange(len(sizes)), sizes) - noise
    given = labels.copy()
    assert is_even(same_size_dbscan.equalize(points, labels, 4), 4)
    assert (labels == given).all()


def test_equalizing_moves_to_the_farthest_cluster_as_published() -> None:
    points = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 3.0], [0.0, -2.0], [0.0, 4.0], [0.0, -10.0]])
    labels = same_size_dbscan.equalize(points, np.array([0, 0, 0, 0, 1, 2]), 3)
    assert partition(labels) == {frozenset({0, 1}), frozenset({2, 5}), frozenset({3, 4})}  # 2 is next to 4


def test_a_new_cluster_takes_the_farthest_members() -> None:
    points = np.array([[0.0], [1.0], [-1.0], [5.0], [-5.0], [0.5], [9.0], [-9.0]])
    labels = same_size_dbscan.equalize(points, np.zeros(8, dtype=np.intp), 2)
    assert partition(labels) == {frozenset({3, 4, 6, 7}), frozenset({0, 1, 2, 5})}


def test_large_layers_use_the_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_size_dbscan, "EXACT_FILTERS", 16)
    monkeypatch.setattr(same_size_dbscan, "ITERATIONS", 250)
    assert is_even(SCHEMES["dbscan"](random_weight(24), 4, 0), 4)


def test_a_search_that_always_fails_still_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_size_dbscan, "_trials", lambda *_: iter(()))
    assert is_even(SCHEMES["dbscan"](random_weight(16), 4, 0), 4)
