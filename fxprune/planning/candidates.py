"""Several ways to spend a budget, of which the best is taken: that which does best on inputs that were held back.

A sensitivity is measured one layer at a time, and what several damages do together is a model of it (they multiply).
Where that model is wrong, a budget that trusts it can end below the plainest one, the same ratio in every layer. So it
is not trusted: the candidates of `candidates` are planned and refitted without the held-out inputs, and the one that
follows the dense network best on these is planned anew on all.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from fxprune.calibration.agreement import Agreement
from fxprune.calibration.damage import loss_of
from fxprune.calibration.judging import Judge, best
from fxprune.calibration.subject import Subject
from fxprune.errors import PlanError
from fxprune.planning.estimates import JUDGING
from fxprune.planning.lossy import masked_by
from fxprune.planning.sensitivity import Cost, LayerSensitivity, Sensitivity
from fxprune.planning.several_budgets import ratios_within
from fxprune.plans import PrunePlan

MOST_DAMAGE = 1 - 1e-12


def candidates(table: Sensitivity, budgets: Mapping[Cost, float], block: int) -> dict[str, dict[str, float]]:
    """Ratios of each layer that meet all budgets, each set once, by the name of the way in which they were found.

    - `"sensitivity"`: the least damage, as measured.
    - `"uniform"`: the same ratio everywhere, up to whole channels.
    - `"between"`: the least of the geometric mean of both losses.

    Raises:
        PlanError: the budgets cannot be met.
    """
    found: dict[str, dict[str, float]] = {}
    for name, way in tables(table, budgets).items():
        try:
            ratios = ratios_within(way, budgets, block)
        except PlanError:
            if name == "sensitivity":
                raise
            continue  # with whole channels, in other steps, this one happens to miss it
        if ratios not in found.values():
            found[name] = ratios
    return found


def tables(table: Sensitivity, budgets: Mapping[Cost, float]) -> dict[str, Sensitivity]:
    """The losses that lead to each of `candidates`; to the first alone without a budget of MACs or parameters."""
    if not budgets:
        return {"sensitivity": table}
    tightest = min(budgets, key=budgets.__getitem__)
    even = uniform(table, {layer.name: getattr(layer, tightest) for layer in table.layers})
    return {"sensitivity": table, "between": between(table, even), "uniform": even}


def uniform(table: Sensitivity, costs: Mapping[str, float]) -> Sensitivity:
    """The table of a network in which the same ratio is the best for all layers.

    The loss of a layer is its cost times the square of its ratio, so that it rises by the same for each unit of cost
    that is saved where the ratios are equal.

    Args:
        table: names the layers, and how many channels they have.
        costs: of each whole layer.
    """
    total = sum(costs.values()) or 1

    def evened(layer: LayerSensitivity) -> LayerSensitivity:
        channels, weight = len(layer.damage), costs[layer.name] / total
        losses = (weight * (1 - k / channels) ** 2 for k in range(1, channels + 1))
        return replace(layer, damage=tuple(map(damage_of, losses)))

    return replace(table, layers=tuple(map(evened, table.layers)))


def between(first: Sensitivity, second: Sensitivity) -> Sensitivity:
    """The table whose losses are the geometric means of those of two tables of the same layers."""

    def mean(a: LayerSensitivity, b: LayerSensitivity) -> LayerSensitivity:
        losses = (math.sqrt(loss_of(x) * loss_of(y)) for x, y in zip(a.damage, b.damage, strict=True))
        return replace(a, damage=tuple(map(damage_of, losses)))

    return replace(first, layers=tuple(map(mean, first.layers, second.layers)))


def best_plan(subject: Subject, plans: Mapping[str, PrunePlan], what: str) -> PrunePlan:
    """Of several plans of what goes as a whole the one that does best on held-out inputs; it says what all gave.

    Args:
        subject: the model, with calibration data if there are several.
        plans: by way.
        what: the ways are for.
    """
    if len(plans) == 1:
        return next(iter(plans.values()))
    found = judged_plans(Judge(subject), plans)
    way = best(found)
    return replace(plans[way], remarks=(told(what, found, way), *plans[way].remarks))


def judged_plans(judge: Judge, plans: Mapping[str, PrunePlan]) -> dict[str, Agreement | None]:
    """What comes of plans of what goes as a whole, refitted without the inputs on which they are judged."""
    judge.fitted.begin(JUDGING, len(plans))
    return judge.compare(plans, masked_by)


def told(what: str, found: Mapping[str, Agreement | None], taken: str) -> str:
    """What came of judging several ways, in a sentence.

    Args:
        what: what was judged.
        found: by way.
        taken: the one that was taken.
    """
    known = next((agreement for agreement in found.values() if agreement is not None), None)
    ways = [
        f"{way}{' (taken)' if way == taken else ''} "
        + ("unknown" if agreement is None else f"{agreement.figure}, {agreement.distance:.3g}")
        for way, agreement in found.items()
    ]
    where = "" if known is None else f" on {known.inputs} {'held-out' if known.held_out else 'fitted'} inputs"
    figures = "agreement with the dense network (95 % interval), and the distance, which decides"
    return f"{what}, {figures},{where}: {'; '.join(ways)}"


def damage_of(loss: float) -> float:
    """The damage of which `loss` is `loss_of`, but never all of the signal."""
    return min(MOST_DAMAGE, -math.expm1(-loss))
