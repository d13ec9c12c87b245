"""Ratios of kernels with which several shares of the network remain at once: of its MACs and of its parameters."""

import math
from collections.abc import Iterator, Mapping

from fxprune.calibration.damage import loss_of
from fxprune.errors import PlanError
from fxprune.planning.knapsack import Way, least_damage
from fxprune.planning.sensitivity import FLOOR, STEP, Cost, LayerSensitivity, Sensitivity
from fxprune.plans.shapes import unit_of


def ratios_within(table: Sensitivity, budgets: Mapping[Cost, float], block: int) -> dict[str, float]:
    """The ratio of each layer with which no more than these shares of the whole network remain, at the least damage.

    One budget is met as `Sensitivity.ratios` does, by the greedy solution. Of several each is an upper bound, and at
    least one of them is nearly reached: the losses, which add up, are least in an integer program.

    Args:
        table: of all layers that can be pruned.
        budgets: shares in `(0, 1]`.
        block: see `Sensitivity.ratios`.

    Raises:
        PlanError: they cannot be met, alone or together; the message says how near one comes.
    """
    if len(budgets) == 1:
        ((cost, share),) = budgets.items()
        return table.ratios(share, cost, block)
    totals = {cost: max(1, getattr(table, cost)) for cost in budgets}
    stays = {cost: 1 - sum(getattr(layer, cost) for layer in table.layers) / totals[cost] for cost in budgets}
    for floor in (FLOOR, 0.0):  # below the floor only where nothing else is left
        ways = [way for layer in table.layers for way in _ways(layer, totals, block, floor)]
        found = least_damage(ways, [share - stays[cost] for cost, share in budgets.items()]) if ways else ""
        if not isinstance(found, str):
            return {name: 1 - kept / size for name, (kept, size) in found.items()}
    asked = ", ".join(f"{cost}={share:.4g}" for cost, share in budgets.items())
    near = []
    for place, cost in enumerate(budgets):
        least = (min(way.costs[place] for way in ways if way.layer == layer.name) for layer in table.layers)
        near.append(f"{stays[cost] + sum(least):.4g} of the {cost}")
    raise PlanError(
        f"{asked} cannot be met together by removing channels from the {len(table.layers)} convolutions that can be "
        f"pruned; at least {' and '.join(near)} must remain: ask for more, or let more layers be pruned"
    )


def _ways(
    layer: LayerSensitivity, totals: Mapping[Cost, int], block: int, floor: float
) -> Iterator[Way[tuple[int, int]]]:
    """The numbers of channels that a layer may keep, in steps as those of one budget."""
    size = len(layer.damage)
    unit = unit_of(size, block)
    step = unit * max(1, int(STEP * size / unit))
    least = unit * max(1, math.ceil(floor * size / unit))
    whole = loss_of(layer.damage[-1])
    for kept in (*range(size, least, -step), least):
        costs = tuple(getattr(layer, cost) / total * kept / size for cost, total in totals.items())
        yield Way(layer.name, (kept, size), max(0.0, loss_of(layer.damage[kept - 1]) - whole), costs)
