"""TMI-GKP: the greedy choice of kernels against its definition, the vote, and whole layers."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from fxprune.errors import PlanError
from fxprune.methods import Labels, Matrix, kernel_selection, same_size_dbscan, tmi, tmi_gkp
from fxprune.methods.equal_clusters import SCHEMES
from fxprune.methods.kernel_selection import equal_pairs, select_greedily, select_kernel_groups, selection_cost
from fxprune.methods.tmi import choose_scheme, evenness, tmi_scores, vote
from fxprune.plans import GroupedKernels

Scheme = Callable[[Matrix, int, int], Labels]


@pytest.fixture
def short_tsne(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_size_dbscan, "ITERATIONS", 250)  # the fewest that scikit-learn takes
    monkeypatch.setattr(same_size_dbscan, "DIMENSIONS", (2,))


def random_weight(filters: int, channels: int, size: int = 3, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((filters, channels, size, size))


def random_labels(filters: int, groups: int, seed: int = 0) -> Labels:
    return np.random.default_rng(seed).permutation(np.arange(filters) * groups // filters)


def random_similarity(channels: int, seed: int) -> Matrix:
    return kernel_selection.similarity(random_weight(2, channels, seed=seed) * 0.2)


def cost_by_hand(similarity: Matrix, kept: Sequence[int], nearest: int, balance: float) -> float:
    """The objective, term by term."""
    pairs = sum(similarity[i, j] for i, j in itertools.combinations(kept, 2))
    outside = 0.0
    for p in set(range(len(similarity))) - set(kept):
        outside += sum(sorted((similarity[p, j] for j in kept), reverse=True)[:nearest])
    return float(pairs - balance * outside)


def choice_by_hand(similarity: Matrix, kept: int, nearest: int, balance: float) -> set[int]:
    """The greedy search, one channel after the other."""
    best: tuple[float, list[int]] = (float("inf"), [])
    for start in range(len(similarity)):
        chosen = [start]
        while len(chosen) < kept:
            left = [c for c in range(len(similarity)) if c not in chosen]
            chosen.append(min(left, key=lambda c: sum(similarity[s, c] for s in chosen)))
        cost = cost_by_hand(similarity, chosen, nearest, balance)
        if cost < best[0] - 1e-12 * abs(cost):
            best = (cost, chosen)
    return set(best[1])


SIZES = [(4, 2), (6, 3), (8, 5), (10, 9), (12, 5), (12, 6), (16, 8), (16, 9), (20, 11), (9, 9), (7, 1)]


@pytest.mark.parametrize("channels,kept", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_that_of_the_definition(channels: int, kept: int, seed: int) -> None:
    weight, labels = random_weight(8, channels, seed=seed), random_labels(8, 4, seed)
    chosen = select_kernel_groups(weight, labels, kept)
    for group, row in enumerate(chosen):
        slabs = weight[labels == group]
        similarity = np.array(
            [[1 - np.sqrt(((slabs[:, i] - slabs[:, j]) ** 2).sum()) for j in range(channels)] for i in range(channels)]
        )
        nearest = int(0.2 * kept)
        pairs = (channels - kept) * nearest
        balance = kept * (kept - 1) / 2 / pairs if pairs else 0
        assert set(np.flatnonzero(row)) == choice_by_hand(similarity, kept, nearest, balance)


def test_options_reach_the_objective() -> None:
    weight, labels = random_weight(16, 16), random_labels(16, 8)
    plain = select_kernel_groups(weight, labels, 9)
    for chosen, nearest, balance in (
        (select_kernel_groups(weight, labels, 9, cost_balancer=40.0), 1, 40.0),
        (select_kernel_groups(weight, labels, 9, eval_kept_ratio=0.5), 4, 36 / 28),
        (select_kernel_groups(weight, labels, 9, eval_kept_ratio=0), 0, 0.0),
    ):
        for group in range(8):
            similarity = kernel_selection.similarity(weight[labels == group])
            assert set(np.flatnonzero(chosen[group])) == choice_by_hand(similarity, 9, nearest, balance)
        assert (chosen != plain).any()


@pytest.mark.parametrize("seed", range(10))
def test_the_objective_is_that_of_the_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    similarity = random_similarity(12, seed)
    kept = np.sort(generator.permutation(12)[:7])
    for nearest in (0, 1, 3, 7):
        expected = cost_by_hand(similarity, kept.tolist(), nearest, 1.5)
        assert selection_cost(similarity, kept, nearest, 1.5) == pytest.approx(expected, rel=1e-12)


def test_the_balance_known_from_resnet20() -> None:
    assert [round(equal_pairs(c, k, int(0.2 * k)), 3) for c, k in ((16, 9), (32, 18), (64, 36))] == [
        5.143,
        3.643,
        3.214,
    ]
    assert equal_pairs(16, 16, 3) == equal_pairs(16, 4, 0) == 0


def excess(similarity: Matrix, found: Labels, nearest: int, balance: float) -> float:
    """How far a choice is from the best of all, as a share of the way from the best to the mean."""
    sets = itertools.combinations(range(len(similarity)), len(found))
    costs = np.array([selection_cost(similarity, np.array(kept), nearest, balance) for kept in sets])
    cost = selection_cost(similarity, found, nearest, balance)
    assert cost >= costs.min() - 1e-9
    return float((cost - costs.min()) / (costs.mean() - costs.min()))


def test_the_choice_is_near_the_best_of_all_and_control(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_excess() -> float:
        shares = []
        for seed in range(12):
            similarity = random_similarity(10, seed)
            balance = equal_pairs(10, 5, 1)
            shares.append(excess(similarity, select_greedily(similarity, 5, 1, balance), 1, balance))
        return float(np.mean(shares))

    assert mean_excess() < 0.2
    cost = kernel_selection.selection_cost
    monkeypatch.setattr(kernel_selection, "selection_cost", lambda *arguments: -cost(*arguments))
    assert mean_excess() > 0.2  # the worst of the candidates


def test_control_a_greedy_search_that_looks_for_likeness_is_seen() -> None:
    similarity = random_similarity(16, 0)
    balance = equal_pairs(16, 9, 1)
    right = choice_by_hand(similarity, 9, 1, balance)
    assert set(select_greedily(similarity, 9, 1, balance)) == right
    assert set(select_greedily(-similarity, 9, 1, balance)) != right


@pytest.mark.parametrize(
    "weight",
    [np.zeros((4, 6, 3, 3)), np.ones((4, 6, 1, 1)), np.repeat(random_weight(4, 3), 2, axis=1)],
    ids=["zeros", "equal", "twins"],
)
@pytest.mark.parametrize("kept", range(1, 7))
def test_equal_kernels_still_give_full_sets(weight: Matrix, kept: int) -> None:
    chosen = select_kernel_groups(weight, np.array([0, 0, 1, 1]), kept)
    assert chosen.sum(axis=1).tolist() == [kept, kept]
    assert (select_kernel_groups(weight, np.array([0, 0, 1, 1]), kept) == chosen).all()


def test_of_equal_channels_the_lowest_stay() -> None:
    chosen = select_kernel_groups(np.zeros((2, 6, 3, 3)), np.array([0, 1]), 2)
    assert chosen[:, :2].all()


def test_large_kernels_stay() -> None:
    weight = random_weight(4, 8) * np.array([1, 9, 1, 1, 9, 1, 9, 1])[:, None, None]
    assert np.flatnonzero(select_kernel_groups(weight, np.zeros(4, dtype=np.intp), 3)[0]).tolist() == [1, 4, 6]


@pytest.mark.parametrize(
    "kept,options,message",
    [
        (0, {}, "cannot keep 0 of 6 channels"),
        (7, {}, "cannot keep 7 of 6 channels"),
        (3, {"cost_balancer": -1.0}, "cost_balancer is -1.0"),
        (3, {"cost_balancer": float("nan")}, "cost_balancer is nan"),
        (3, {"cost_balancer": "none"}, "cost_balancer is 'none'; it must be 'auto' or a number"),
        (3, {"eval_kept_ratio": 1.5}, "eval_kept_ratio is 1.5; it must be a share"),
    ],
)
def test_numbers_out_of_range_are_refused(kept: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        select_kernel_groups(random_weight(4, 6), random_labels(4, 2), kept, **options)


def test_scores_are_changes_of_magnitude() -> None:
    final, snapshot = np.zeros((2, 1, 1, 3)), np.zeros((2, 1, 1, 3))
    final[0, 0, 0], snapshot[0, 0, 0] = (1, -2, 3), (-1, 5, 0.5)  # a change of sign alone is none
    assert tmi_scores(final, snapshot).tolist() == [0 + 3 + 2.5, 0]


def test_evenness_by_hand() -> None:
    scores = np.array([1.0, 2, 3, 10, 0, 0])  # sums 3, 13, 0: gaps 10 and 3
    assert evenness(scores, np.array([0, 0, 1, 1, 2, 2])) == (6.5, 12.25)
    assert evenness(scores, np.zeros(6, dtype=np.intp)) == (0, 0)


def test_the_even_partition_is_chosen() -> None:
    scores = np.arange(8.0)
    even, uneven = np.array([0, 1, 2, 3, 3, 2, 1, 0]), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    half = np.array([0, 0, 1, 2, 3, 3, 2, 1])
    assert choose_scheme(scores, {"a": uneven, "b": even, "c": half}) == "b"
    assert choose_scheme(scores, {"a": half, "b": uneven}) == "b"  # its gaps are large, but all the same
    assert choose_scheme(scores, {"a": uneven, "b": even, "c": even[::-1]}) == "b"  # equal: the first
    assert choose_scheme(np.zeros(8), {"a": uneven, "b": even}) == "a"


def test_the_variance_of_gaps_counts_twice_as_much_as_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {0: (1.0, 3.0), 1: (3.0, 1.0), 2: (2.0, 2.0)}
    monkeypatch.setattr(tmi, "evenness", lambda _, labels: values[int(labels[0])])
    assert choose_scheme(np.zeros(1), {name: np.array([i]) for i, name in enumerate("abc")}) == "b"


@pytest.mark.parametrize(
    "winners,expected",
    [
        (["dbscan"], "dbscan"),
        (["spectral", "dbscan", "dbscan"], "dbscan"),
        (["dbscan", "spectral", "spectral", "dbscan"], "spectral"),  # a run of two
        (["spectral", "dbscan", "spectral", "dbscan"], "spectral"),  # no run: the first scheme
        (["dbscan", "kernel_pca"], "kernel_pca"),
        (["dbscan", "dbscan", "spectral", "kernel_pca", "spectral", "kernel_pca"], "dbscan"),
        (["kernel_pca"] * 3 + ["dbscan", "spectral"] * 4, "spectral"),  # the longest run of all is not asked for
    ],
)
def test_votes(winners: list[str], expected: str) -> None:
    assert vote(winners) == expected


@pytest.mark.usefixtures("short_tsne")
def test_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    for name, scheme in SCHEMES.items():

        def counted(weight: Matrix, groups: int, seed: int, name: str = name, scheme: Scheme = scheme) -> Labels:
            runs.append(name)
            return scheme(weight, groups, seed)

        monkeypatch.setitem(SCHEMES, name, counted)
    weight = random_weight(16, 12)
    snapshots = [random_weight(16, 12, seed=seed) for seed in range(1, 6)]
    clustering, choice = tmi_gkp(weight, snapshots, 4, 7)
    assert runs == list(SCHEMES)  # once each, however many snapshots
    assert choice.scheme == vote(choice.winners)
    assert sum(choice.votes.values()) == len(choice.winners) == 5
    labels = SCHEMES[choice.scheme](weight, 4, 0)
    groups = np.array(clustering.out_order).reshape(4, 4)
    assert {frozenset(group) for group in groups.tolist()} == {
        frozenset(np.flatnonzero(labels == group).tolist()) for group in range(4)
    }
    for group, kept in zip(groups, clustering.kept, strict=True):
        assert tuple(np.flatnonzero(select_kernel_groups(weight, labels, 7)[labels[group[0]]])) == kept
    assert tmi_gkp(weight, snapshots, 4, 7) == (clustering, choice)


@pytest.mark.usefixtures("short_tsne")
@pytest.mark.parametrize("filters,groups", [(6, 3), (12, 1), (8, 8), (10, 2)])
def test_odd_layers(filters: int, groups: int) -> None:
    for weight in (random_weight(filters, 5), np.zeros((filters, 5, 1, 1))):
        clustering, _ = tmi_gkp(weight, [weight * 0.5], groups, 3)
        assert GroupedKernels(clustering.out_order, clustering.kept, 5, 0.4).group_width == filters // groups


def test_what_is_missing_is_said() -> None:
    weight = random_weight(4, 3)
    with pytest.raises(PlanError, match=r"at least one earlier state of the layer; pass snapshots="):
        tmi_gkp(weight, [], 2, 2)
    with pytest.raises(PlanError, match=r"snapshot 1 has shape \(4, 2, 3, 3\), the weight \(4, 3, 3, 3\)"):
        tmi_gkp(weight, [weight, weight[:, :2]], 2, 2)
    with pytest.raises(PlanError, match="4 filters do not divide into 3 groups"):
        tmi_gkp(weight, [weight], 3, 2)


@pytest.fixture(scope="session")
def trained() -> Path:
    root = Path(os.environ.get("FXPRUNE_SHARED", Path(__file__).parents[3] / "shared"))
    if not (root / "weights").is_dir():
        pytest.skip("no trained weights; set FXPRUNE_SHARED to a folder that has them")
    return root / "weights" / "cifar10"


@pytest.mark.shared
@pytest.mark.slow
def test_resnet20_with_its_snapshots(trained: Path) -> None:
    final, *snapshots = (
        torch.load(trained / name, map_location="cpu", weights_only=True)
        for name in ("resnet20_choH_sd.pt", *(f"snapshots/epoch_{epoch}.pt" for epoch in range(35, 71, 5)))
    )
    layers = [key for key, value in final.items() if key.startswith("layer") and value.dim() == 4]
    assert len(layers) == 18
    start = time.perf_counter()
    winners = set()
    with threadpool_limits(1):
        for key in layers:
            weight, *earlier = (state[key].double().numpy() for state in (final, *snapshots))
            filters, channels = weight.shape[:2]
            clustering, choice = tmi_gkp(weight, earlier, 8, channels * 9 // 16)
            kernels = GroupedKernels(clustering.out_order, clustering.kept, channels, 7 / 16)
            assert (kernels.groups, kernels.group_width) == (8, filters // 8)
            assert {len(row) for row in clustering.kept} == {channels * 9 // 16}
            winners.add(choice.scheme)
    print(f"\nTMI-GKP, ResNet-20, 18 layers, 8 snapshots: {time.perf_counter() - start:.1f} s")
    assert winners == set(SCHEMES)  # each is the best of some layer, so the vote decides something
