"""Plan which residual branches are removed: the one that the network misses least for what it costs, then the next.

What a branch is worth depends on which others are gone, so each is chosen anew, by trying (`branch_trials`); what comes
of each way to compare is refitted and judged (`fxprune.calibration.judging`).
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from fxprune.calibration.subject import Subject
from fxprune.channels.branches import residual_branches
from fxprune.errors import PlanError
from fxprune.planning.branch_trials import TRIED, WAYS, Branches, Trials
from fxprune.planning.candidates import best_plan
from fxprune.planning.latency.network import WholeNetwork
from fxprune.planning.latency.table import NEAR
from fxprune.planning.patterns import match_patterns
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import Cost
from fxprune.plans import PrunePlan


def plan_branches(subject: Subject, request: Request) -> PrunePlan:
    """Choose the branches to remove. A graph is needed: a user's own forward computes them.

    Raises:
        PlanError: there are no calibration data or no branches, the result is to be the user's own module, or so much
            cannot be removed.
        CalibrationError: the calibration data do not fit the model.
        AccelerationError: a latency is asked for, and the model cannot be accelerated.
    """
    plans = BranchPlanner(subject, request).plans(request)
    return best_plan(subject, plans, "ways to choose branches")


class BranchPlanner:
    """Plans of branches for one model, for several amounts; what a network without some of them gives is measured once.

    Args:
        subject: the model.
        request: what layers are to be ignored, and what counts as cost.

    Raises:
        PlanError: see `plan_branches`.
    """

    def __init__(self, subject: Subject, request: Request) -> None:
        if subject.batches is None:
            raise PlanError("branches are compared on data; pass calibration= for granularity='branch'")
        if subject.is_recorded:
            raise PlanError(
                "whole branches go from a graph only, the model's own forward computes them; pass output='graph', or "
                "granularity='kernel' or 'filter'"
            )
        self._subject = subject
        self.layers = _removable(subject, request.patterns)
        self._shares = {cost: _shares(subject, self.layers, cost) for cost in get_args(Cost)}
        counted = tuple(request.budgets) or ("macs",)
        worth = {name: sum(self._shares[cost][name] for cost in counted) for name in self.layers}
        self._times: dict[frozenset[str], float] = {}
        trials = Trials(subject, len(self.layers))
        self._orders = {
            way: _Order(worth, trials.distances(renews)) for way, renews in WAYS.items() if trials.suit(renews)
        }

    def plans(self, request: Request, way: str | None = None) -> dict[str, PrunePlan]:
        """Plans of branches by the way in which they were compared, or of one way alone.

        Raises:
            PlanError: so much cannot be removed.
        """
        found: dict[str, PrunePlan] = {}
        for name, order in self._orders.items():
            if way not in (None, name):
                continue
            gone, remarks = self._gone(request, order)
            if all(set(gone) != plan.branches.keys() for plan in found.values()):
                found[name] = replace(plan_of_branches(self.layers, gone, request, name), remarks=remarks)
        return found

    def first(self, way: str | None, count: int, request: Request) -> PrunePlan:
        """The plan without the first few branches, as one way, or the first, has them go."""
        gone = self._order(way).first(count)
        return plan_of_branches(self.layers, gone, request, next(iter(self._orders)) if way is None else way)

    def distances(self, way: str | None) -> dict[str, float]:
        """How far the network without each branch alone is from the dense one, compared in one way, or the first."""
        return {name: self._order(way).alone(name) for name in self.layers}

    def _order(self, way: str | None) -> "_Order":
        return next(iter(self._orders.values())) if way is None else self._orders[way]

    def _gone(self, request: Request, order: "_Order") -> tuple[Branches, tuple[str, ...]]:
        if not request.has_budget:
            ratio = request.filter_ratio
            if isinstance(ratio, Mapping):
                raise PlanError("ratio maps patterns to shares, but branches go one by one; pass one ratio, or macs=")
            assert ratio is not None
            return order.first(round(ratio * len(self.layers))), ()
        gone = self._within(order, request.budgets)
        if request.latency is None:
            return gone, ()
        limit = request.latency * (1 + NEAR)
        counts = range(len(gone), len(self.layers) + 1)
        place = bisect_left(counts, True, key=lambda n: self.share_without(order.first(n), request) <= limit)
        if place == len(counts):
            least = self.share_without(order.first(len(self.layers)), request)
            raise PlanError(
                f"latency={request.latency:.4g} cannot be reached by branches alone: without all {len(self.layers)} "
                f"that can go {least:.4g} remains; ask for that or more, or use granularity='auto'"
            )
        gone = order.first(counts[place])
        reached = self.share_without(gone, request)
        return gone, (
            f"latency: asked for {request.latency:.2f} of the best dense time in {request.where}; without "
            f"{len(gone)} branches it was {reached:.2f}",
        )

    def share_without(self, gone: Collection[str], request: Request) -> float:
        """The share of the dense time that the network takes without some branches, measured once.

        Raises:
            AccelerationError: the model cannot be accelerated.
        """
        key = frozenset(gone)
        if not key:
            return 1.0
        if key not in self._times:
            plan = PrunePlan({}, branches={name: self.layers[name] for name in gone})
            self._times[key] = WholeNetwork.of(self._subject, request).share_with(plan)
        return self._times[key]

    def _within(self, order: "_Order", budgets: Mapping[Cost, float]) -> Branches:
        """The fewest branches, in order, without which all budgets are kept.

        Raises:
            PlanError: they are not, whatever goes.
        """
        for cost, share in budgets.items():
            least = 1 - sum(self._shares[cost].values())
            if least > share * (1 + 1e-9):
                raise PlanError(
                    f"{cost}={share:.4g} cannot be reached by branches alone: without all {len(self.layers)} that can "
                    f"go {least:.4g} remain; ask for that or more, or use granularity='auto'"
                )
        count = 0
        while any(
            1 - sum(self._shares[cost][name] for name in order.first(count)) > share * (1 + 1e-9)
            for cost, share in budgets.items()
        ):
            count += 1
        return order.first(count)


def plan_of_branches(
    layers: Mapping[str, tuple[str, ...]], gone: Collection[str], request: Request, way: str
) -> PrunePlan:
    """The plan without some branches.

    Args:
        layers: of all branches, by name.
        gone: names of those that go.
        request: what was asked for.
        way: in which they were chosen.
    """
    ratio = {} if request.filter_ratio is None else request.filter_ratio
    branches = {end: names for end, names in layers.items() if end in gone}
    return PrunePlan({}, {}, ratio, f"branch, {way}", "distance", request.seed, branches=branches)


class _Order:
    """The branches in the order in which they go, found as far as it is asked for.

    Args:
        worth: what each saves.
        distance: of the network without some of them from the dense one.
    """

    def __init__(self, worth: Mapping[str, float], distance: Callable[[Branches], float]) -> None:
        self._worth, self._distance = worth, distance
        self._gone: Branches = ()

    def first(self, count: int) -> Branches:
        """The first ones."""
        while len(self._gone) < min(count, len(self._worth)):
            self._gone = (*self._gone, self._next())
        return self._gone[:count]

    def alone(self, name: str) -> float:
        """How far the network without one branch is from the dense one."""
        return self._distance((name,))

    def _next(self) -> str:
        """Of those that alone are missed least, the one whose loss adds least, for what it saves."""
        alone = {name: self._distance((name,)) / max(saved, 1e-12) for name, saved in self._worth.items()}
        tried = sorted(self._worth.keys() - set(self._gone), key=lambda name: (alone[name], name))[:TRIED]
        now = self._distance(self._gone)
        return min(tried, key=lambda name: (self._distance((*self._gone, name)) - now) / max(self._worth[name], 1e-12))


def _removable(subject: Subject, ignored: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The branches that can go, none of whose layers is to be ignored, each with its layers.

    Raises:
        PlanError: there are none.
    """
    found, refused = residual_branches(subject.trace.module, subject.trace.values)
    names = [name for name, _ in subject.layers.named_modules() if name]
    kept = match_patterns("ignore", dict.fromkeys(ignored, True), names)
    layers = {name: branch.modules for name, branch in found.items() if kept.keys().isdisjoint(branch.modules)}
    if layers:
        return layers
    reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3])
    if found:
        reasons = "layers of all of them are to be ignored"
    raise PlanError(
        f"no residual branch of the network can go as a whole "
        f"({reasons or 'nothing is added to what it was computed from'}); use granularity='kernel' or 'filter'"
    )


def _shares(subject: Subject, branches: Mapping[str, tuple[str, ...]], cost: Cost) -> dict[str, float]:
    """What each branch has of the MACs or parameters of the network."""
    if cost == "params":
        modules = dict(subject.layers.named_modules())
        own = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        total = sum(parameter.numel() for parameter in subject.trace.module.parameters())
    else:
        own = {name: macs or 0 for name, (_, macs) in subject.costs.items()}
        total = sum(own.values())
    return {name: sum(own.get(layer, 0) for layer in layers) / max(1, total) for name, layers in branches.items()}
