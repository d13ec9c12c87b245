"""From a request to a plan.

`requests` is what may be asked for; `making` serves it: `kernels` with a `planner`, `filters` with `unit_scores` and
`selection`. `sensitivity` is what a layer suffers, `candidates` are ways to spend a budget, `several_budgets` keeps
more than one, with a `knapsack`; `latency` is the time as a budget, `program` all kinds in one. `lossy` applies a plan
to a model, the one step that changes the function.
"""

from fxprune.planning.requests import METHODS, Request

__all__ = ["METHODS", "Request"]
