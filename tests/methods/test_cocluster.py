"""Co-clustering: exact half-steps, a sum that never falls, one result for one seed."""

import importlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from products_harness import examples
from scipy.optimize import linear_sum_assignment

from fxprune.errors import PlanError
from fxprune.methods import Clustering, Labels, Matrix, cocluster
from fxprune.methods.cocluster import alternate, assign_balanced
from fxprune.plans import Form, GroupedKernels


def random_importance(filters: int, channels: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((filters, channels)) ** 2


def kept_importance(importance: Matrix, result: Clustering) -> float:
    kernels = GroupedKernels(result.out_order, result.kept, importance.shape[1], 0.5)
    return float(importance[kernels.mask().numpy()].sum())


def balanced_labels(rows: int, columns: int) -> list[Labels]:
    """All balanced assignments of a few rows."""
    ranks = np.arange(rows) * columns // rows
    return [np.array(labels) for labels in sorted(set(itertools.permutations(ranks.tolist())))]


def best_by_brute_force(importance: Matrix, groups: int, kept: int, form: Form) -> float:
    """The largest kept importance over all balanced groupings, each with its best channels."""
    filters, channels = importance.shape
    best = 0.0
    for labels in balanced_labels(filters, groups):
        totals = np.stack([importance[labels == group].sum(axis=0) for group in range(groups)])
        if form == "overlap":
            best = max(best, float(np.sort(totals, axis=1)[:, -kept:].sum()))
        else:
            dealt = balanced_labels(channels, groups)
            best = max(best, max(float(totals[deal, np.arange(channels)].sum()) for deal in dealt))
    return best


def falls(history: list[float]) -> bool:
    return any(after < before * (1 - 1e-12) for before, after in itertools.pairwise(history))


@pytest.mark.parametrize("rows, columns", [(4, 1), (4, 2), (4, 4), (6, 2), (6, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_exact_against_brute_force(rows: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    score = generator.integers(0, 5, (rows, columns)).astype(float)  # small integers: many ties
    start = generator.permutation(np.arange(rows) * columns // rows)
    found = assign_balanced(score, start)
    best = max(float(score[np.arange(rows), labels].sum()) for labels in balanced_labels(rows, columns))
    assert score[np.arange(rows), found].sum() == best
    assert np.bincount(found).tolist() == [rows // columns] * columns


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 2**32), st.sampled_from([1.0, 1e-9, 1e12]))
@examples(60)
def test_assignment_is_exact_against_the_hungarian_algorithm(width: int, columns: int, seed: int, scale: float) -> None:
    rows = width * columns
    generator = np.random.default_rng(seed)
    score = scale * (generator.random((rows, 1)) + 0.1 * generator.random((rows, columns)))
    start = generator.permutation(np.arange(rows) * columns // rows)
    found = assign_balanced(score, start)
    slots = np.repeat(score, width, axis=1)
    best = slots[linear_sum_assignment(slots, maximize=True)].sum()
    assert score[np.arange(rows), found].sum() == pytest.approx(best, rel=1e-12)
    assert np.bincount(found).tolist() == [width] * columns


def test_assignment_needs_cycles_of_three() -> None:
    # From the identity no swap of two rows gains, but the rotation 0 -> 1 -> 2 -> 0 does.
    score = np.array([[0.0, 2.0, -9.0], [-9.0, 0.0, 2.0], [2.0, -9.0, 0.0]])
    assert assign_balanced(score, np.arange(3)).tolist() == [1, 2, 0]


def test_assignment_keeps_its_start_where_nothing_gains() -> None:
    start = np.array([1, 0, 2, 0, 1, 2])
    assert assign_balanced(np.zeros((6, 3)), start).tolist() == start.tolist()


@pytest.mark.parametrize("form", ["overlap", "partition"])
@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_kept_importance_never_falls(groups: int, form: Form, seed: int) -> None:
    importance = random_importance(24, 36, seed)
    start = np.random.default_rng(seed).permutation(np.arange(24) * groups // 24)
    _, _, history = alternate(importance, start, 36 // groups, form)
    assert len(history) > 2
    assert not falls(history)


def test_a_broken_half_step_is_seen_to_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fxprune.methods.cocluster")  # the function hides the module of its name
    monkeypatch.setattr(module, "assign_balanced", lambda score, labels: np.roll(labels, 1))
    _, _, history = alternate(random_importance(24, 36), np.arange(24) * 3 // 24, 12, "overlap")
    assert falls(history)


@pytest.mark.parametrize("form", ["overlap", "partition"])
@pytest.mark.parametrize("filters, channels, groups", [(4, 4, 2), (6, 4, 2), (6, 6, 3)])
def test_many_starts_reach_the_optimum_of_tiny_cases(filters: int, channels: int, groups: int, form: Form) -> None:
    importance = random_importance(filters, channels, seed=filters + groups)
    result = cocluster(importance, groups, channels // groups, form, restarts=60)
    best = best_by_brute_force(importance, groups, channels // groups, form)
    assert result.history[-1] == pytest.approx(best, rel=1e-12)
    assert kept_importance(importance, result) == pytest.approx(best, rel=1e-12)


def test_brute_force_tells_a_poor_grouping_from_the_best() -> None:
    importance = random_importance(6, 4)
    poor = min(alternate(importance, labels, 2, "overlap")[2][0] for labels in balanced_labels(6, 2))
    assert poor < 0.99 * best_by_brute_force(importance, 2, 2, "overlap")


@pytest.mark.parametrize("form", ["overlap", "partition"])
def test_planted_blocks_are_found(form: Form) -> None:
    generator = np.random.default_rng(5)
    blocks = generator.permutation(np.arange(32) % 4)[:, None] == generator.permutation(np.arange(48) % 4)
    importance = blocks + 0.2 * generator.random((32, 48))
    result = cocluster(importance, 4, 12, form)
    assert kept_importance(importance, result) == pytest.approx(float(importance[blocks].sum()))


@pytest.mark.parametrize("form", ["overlap", "partition"])
def test_history_ends_with_the_importance_of_the_result(form: Form) -> None:
    importance = random_importance(24, 24)
    result = cocluster(importance, 4, 6, form)
    assert kept_importance(importance, result) == pytest.approx(result.history[-1], rel=1e-12)
    assert GroupedKernels(result.out_order, result.kept, 24, 0.75).form == form


def test_a_grouping_has_one_representation() -> None:
    result = cocluster(random_importance(24, 24), 4, 10)
    groups = np.array(result.out_order).reshape(4, 6)
    assert (np.diff(groups, axis=1) > 0).all()
    assert (np.diff(groups[:, 0]) > 0).all()


def test_a_seed_gives_one_result_and_global_random_state_is_not_used() -> None:
    importance = random_importance(32, 32)
    np.random.seed(1)
    first = cocluster(importance, 2, 16, "partition", seed=3)
    after_first = np.random.random()
    np.random.seed(1)
    assert np.random.random() == after_first
    assert cocluster(importance, 2, 16, "partition", seed=3) == first
    assert any(cocluster(importance, 2, 16, "partition", seed=seed) != first for seed in range(6))


def test_more_starts_are_never_worse() -> None:
    importance = random_importance(32, 32)
    few, many = (cocluster(importance, 4, 16, restarts=restarts).history[-1] for restarts in (0, 12))
    assert many >= few


@pytest.mark.parametrize("form", ["overlap", "partition"])
def test_a_dead_layer_still_gets_a_valid_grouping(form: Form) -> None:
    result = cocluster(np.zeros((16, 16)), 2, 8, form)
    assert GroupedKernels(result.out_order, result.kept, 16, 0.5).group_width == 8


def test_one_group_keeps_the_heaviest_channels() -> None:
    importance = random_importance(6, 5)
    result = cocluster(importance, 1, 2)
    assert result.kept == (tuple(sorted(np.argsort(importance.sum(axis=0))[-2:].tolist())),)


@pytest.mark.parametrize(
    "groups, kept, form, message",
    [
        (5, 2, "overlap", "16 filters do not divide into 5 groups"),
        (4, 0, "overlap", "4 groups cannot keep 0 of 12 channels each in overlap form"),
        (4, 13, "overlap", "4 groups cannot keep 13 of 12 channels"),
        (4, 4, "partition", "4 groups cannot keep 4 of 12 channels each in partition form"),
    ],
)
def test_impossible_sizes_are_refused(groups: int, kept: int, form: Form, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        cocluster(random_importance(16, 12), groups, kept, form)
