"""Filter variety: nested kept sets, the bare criterion where nothing is redundant, one of each twin where some are."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from products_harness import examples
from torch.nn import functional

import fxprune.criteria.variety
from fxprune.criteria.variety import (
    RIDGE,
    VARIETIES,
    Array,
    Redundancy,
    Variety,
    bare_order,
    cosine_similarity,
    elimination_order,
    functional_similarity,
    nearest_similarity,
    redundancy,
    remap,
    vary,
)
from fxprune.errors import PlanError
from fxprune.methods import Labels, Matrix

PURE = VARIETIES["pairs-pure"]
RULES = (PURE, Variety("pairs", threshold=0.3), Variety("soft", beta=0.5), Variety("soft"))


def random_case(units: int, seed: int = 0) -> tuple[Matrix, Array]:
    """Similarity and scores of units with some resemblance: fewer features than units."""
    generator = np.random.default_rng(seed)
    kernels = generator.standard_normal((units, max(3, units // 2)))
    return cosine_similarity(kernels), generator.random(units) + 0.1


def pairs_by_definition(similarity: Matrix, scores: Array, threshold: float) -> list[int]:
    """Redundant-pair elimination in its simplest words, for distinct similarities and scores."""
    left, order = list(range(len(scores))), []
    while len(left) > 1:
        closest, a, b = max((similarity[a, b], a, b) for a, b in itertools.combinations(left, 2))
        if closest < threshold:
            break
        loser = a if scores[a] < scores[b] else b
        order.append(loser)
        left.remove(loser)
    return order + sorted(left, key=lambda unit: float(scores[unit]))


def uniqueness(similarity: Matrix, unit: int, left: list[int]) -> float:
    """`1 - R^2` of a ridge regression of `unit` on the others, within its bounds."""
    others = [other for other in left if other != unit]
    towards = similarity[unit, others]
    explained = towards @ np.linalg.solve(similarity[np.ix_(others, others)] + RIDGE * np.eye(len(others)), towards)
    return float(np.clip(1 + RIDGE - explained, RIDGE, 1))


def soft_by_definition(similarity: Matrix, scores: Array, beta: float) -> list[int]:
    """Every uniqueness from a regression of one unit on the others that are left, solved anew each time."""
    left, order = list(range(len(scores))), []
    while left:
        loser = min(left, key=lambda unit: float(scores[unit] * uniqueness(similarity, unit, left) ** beta))
        order.append(loser)
        left.remove(loser)
    return order


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("threshold", [None, 0.2, 0.6])
def test_pairs_are_eliminated_as_defined(threshold: float | None, seed: int) -> None:
    similarity, scores = random_case(24, seed)
    expected = pairs_by_definition(similarity, scores, -math.inf if threshold is None else threshold)
    assert elimination_order(similarity, scores, Variety("pairs", threshold)).tolist() == expected


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("beta", [0.25, 1.0, 2.0])
def test_uniqueness_is_one_minus_r_squared_after_every_removal(beta: float, seed: int) -> None:
    similarity, scores = random_case(24, seed)
    found = elimination_order(similarity, scores, Variety("soft", beta=beta))
    assert found.tolist() == soft_by_definition(similarity, scores, beta)


def test_control_a_uniqueness_that_is_never_updated_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(similarity: Matrix, scores: Array, beta: float) -> Labels:
        everything = list(range(len(scores)))
        first = np.array([uniqueness(similarity, unit, everything) for unit in everything])
        return np.argsort(scores * first**beta)

    monkeypatch.setattr(fxprune.criteria.variety, "_by_uniqueness", stale)
    similarity, scores = random_case(24)
    assert elimination_order(similarity, scores, Variety("soft")).tolist() != soft_by_definition(similarity, scores, 1)


@given(st.integers(1, 20), st.integers(0, 2**32), st.sampled_from(RULES), st.booleans())
@examples(60)
def test_the_highest_remapped_scores_are_the_last_to_go_for_every_number_kept(
    units: int, seed: int, variety: Variety, tied: bool
) -> None:
    similarity, scores = random_case(units, seed)
    if tied:
        scores = np.floor(3 * scores)  # many equal ones, and zeros
    order = elimination_order(similarity, scores, variety)
    remapped = remap(scores, order)
    assert np.argsort(remapped).tolist() == order.tolist()
    assert len(np.unique(remapped)) == units  # so no way of breaking ties matters
    np.testing.assert_allclose(np.sort(remapped), np.sort(scores), rtol=1e-14, atol=1e-300)
    if not tied:
        assert np.sort(remapped).tolist() == np.sort(scores).tolist()


def test_control_without_parting_equal_scores_the_kept_set_is_another() -> None:
    scores, order = np.ones(4), np.array([0, 3, 1, 2])
    naive = np.empty(4)
    naive[order] = np.sort(scores)
    assert set(np.argsort(-naive, kind="stable")[:2].tolist()) != {1, 2}
    assert set(np.argsort(-remap(scores, order), kind="stable")[:2].tolist()) == {1, 2}


@pytest.mark.parametrize("scores", [[0.0, -0.0, 0.0], [1e300, 1e300, 5e-324], [0.1, 0.1, math.nextafter(0.1, 1)]])
def test_remapped_scores_move_by_less_than_anything_counts(scores: list[float]) -> None:
    remapped = remap(np.array(scores), np.array([2, 1, 0]))
    assert remapped[2] < remapped[1] < remapped[0]
    np.testing.assert_allclose(np.sort(remapped), np.sort(scores), rtol=1e-15, atol=1e-320)


@pytest.mark.parametrize("variety", [Variety("pairs", threshold=math.inf), Variety("soft", beta=0.0)])
@pytest.mark.parametrize("seed", range(5))
def test_the_neutral_settings_are_the_bare_criterion(variety: Variety, seed: int) -> None:
    similarity, scores = random_case(24, seed)
    for case in (scores, np.floor(3 * scores)):
        order = elimination_order(similarity, case, variety)
        assert order.tolist() == bare_order(case).tolist()
        assert order[::-1].tolist() == np.argsort(-case, kind="stable").tolist()  # as the planner breaks ties
    remapped, report = vary(scores[None], 12, similarity[None], variety)
    assert remapped.tolist() == [scores.tolist()]
    assert report.moved == 0


@pytest.mark.parametrize("variety", [Variety("pairs"), Variety("soft")])
def test_where_nothing_is_redundant_every_rule_is_the_bare_criterion(variety: Variety) -> None:
    scores = np.random.default_rng(0).random(16)
    assert elimination_order(np.eye(16), scores, variety).tolist() == bare_order(scores).tolist()


@pytest.mark.parametrize("variety", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_units_does_not_matter(variety: Variety, seed: int) -> None:
    similarity, scores = random_case(24, seed)
    shuffle = np.random.default_rng(seed + 100).permutation(24)
    order = elimination_order(similarity, scores, variety)
    shuffled = elimination_order(similarity[np.ix_(shuffle, shuffle)], scores[shuffle], variety)
    assert shuffle[shuffled].tolist() == order.tolist()
    assert shuffled.tolist() != order.tolist()


@pytest.mark.parametrize("variety", [PURE, Variety("pairs", threshold=1.0), Variety("soft")])
def test_among_copies_the_score_decides_and_then_the_position(variety: Variety) -> None:
    generator = np.random.default_rng(0)
    base = generator.standard_normal((2, 5))
    for scale in itertools.permutations([0.1, 1.0, 7.0]):
        copies = np.concatenate([np.outer(scale, base[0]), 0.5 * base[1:]])  # cosines of 1 but for rounding
        order = elimination_order(cosine_similarity(copies), np.array([*scale, 0.5]), variety)
        assert order[:2].tolist() == np.argsort(scale)[:2].tolist()
    equal = elimination_order(np.ones((4, 4)), np.ones(4), variety)
    assert equal.tolist() == [3, 2, 1, 0]


def twins(seed: int) -> tuple[Array, Labels]:
    """32 kernels and their directions: 8 strong ones with three noisy copies of each, and 8 weak ones on their own."""
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((16, 64)) / 8
    which = np.concatenate([np.repeat(np.arange(8), 3), np.arange(8, 16)])
    kernels = directions[which] + 0.1 / 8 * generator.standard_normal((32, 64))
    kernels[which >= 8] *= 0.3
    shuffle = generator.permutation(32)
    return kernels[shuffle], which[shuffle]


@pytest.mark.parametrize("variety", [PURE, Variety("pairs", threshold=0.5), Variety("pairs"), Variety("soft")])
@pytest.mark.parametrize("seed", range(5))
def test_twins_go_and_rare_kernels_stay(variety: Variety, seed: int) -> None:
    kernels, which = twins(seed)
    scores = np.square(kernels).sum(axis=1)
    remapped, report = vary(scores[None], 16, cosine_similarity(kernels)[None], variety)
    bare = np.argsort(-scores)[:16]
    kept = np.argsort(-remapped[0])[:16]
    assert set(which[bare].tolist()) <= set(range(8))  # the bare criterion keeps twins only
    assert len(set(which[kept].tolist())) == 16
    assert report.share == 24 / 32
    assert report.before > 0.7
    assert report.after < 0.5
    assert report.moved == len(set(kept.tolist()) - set(bare.tolist())) >= 8


def test_dead_units_go_first_although_they_resemble_none() -> None:
    similarity, scores = random_case(12)
    dead = [3, 7]
    similarity[dead] = similarity[:, dead] = 0
    similarity[dead, dead] = 1
    scores[dead] = 1e-9
    assert not set(dead) & set(elimination_order(similarity, scores, PURE)[:6].tolist())  # what the rule is for
    scores[dead] = 0
    for variety in RULES:
        assert elimination_order(similarity, scores, variety)[:2].tolist() == [7, 3]
    assert elimination_order(np.eye(3), np.zeros(3), PURE).tolist() == [2, 1, 0]


def test_rows_are_treated_one_by_one_and_filters_are_a_row_of_their_own() -> None:
    cases = [random_case(10, seed) for seed in range(3)]
    similarity, scores = (np.stack(part) for part in zip(*cases, strict=True))
    together, report = vary(scores, 4, similarity, PURE)
    alone = [vary(row[None], 4, one[None], PURE) for one, row in cases]
    assert together.tolist() == [remapped[0].tolist() for remapped, _ in alone]
    assert report.moved == sum(part.moved for _, part in alone) > 0
    assert report.after == pytest.approx(np.mean([part.after for _, part in alone]))


def test_the_report_in_numbers() -> None:
    similarity = np.eye(4)
    similarity[0, 1] = similarity[1, 0] = 0.9
    similarity[2, 3] = similarity[3, 2] = 0.1
    scores = np.array([[4.0, 3.0, 2.0, 1.0]])
    remapped, report = vary(scores, 2, similarity[None], PURE)
    assert remapped.tolist() == [[4.0, 1.0, 3.0, 2.0]]
    assert report == Redundancy(share=0.5, before=0.5, after=0.0, moved=1)
    assert vary(scores, 4, similarity[None], PURE)[1] == Redundancy(share=0.5, before=0.5, after=0.5, moved=0)
    assert vary(scores, 1, similarity[None], PURE)[1] == Redundancy(share=0.5, before=0.5, after=0.0, moved=0)
    assert vary(scores, 2, similarity[None], Variety("soft", threshold=0.1))[1].share == 1.0
    assert redundancy(similarity, 0.9) == 0.5
    assert redundancy(similarity, 0.91) == 0.0
    assert nearest_similarity(similarity).tolist() == [0.9, 0.9, 0.1, 0.1]


def test_sizes_that_do_not_fit_are_refused() -> None:
    similarity, scores = random_case(6)
    for kept in (0, 7):
        with pytest.raises(PlanError, match=f"to keep {kept} units"):
            vary(scores[None], kept, similarity[None], PURE)
    with pytest.raises(PlanError, match=r"\(1, 6\) and similarity \(1, 5, 5\)"):
        vary(scores[None], 2, similarity[None, :5, :5], PURE)
    with pytest.raises(PlanError, match="needs a gram of 12 x 12 input taps"):
        functional_similarity(np.ones((2, 3, 2, 2)), np.eye(11))


def test_cosine_of_weights() -> None:
    kernels = np.random.default_rng(0).standard_normal((3, 5, 7))
    found = cosine_similarity(kernels)
    for row, one in zip(kernels, found, strict=True):
        unit = row / np.linalg.norm(row, axis=1, keepdims=True)
        np.testing.assert_allclose(one, unit @ unit.T, atol=1e-12)
    assert (found == found.swapaxes(1, 2)).all()
    assert (np.abs(found) <= 1).all()


def contributions(weight: Array, input: torch.Tensor) -> tuple[Matrix, Matrix]:
    """What each channel adds to the output of a convolution `(C, everything)`, and the patches `(taps, positions)`."""
    height, width = weight.shape[2:]
    parts = [functional.conv2d(input[:, [c]], torch.from_numpy(weight[:, [c]])) for c in range(weight.shape[1])]
    patches = functional.unfold(input, (height, width)).transpose(0, 1).flatten(1)
    return torch.stack(parts).flatten(1).numpy(), patches.numpy()


def correlated_input(channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, channels, 9, 8, generator=generator, dtype=torch.float64) + 0.3
    return torch.einsum("dc,nchw->ndhw", mix, noise)


def test_functional_similarity_is_the_correlation_of_the_contributions() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 6, 3, 2))
    parts, patches = contributions(weight, correlated_input(6))
    norms = np.linalg.norm(parts, axis=1)
    expected = parts @ parts.T / np.outer(norms, norms)
    np.testing.assert_allclose(functional_similarity(weight, patches @ patches.T), expected, atol=1e-10)
    assert np.abs(expected - np.eye(6)).max() > 0.2
    taps_outermost = patches.reshape(6, 6, -1).swapaxes(0, 1).reshape(36, -1)  # control: the other order of the taps
    assert np.abs(functional_similarity(weight, taps_outermost @ taps_outermost.T) - expected).max() > 0.1


def test_functional_similarity_with_a_covariance_is_centred() -> None:
    weight = np.random.default_rng(0).standard_normal((1, 6, 3, 2))
    parts, patches = contributions(weight, correlated_input(6))
    np.testing.assert_allclose(functional_similarity(weight, np.cov(patches)), np.corrcoef(parts), atol=1e-10)


def test_units_that_do_nothing_are_like_no_other() -> None:
    weight = np.random.default_rng(0).standard_normal((2, 4, 3, 3))
    weight[:, 1] = 0
    gram = np.eye(36)
    gram[27:] = 0  # channel 3 is never active
    for found, silent in (
        (functional_similarity(weight, gram), [1, 3]),
        (cosine_similarity(weight.swapaxes(0, 1).reshape(4, -1)), [1]),
    ):
        for unit in silent:
            assert found[unit].tolist() == np.eye(4)[unit].tolist()
            assert found[:, unit].tolist() == np.eye(4)[unit].tolist()


def test_equal_kernels_on_independent_channels_are_not_redundant() -> None:
    weight = np.ones((2, 3, 1, 1))
    assert redundancy(functional_similarity(weight, np.eye(3)), 0.7) == 0
    assert redundancy(cosine_similarity(weight.swapaxes(0, 1).reshape(3, -1)), 0.7) == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rule": "clusters"}, "rule is 'clusters'; it must be 'pairs' or 'soft'"),
        ({"rule": []}, r"rule is \[\]"),
        ({"similarity": "cos"}, "similarity is 'cos'; it must be 'cosine' or 'functional' or 'auto'"),
        ({"threshold": math.nan}, "threshold is nan; it must be a similarity such as 0.7, or None"),
        ({"threshold": "0.7"}, "threshold is '0.7'"),
        ({"threshold": True}, "threshold is True"),
        ({"beta": -1.0}, "beta is -1.0; it must be a finite number, 0 or more"),
        ({"beta": math.inf}, "beta is inf"),
        ({"beta": None}, "beta is None"),
    ],
)
def test_fields_are_checked(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=f"variety: {message}"):
        Variety(**wrong)  # type: ignore[arg-type]


def test_what_a_user_may_pass() -> None:
    assert Variety.parse(None) is None
    assert Variety.parse("pairs") == Variety("pairs", threshold=0.7)
    assert Variety.parse("pairs-pure") == Variety("pairs", threshold=None)
    assert Variety.parse("soft") == Variety("soft")
    own = Variety("soft", beta=0.25)
    assert Variety.parse(own) is own
    with pytest.raises(PlanError, match=r"'pair' \(near: 'pairs'.*must be None, 'pairs', 'pairs-pure', 'soft', or a"):
        Variety.parse("pair")
    for wrong in (True, 0.7, ["pairs"], Variety):
        with pytest.raises(PlanError, match="variety is"):
            Variety.parse(wrong)


def test_the_similarity_follows_the_calibration() -> None:
    assert Variety().similarity_for(calibrated=True) == "functional"
    assert Variety().similarity_for(calibrated=False) == "cosine"
    assert Variety(similarity="cosine").similarity_for(calibrated=True) == "cosine"
    with pytest.raises(PlanError, match=r"needs the covariance of the inputs; pass calibration=, or use similarity="):
        Variety(similarity="functional").similarity_for(calibrated=False)


def test_the_name_of_release_0_1_stays() -> None:
    import fxprune.variety

    assert fxprune.variety.Variety is Variety
    assert fxprune.variety.VARIETIES is VARIETIES
