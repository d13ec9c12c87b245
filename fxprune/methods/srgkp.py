"""SR-GKP: filters dealt to groups by smoothness, input channels chosen by a beam search.

Zhong et al., "One Less Reason for Filter Pruning: Gaining Free Adversarial Robustness with Structured Grouped Kernel
Pruning", NeurIPS 2023. It needs neither snapshots nor clustering. Steps and constants were read from the authors'
published code and its settings for ResNet-20; objective and similarity are those of `kernel_selection` with `m = 1`.
The result is in overlap form.
"""

import itertools
import math
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fxprune.errors import PlanError
from fxprune.methods.clustering import Clustering, Labels, Mask, Matrix
from fxprune.methods.kernel_selection import equal_pairs, select_greedily, selection_cost, similarity
from fxprune.plans.fields import check_divisible

Number = TypeVar("Number", np.float64, np.intp)

BEAM_WIDTH = 2
# Every so many steps the beam is cut back to its width, by this share of the rank by cost and the rest by roughness.
STEPS_BETWEEN_CUTS = 3
COST_SHARE = 0.9
# Costs of one set summed in another order differ by rounding; below this share of the largest they count as equal.
ROUNDING = 1e-12


def srgkp(weight: Matrix, groups: int, kept: int) -> Clustering:
    """Group the filters of a layer by smoothness and choose the channels of each group by beam search.

    Filters in ascending order of roughness, the sum of `roughness` over their kernels, are dealt to the groups in snake
    order: `0..n-1`, `n-1..0`, and so on. Kernels of one entry have no neighbours; such layers go, as published, by the
    sum of the weights, the largest first, and by the greedy search of TMI-GKP. The published code takes kernels of 3x3
    and 1x1 only; here all others are treated like 3x3.

    Args:
        weight: `(O, C, *kernel)`, finite.
        groups: `n`, a divisor of `O`.
        kept: `k`, input channels of each group, `1..C`; for the published count see `select_kernel_groups`.

    Time on one core: 0.7 s for all of a ResNet-20; 36 s for one layer of 512x512x3x3, 8 groups, 288 kept.

    Raises:
        PlanError: `groups` does not divide `O`, or `kept` is out of range.
    """
    filters, channels = weight.shape[:2]
    check_divisible(filters, groups)
    if not 1 <= kept <= channels:
        raise PlanError(f"a group cannot keep {kept} of {channels} channels; use 1 to {channels}")
    single = math.prod(weight.shape[2:]) == 1
    rough = roughness(weight)
    labels = deal_in_snake_order(
        -weight.sum(axis=tuple(range(1, weight.ndim))) if single else rough.sum(axis=1), groups
    )
    chosen = np.zeros((groups, channels), dtype=np.bool_)
    for group, row in enumerate(chosen):
        members = labels == group
        similar = similarity(weight[members])
        if single:
            row[select_greedily(similar, kept, 1, equal_pairs(channels, kept, 1))] = True
        else:
            row[select_by_beam(similar, rough[members].sum(axis=0), kept)] = True
    return Clustering.from_labels(labels, chosen)


def roughness(weight: Matrix) -> Matrix:
    """`|a^2 - b^2|` summed over each entry `a` of a kernel and each of its neighbours `b`, up to 8 in a kernel of two
    dimensions: `(O, C)`.

    Args:
        weight: `(O, C, *kernel)`.
    """
    square, dims = weight**2, weight.ndim - 2
    total = np.zeros(weight.shape[:2])
    for step in itertools.product((0, 1, -1), repeat=dims):
        if next((s for s in step if s), -1) > 0:  # of a step and its reverse the one that goes ahead first
            ahead = tuple(slice(max(s, 0), min(s, 0) or None) for s in step)
            behind = tuple(slice(max(-s, 0), min(-s, 0) or None) for s in step)
            total += np.abs(square[..., *ahead] - square[..., *behind]).sum(axis=tuple(range(2, weight.ndim)))
    result: Matrix = 2 * total  # both ways
    return result


def deal_in_snake_order(scores: Matrix, groups: int) -> Labels:
    """Deal items, the smallest score first, to groups `0..n-1`, `n-1..0`, `0..n-1`, ...; equal scores by index.

    Args:
        scores: `(O,)`.
        groups: `n`, a divisor of `O`.

    Returns:
        the group of each item `(O,)`.
    """
    snake = np.arange(len(scores)).reshape(-1, groups) % groups
    snake[1::2] = snake[1::2, ::-1]
    labels = np.empty(len(scores), dtype=np.intp)
    labels[np.argsort(scores, kind="stable")] = snake.ravel()
    return labels


class Beam(NamedTuple):
    """Sets of channels that grow together: `B` of them from each of `C` starts.

    Args:
        member: `(C, B, C)` the channels of each set.
        score: `(C, B, C)` summed similarity of each channel to the set; infinite for its members.
        closest: `(C, B, C)` largest similarity of each channel to one of the set.
        pairs: `(C, B)` summed similarity of the pairs in the set.
    """

    member: Mask
    score: Matrix
    closest: Matrix
    pairs: Matrix


def select_by_beam(similarity: Matrix, rough: Matrix, kept: int) -> Labels:
    """Grow sets from every channel by beam search; keep the set of smallest cost.

    A step replaces each set of the beam by two, grown by the two channels least similar to it. Every third step the
    beam is ranked by cost and by roughness of its sets and cut to two; after the last step it is not. One set may stand
    twice in a beam, reached in another order, as in the published code.

    Of the sets of all starts cost alone decides, so roughness, with its share of 0.1 and that at cuts only, hardly
    matters: turned round it changed none of the 144 groups of a trained ResNet-20 (`C` 16 to 64, 9/16 kept).

    `balance` is fixed at its value for the first sets that are ranked, those of 4 channels (or of `kept`, if fewer):
    so does the published code, which replaces `"auto"` by the first value it computes. It is far below the value that
    suits `kept`, and the choice depends on it.

    Args:
        similarity: `(C, C)` symmetric, at most 1, with 1 on the diagonal.
        rough: `(C,)` roughness of each channel's kernels.
        kept: `k`, `1..C`.

    Returns:
        the channels kept `(k,)`, ascending.
    """
    channels = len(similarity)
    balance = equal_pairs(channels, min(kept, STEPS_BETWEEN_CUTS + 1), 1)
    single: Mask = np.eye(channels, dtype=np.bool_)[:, None]
    similar = similarity[:, None]
    beam = Beam(single, np.where(single, np.inf, similar), similar, np.zeros((channels, 1)))
    for step in range(1, kept):
        parents, added, pairs = _branches(beam, min(BEAM_WIDTH, channels - step))
        if step % STEPS_BETWEEN_CUTS == 0:
            closest = np.maximum(beam.closest[:, parents], similarity[added])
            # to the channels outside only: each of those inside is closest to itself, by 1
            cost = pairs - balance * (closest.sum(axis=2) - (step + 1))
            survivors = _cut(cost, (beam.member @ rough)[:, parents] + rough[added])
        else:
            survivors = np.broadcast_to(np.arange(len(parents)), added.shape)
        beam = _grow(beam, similarity, parents[survivors], _pick(added, survivors), _pick(pairs, survivors))
    sets = dict.fromkeys(tuple(np.flatnonzero(row).tolist()) for row in beam.member.reshape(-1, channels))
    costs = np.array([selection_cost(similarity, np.array(candidate), 1, balance) for candidate in sets])
    return np.array(list(sets)[int(_settle(costs).argmin())])


def _branches(beam: Beam, width: int) -> tuple[Labels, Labels, Matrix]:
    """The ways to grow: from each set in turn by its `width` least similar channels, the least similar first.

    Returns:
        the set that each way grows from `(B * width,)`; the channel that it adds and the `pairs` of the result, both
        `(C, B * width)`.
    """
    score = beam.score.copy()
    added: list[Labels] = []
    for _ in range(width):
        added.append(score.argmin(axis=2))
        np.put_along_axis(score, added[-1][..., None], np.inf, axis=2)
    channels = np.stack(added, axis=2)  # (C, B, width)
    pairs = beam.pairs[..., None] + np.take_along_axis(beam.score, channels, axis=2)
    parents = np.repeat(np.arange(beam.pairs.shape[1]), width)
    return parents, channels.reshape(len(score), -1), pairs.reshape(len(score), -1)


def _grow(beam: Beam, similarity: Matrix, parents: Labels, added: Labels, pairs: Matrix) -> Beam:
    """New sets, each of a set of the same start and one more channel; all but the first two are `(C, sets)`."""
    starts = np.arange(len(similarity))[:, None]
    member, score = beam.member[starts, parents], beam.score[starts, parents]
    score += similarity[added]
    np.put_along_axis(member, added[..., None], True, axis=2)
    np.put_along_axis(score, added[..., None], np.inf, axis=2)
    return Beam(member, score, np.maximum(beam.closest[starts, parents], similarity[added]), pairs)


def _cut(cost: Matrix, rough: Matrix) -> Labels:
    """The sets of each start with the best mixed rank, `(C, BEAM_WIDTH)`; both arguments are `(C, sets)`.

    Ranks and the order of ties follow the published code: the rank of a set is the number of those before it in
    descending order, and high ranks win.
    """
    by_cost = _descending(_settle(cost))
    by_rough = _pick(by_cost, _descending(_pick(_settle(rough), by_cost)))
    cost_rank = _pick(np.argsort(by_cost, axis=1), by_rough)
    mixed = COST_SHARE * cost_rank + (1 - COST_SHARE) * np.arange(cost.shape[1])
    return _pick(by_rough, _descending(mixed))[:, :BEAM_WIDTH]


def _pick(values: npt.NDArray[Number], columns: Labels) -> npt.NDArray[Number]:
    return np.take_along_axis(values, columns, axis=1)


def _descending(values: Matrix) -> Labels:
    return np.argsort(-values, axis=1, kind="stable")


def _settle(values: Matrix) -> Matrix:
    """Round away differences that come from the order of summation only."""
    quantum = ROUNDING * max(float(np.abs(values).max()), np.finfo(np.float64).tiny / ROUNDING)
    result: Matrix = np.round(values / quantum)
    return result
