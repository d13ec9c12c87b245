"""Filter variety: let a criterion choose only among units that resemble one another, so that rare ones stay.

A unit is a kernel group `(g, c)` of one filter group `g`; a row of scores is a filter group. One row whose units are
the filters of a layer works the same. Scores come from any criterion; variety reorders them and changes nothing else.

What is published and what is not. The idea is that of Hubens, Mancas, Gosselin, Preda, Zaharia, "Improve Convolutional
Neural Network Pruning by Maximizing Filter Variety", ICIAP 2022 (arXiv 2203.05807). What we could read of it, the
abstract, fixes the contract: a selection step that can be appended to any criterion, at unchanged sparsity, and makes
it choose among redundant filters and retain the rare ones. It does not give the rule, and no code was released. **The
rules here are our reconstruction**, not the authors' algorithm; nothing measured with them speaks for or against the
paper.

What was measured. Where a layer has real twins, all rules keep one of each and the bare criterion does not. A narrow
net has few: ResNet-20 on CIFAR-10, 8 groups, ratio 0.4375, relative error of the group outputs, with l2 alone .157,
soft .160 (functional similarity), pairs (cosine) from 0.7 up .181, from 0.5 up .228, all pairs .290; accuracy without
fine-tuning (800 images, dense 79.6 %) 51.4 % with l2 alone, 50.0 % soft, 23.9 % all pairs: strong units go because
they are not the oddest. Variety is therefore an option, off by default, and `"pairs"` means the form with a threshold.
Whole filters, refitted and fine-tuned for a short epoch (docs/comparison.md): all pairs cost 2.3 points on ResNet-56 at
57 % of the MACs, and 0.7 points on a VGG-16 at 40 %. Trained to the end, where the paper's claim
lives, nothing is measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve

from fxprune.errors import PlanError, near_matches
from fxprune.methods.clustering import Labels, Matrix

Array = npt.NDArray[np.float64]

# Two units this similar are called redundant where nobody says otherwise. At 0.5 the pair rule already hurts a net
# with little redundancy, at 0.7 much less (module docstring).
THRESHOLD = 0.7
# Similarities that differ by less, and values of uniqueness relative to one another, are equal: those of copies of one
# kernel differ by rounding (up to 5e-10, the machine epsilon times the condition that `RIDGE` allows), and the order
# among copies must not hang on it.
NOISE = 1e-9
# Added to the diagonal of the similarity so that it has an inverse; also the least uniqueness of a unit. A copy of
# another unit has uniqueness 0.002 instead of 0, so that among copies the score still decides.
RIDGE = 1e-3


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


@dataclass(frozen=True)
class Variety:
    """How a criterion is made to keep rare units. See the module docstring for what is published and what is ours.

    Args:
        rule: `"pairs"`: of the two most similar units that are left, the one with the lower score goes; again and
            again. `"soft"`: the unit goes whose `score * uniqueness ** beta` is lowest; uniqueness `1 - R^2` is the
            share of a unit that the others that are left do not explain linearly.
        threshold: `"pairs"` stops at pairs less similar than this, and the bare criterion finishes: `inf` is the bare
            criterion, `None` never stops (hurts narrow nets). In both rules it defines the redundancy reported.
        beta: of `"soft"`, 0 or more: how much uniqueness counts; 0 is the bare criterion. At 1 a score that is an
            energy (l2, activation) becomes the energy that the other units cannot stand in for; norms (l1) want 0.5.
        similarity: `"cosine"` of the weights; `"functional"`: correlation of what the units contribute to the output,
            needs calibration data; `"auto"`: functional if there is calibration data. Kernels of one group read
            different input channels, so equal weights need not be redundant: functional is the right notion for
            kernel groups, cosine a stand-in. (Whole filters read the same input; there the cosine is meaningful.)

    Raises:
        PlanError: a field has no legal value.
    """

    rule: Literal["pairs", "soft"] = "pairs"
    threshold: float | None = THRESHOLD
    beta: float = 1.0
    similarity: Literal["cosine", "functional", "auto"] = "auto"

    def __post_init__(self) -> None:
        """Check the rules above."""
        for field, legal in (("rule", ("pairs", "soft")), ("similarity", ("cosine", "functional", "auto"))):
            if getattr(self, field) not in legal:
                names = " or ".join(map(repr, legal))
                raise PlanError(f"variety: {field} is {getattr(self, field)!r}; it must be {names}")
        if self.threshold is not None and not _is_number(self.threshold):
            raise PlanError(f"variety: threshold is {self.threshold!r}; it must be a similarity such as 0.7, or None")
        if not _is_number(self.beta) or not 0 <= self.beta < math.inf:
            raise PlanError(f"variety: beta is {self.beta!r}; it must be a finite number, 0 or more")

    @classmethod
    def parse(cls, value: object) -> "Variety | None":
        """Read what a user passes as `variety=`: None, a `Variety`, or one of the names in `VARIETIES`.

        Raises:
            PlanError: it is none of these; the message lists the names.
        """
        if value is None or isinstance(value, Variety):
            return value
        if isinstance(value, str) and value in VARIETIES:
            return VARIETIES[value]
        near = near_matches(value, VARIETIES) if isinstance(value, str) else ""
        names = ", ".join(map(repr, VARIETIES))
        raise PlanError(f"variety is {value!r}{near}; it must be None, {names}, or a Variety")

    def similarity_for(self, calibrated: bool) -> Literal["cosine", "functional"]:
        """The similarity to use, given whether there is calibration data.

        Raises:
            PlanError: it is `"functional"` and there is none.
        """
        if self.similarity == "auto":
            return "functional" if calibrated else "cosine"
        if self.similarity == "functional" and not calibrated:
            raise PlanError(
                "variety: similarity 'functional' needs the covariance of the inputs; pass calibration=, or use "
                "similarity='cosine'"
            )
        return self.similarity


VARIETIES: Mapping[str, Variety] = MappingProxyType(
    {
        "pairs": Variety("pairs"),
        "pairs-pure": Variety("pairs", threshold=None),
        "soft": Variety("soft"),
    }
)
"""Varieties by name: pairs while they are at least `THRESHOLD` similar, pairs to the end, uniqueness."""


@dataclass(frozen=True)
class Redundancy:
    """How alike the units of a layer are, and what variety did about it.

    Attributes:
        share: share of the units whose nearest neighbour is at least as similar as the threshold. Near 0, variety has
            nothing to do.
        before: mean similarity of a unit to its nearest neighbour, over all units.
        after: the same over the kept units among themselves; 0 where a row keeps one.
        moved: kept units, over all rows, that the bare criterion would not have kept.
    """

    share: float
    before: float
    after: float
    moved: int


def vary(scores: Matrix, kept: int, similarity: Array, variety: Variety) -> tuple[Matrix, Redundancy]:
    """Reorder the scores of each row so that the `k` highest, for every `k`, are those that variety keeps.

    Args:
        scores: `(n, C)` non-negative, high means keep. Of equal ones the first counts as higher.
        kept: `k`, `1..C`, for the report only.
        similarity: `(n, C, C)`, symmetric, 1 on the diagonal, positive semi-definite.
        variety: the rule.

    Returns:
        scores `(n, C)`, in each row the same values (see `remap`), and the report.

    Raises:
        PlanError: the sizes do not fit.
    """
    rows, units = scores.shape
    if similarity.shape != (rows, units, units) or not 1 <= kept <= units:
        raise PlanError(f"scores {scores.shape} and similarity {similarity.shape} do not allow to keep {kept} units")
    orders = [elimination_order(one, row, variety) for one, row in zip(similarity, scores, strict=True)]
    remapped = np.stack([remap(row, order) for row, order in zip(scores, orders, strict=True)])
    chosen = np.stack([np.sort(order[units - kept :]) for order in orders])
    bare = [bare_order(row)[units - kept :] for row in scores]
    nearest = nearest_similarity(similarity)
    among_kept = np.stack([one[np.ix_(keep, keep)] for one, keep in zip(similarity, chosen, strict=True)])
    return remapped, Redundancy(
        share=redundancy(similarity, THRESHOLD if variety.threshold is None else variety.threshold),
        before=float(nearest.mean()),
        after=float(nearest_similarity(among_kept).mean()),
        moved=sum(len(np.setdiff1d(keep, plain)) for keep, plain in zip(chosen, bare, strict=True)),
    )


def elimination_order(similarity: Matrix, scores: Array, variety: Variety) -> Labels:
    """The order in which the units go; the last `k` are the kept set, so the sets for different `k` are nested.

    Units that score exactly 0 go first whatever the rule: a dead kernel resembles no other and would count as rare.

    Args:
        similarity: `(C, C)`, see `vary`.
        scores: `(C,)` non-negative.
        variety: the rule.

    Returns:
        `(C,)` a permutation of the units.
    """
    bare = bare_order(scores)
    dead = int(np.count_nonzero(scores == 0))
    alive = bare[dead:]  # by ascending score, so that of any two the first one goes
    inside = similarity[np.ix_(alive, alive)]
    if variety.rule == "soft":
        order = _by_uniqueness(inside, scores[alive], variety.beta)
    else:
        order = _by_pairs(inside, -math.inf if variety.threshold is None else variety.threshold)
    return np.concatenate([bare[:dead], alive[order]])


def bare_order(scores: Array) -> Labels:
    """The order `(C,)` in which the bare criterion drops units: lowest score first, of equal ones the last first."""
    return np.lexsort((-np.arange(len(scores)), scores))


def _by_pairs(similarity: Matrix, threshold: float) -> Labels:
    """Redundant-pair elimination of units that are sorted by ascending score.

    Each unit remembers its nearest neighbour, which changes only with the neighbour's removal. The units of a most
    similar pair are those whose neighbour is nearest; the lowest of them is the loser of its pair. Where several pairs
    are equally similar, this takes the one with the weakest loser: copies go by score, not by position.
    """
    units = len(similarity)
    left = np.maximum(similarity, similarity.T)  # symmetric to the last bit
    np.fill_diagonal(left, -np.inf)
    neighbour = left.argmax(axis=1) if units else np.empty(0, dtype=np.intp)
    nearest = left[np.arange(units), neighbour]
    order: list[int] = []
    while len(order) < units - 1:
        closest = float(nearest.max())
        if closest < threshold - NOISE:
            break
        loser = int(np.argmax(nearest >= closest - NOISE))  # the first that is true
        order.append(loser)
        left[:, loser] = -np.inf
        nearest[loser], neighbour[loser] = -np.inf, -1
        orphans = np.flatnonzero(neighbour == loser)
        neighbour[orphans] = left[orphans].argmax(axis=1)
        nearest[orphans] = left[orphans, neighbour[orphans]]
    return np.array([*order, *np.setdiff1d(np.arange(units), order)], dtype=np.intp)


def _by_uniqueness(similarity: Matrix, scores: Array, beta: float) -> Labels:
    """Backward elimination of the lowest `score * uniqueness ** beta`, for units sorted by ascending score.

    With `P` the inverse of the similarity of the units left, `1 / P[c, c]` is `1 - R^2` of unit `c` given the others,
    the inverse of its variance inflation factor. Removing `d` is the rank-one downdate `P - P[:, d] P[d, :] / P[d, d]`:
    one step of a Cholesky factorization of the first `P` with `d` as pivot. So `P` is never updated: its diagonal is,
    and one column of it is computed from the factor when it is needed.
    """
    units = len(similarity)
    ridged = similarity + RIDGE * np.eye(units)
    precision = solve(ridged, np.eye(units), assume_a="pos") if units else ridged
    diagonal = precision.diagonal().copy()
    factor = np.empty((units, units))
    left = np.ones(units, dtype=np.bool_)
    order = np.empty(units, dtype=np.intp)
    for step in range(units):
        value = np.where(left, scores * np.clip(1 / diagonal, RIDGE, 1) ** beta, np.inf)
        pivot = int(np.argmax(value <= value.min() * (1 + NOISE)))  # the first that is true
        order[step], left[pivot] = pivot, False
        column = precision[pivot] - factor[:step, pivot] @ factor[:step]
        factor[step] = column / math.sqrt(column[pivot])
        diagonal = np.where(left, diagonal - factor[step] ** 2, 1.0)
    return order


def remap(scores: Array, order: Labels) -> Array:
    """Give the i-th unit to go the i-th lowest score; the `k` highest are then the last `k` to go, for every `k`.

    A row keeps its values, so a comparison of rows or layers takes as many units from each as before. Where values are
    equal they are moved up, each to the next float64 above the one before: no `k` may cut through a tie.

    Args:
        scores: `(C,)` non-negative.
        order: `(C,)` the units in the order in which they go.

    >>> remap(np.array([3.0, 1.0, 2.0]), np.array([2, 0, 1])).tolist()
    [2.0, 3.0, 1.0]
    """
    # The bits of non-negative floats, read as integers, are in the order of the floats and consecutive.
    bits = (np.sort(scores.astype(np.float64)) + 0.0).view(np.int64)  # + 0.0: there is a negative zero
    steps = np.arange(len(bits))
    distinct = np.maximum.accumulate(bits - steps) + steps
    remapped = np.empty(len(scores))
    remapped[order] = distinct.view(np.float64)
    return remapped


def cosine_similarity(kernels: Array) -> Array:
    """Cosine of every two units of a set. A unit of norm 0 is like no other, and like itself.

    Args:
        kernels: `(..., U, F)` features of each unit: for the kernel groups of a group of filters with weight
            `(d, C, *kernel)` this is `weight.swapaxes(0, 1).reshape(C, -1)`, for the filters of a layer
            `weight.reshape(O, -1)`.

    Returns:
        `(..., U, U)`, symmetric, 1 on the diagonal.
    """
    return _normalized(kernels @ kernels.swapaxes(-1, -2))


def functional_similarity(weight: Array, gram: Matrix) -> Matrix:
    """Correlation of what the input channels contribute to the output of a group of filters.

    The contribution of channel `c` is `y_c = W_c x_c`, with `W_c (d, kh kw)` and `x_c` the patches of that channel.
    With `G` the second moment of the patches, `<y_c, y_c'> = trace(W_c G_cc' W_c'^T)`; the similarity is this over the
    root of the product of its diagonal. It is a correlation proper if `gram` is centred (a covariance), which fits a
    convolution whose mean a BatchNorm removes. A channel that contributes nothing is like no other, and like itself.

    Args:
        weight: `(d, C, *kernel)` filters of one group.
        gram: `(C kh kw, C kh kw)` second moment or covariance of the input patches, channels outermost, as
            `torch.nn.functional.unfold` orders them.

    Returns:
        `(C, C)`, symmetric, 1 on the diagonal.

    Raises:
        PlanError: the sizes do not fit.
    """
    filters, channels = weight.shape[:2]
    taps = math.prod(weight.shape[2:])
    if gram.shape != (channels * taps, channels * taps):
        raise PlanError(
            f"weight {weight.shape} needs a gram of {channels * taps} x {channels * taps} input taps, not {gram.shape}"
        )
    flat = weight.reshape(filters, channels * taps)
    products = np.empty((channels, channels))
    for channel in range(channels):  # by rows of blocks: the whole would take as much memory as the gram
        rows = slice(channel * taps, (channel + 1) * taps)
        weighted = gram[rows] * (flat[:, rows].T @ flat)  # (kh kw, C kh kw)
        products[channel] = weighted.reshape(taps, channels, taps).sum(axis=(0, 2))
    return _normalized(products)


def nearest_similarity(similarity: Array) -> Array:
    """Similarity of each unit to its nearest neighbour, `(..., U, U)` to `(..., U)`; 0 for a single unit."""
    units = similarity.shape[-1]
    if units == 1:
        return np.zeros(similarity.shape[:-1])
    others: Array = np.where(np.eye(units, dtype=np.bool_), -np.inf, similarity).max(axis=-1)
    return others


def redundancy(similarity: Array, threshold: float) -> float:
    """Share of the units of `similarity (..., U, U)` whose nearest neighbour is at least `threshold` similar."""
    return float((nearest_similarity(similarity) >= threshold - NOISE).mean())


def _normalized(products: Array) -> Array:
    """Inner products `(..., U, U)` divided by the norms, within [-1, 1]."""
    norms = np.sqrt(np.maximum(products.diagonal(axis1=-2, axis2=-1), 0))
    scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    similarity: Array = np.clip(products * scale[..., :, None] * scale[..., None, :], -1, 1)
    similarity = (similarity + similarity.swapaxes(-1, -2)) / 2
    units = np.arange(similarity.shape[-1])
    similarity[..., units, units] = 1
    return similarity
