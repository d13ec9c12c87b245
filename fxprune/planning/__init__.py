"""From a request to a plan.

`requests` is what may be asked for; `making` serves it: `kernels` with a `planner`, `filters` with `unit_scores` and
`selection`. `sensitivity` is what a layer suffers, `candidates` are ways to spend a budget, `several_budgets` keeps
more than one, with a `knapsack`. `latency_table` is how long layers take, by groups and by width (`latency_grid`), and
`latency_measure` measures that, in PyTorch or a runtime (`layer_times`). `latency_budget` and `filter_times` meet a
share of it; the `whole_network` has the last word (`latency_meeting`). `lossy` applies a plan to a model, the one step
that changes the function.
"""

from fxprune.planning.requests import METHODS, Request

__all__ = ["METHODS", "Request"]
