"""What a unit of filters is worth, by a criterion, with variety among them."""

import numpy as np
from threadpoolctl import threadpool_limits
from torch import nn

from fxprune.channels.units import STAYS, ChannelUnits, Chosen, Units, positions
from fxprune.criteria import ScoreFunction, kernel_scores
from fxprune.criteria.variety import Array, Redundancy, Variety, cosine_similarity, vary
from fxprune.errors import PlanError
from fxprune.graph.convolutions import conv_at, kernels_of
from fxprune.methods import Matrix


def unit_scores(model: nn.Module, units: ChannelUnits, score: ScoreFunction, criterion: str) -> Array:
    """Importance of each unit: `(U,)` float64, 0 or more, the sum over its filters in the prunable convolutions.

    A filter whose weights are all zero scores 0, whatever the criterion: it is masked, and a distance from earlier
    weights would make it count.

    Args:
        model: the model that `units` describes; only read.
        units: its units.
        score: see `fxprune.criteria.ScoreFunction`.
        criterion: its name, for messages.

    Raises:
        PlanError: see `kernel_scores`.
    """
    total = np.zeros(units.count)
    for name, layer in units.layers.items():
        if not layer.prunable:
            continue
        conv = conv_at(model, name)
        filters = kernel_scores(name, conv, score, criterion).sum(axis=1)
        filters[~kernels_of(conv).detach().flatten(1).any(dim=1).cpu().numpy()] = 0
        removable = layer.writes != STAYS
        total += np.bincount(layer.writes[removable], filters[removable], minlength=units.count)
    return total


def varied(
    model: nn.Module, units: ChannelUnits, scores: Array, variety: Variety, removed: Chosen
) -> tuple[Array, tuple[Redundancy, ...]]:
    """Reorder the scores of each space so that rare units stay; see `fxprune.criteria.variety`.

    Units are compared by the cosine of all their filters in a row, one coupled layer after the other, unscaled: the
    score is a sum over the same row, and a layer that hardly adds to it should not decide who is alike. Each space
    keeps its values (`remap`), so a global ranking takes as many units of each space as before.

    Args:
        model: the model that `units` describes; only read.
        units: its units.
        scores: `(U,)` of `unit_scores`.
        variety: the rule. Its similarity must be `"cosine"` or `"auto"`, which is the cosine here.
        removed: `(U,)` what `choose_units` takes by these scores; for the report only.

    Returns:
        scores `(U,)`, and for each space what it did.

    Raises:
        PlanError: the similarity is `"functional"`.
    """
    if variety.similarity == "functional":
        raise PlanError(
            "variety: similarity 'functional' is for kernels, which add to the same output; filters write different "
            "outputs of the same input, so use similarity='cosine' (or 'auto')"
        )
    reordered = np.empty(units.count)
    reports = []
    with threadpool_limits(1):  # as in planning: threads that wait for each other cost more than they save
        for space in range(len(units.names)):
            mine = units.space == space
            similarity = cosine_similarity(_rows(model, units, np.flatnonzero(mine)))
            kept = int(np.count_nonzero(mine & ~removed))
            row, report = vary(scores[mine][None], kept, similarity[None], variety)
            reordered[mine] = row[0]
            reports.append(report)
    return reordered, tuple(reports)


def _rows(model: nn.Module, units: ChannelUnits, mine: Units) -> Matrix:
    """All filters of each unit of a space in a row, `(n, F)`; zeros where a unit has fewer of a layer than another."""
    parts = [np.zeros((len(mine), 1))]
    for name, layer in units.layers.items():
        filters = np.flatnonzero((layer.writes >= mine[0]) & (layer.writes <= mine[-1]))
        if not layer.prunable or not len(filters):
            continue
        filters = filters[np.argsort(layer.writes[filters], kind="stable")]
        owner = layer.writes[filters] - mine[0]
        flat: Matrix = kernels_of(conv_at(model, name)).detach().flatten(1).double().cpu().numpy()
        nth = positions(owner)
        rows = np.zeros((len(mine), int(nth.max()) + 1, flat.shape[1]))
        rows[owner, nth] = flat[filters]
        parts.append(rows.reshape(len(mine), -1))
    return np.concatenate(parts, axis=1)
