"""One budget over branches, filters and kernels: it is divided in several ways, and the best division is taken.

Kernels alone, filters alone and, where there are any, residual branches alone are always among them. Others let filters
save a part and kernels of what they leave the rest, or branches a part and whichever of these was better the rest. And
one is chosen as a whole: what came of each kind alone puts their losses on one scale, on which an integer program finds
what becomes of each channel space, convolution and branch (`fxprune.planning.program`); where branches take part, once
more without them. Each is refitted without the held-out inputs and compared with the dense network on these; so the
result is worse than one kind alone only where these inputs mislead.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import nn

from fxprune.calibration.agreement import Agreement
from fxprune.calibration.judging import Judge, best
from fxprune.calibration.recovery import Recovery
from fxprune.calibration.subject import Subject
from fxprune.errors import PlanError
from fxprune.planning.branches import BranchPlanner
from fxprune.planning.candidates import judged_plans, told
from fxprune.planning.estimates import PLAN
from fxprune.planning.filters import FilterPlanner
from fxprune.planning.joint import with_rest
from fxprune.planning.kernels import judged_ways, planned, sensitivity_of, ways_to_spend
from fxprune.planning.latency.wanted import measure_for
from fxprune.planning.planner import serves_accuracy
from fxprune.planning.program.planner import Alone, Before, ProgramPlanner
from fxprune.planning.recovery_trials import recovered_agreements
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import Cost, Sensitivity
from fxprune.plans import PrunePlan

SPLITS = {"filters for a third of the saving": 1 / 3, "filters for two thirds of the saving": 2 / 3}
"""Divisions between kernels alone and filters alone, with the share of the saving that filters make."""
WHAT = "one budget over all that can go"
BRANCHES_FIRST = "branches for half of the saving"
"""The division that lets whole branches save so much."""
ROUND_TO = 8
"""Before kernels, filters stay in multiples of this many, so that what they leave divides into groups."""
PROGRAM, WITHOUT_BRANCHES = "one program", "one program without branches"
"""The names of what it chooses."""


@dataclass(frozen=True)
class _Division:
    """A way to divide the budget.

    Attributes:
        whole: the branches and filters that go, if any.
        kernels: the request for kernels of what they leave, with ratios, if any.
    """

    whole: PrunePlan | None = None
    kernels: Request | None = None

    def carried_out(self, subject: Subject) -> tuple[PrunePlan, nn.Module | None]:
        """The plan of both, and the masked model if it was refitted on the way."""
        if self.kernels is None:
            return PrunePlan({}) if self.whole is None else self.whole, None
        request, accurate = self.kernels, serves_accuracy(subject, self.kernels)
        if self.whole is None:
            return planned(subject, request, accurate)
        return with_rest(subject, self.whole, lambda rest: planned(rest, request, accurate), request.progress)


def plan_auto(subject: Subject, request: Request) -> tuple[PrunePlan, nn.Module | None]:
    """A plan of branches, filters and kernels that meets a budget, and the masked model if it was refitted on the way.

    Raises:
        PlanError: there are no calibration data, or the budget can be met by none of them.
        CalibrationError: the calibration data do not fit the model.
    """
    if subject.batches is None:
        raise PlanError(
            "granularity='auto' compares branches, filters and kernels on data; pass calibration=, or "
            "granularity='kernel' or 'filter'"
        )
    trials = _Trials(subject, request)
    trials.of("kernels alone", trials.kernels_alone)
    trials.of("filters alone", trials.filters_alone)
    for name, part in SPLITS.items():
        trials.of(name, partial(trials.both, part))
    if trials.has_branches:
        trials.of("branches alone", trials.branches_alone)
        trials.of(BRANCHES_FIRST, trials.branches_first)
    trials.of(PROGRAM, trials.program)
    if trials.takes_branches:
        trials.of(WITHOUT_BRANCHES, partial(trials.program, branches=False))
    if not trials.found:
        raise PlanError("granularity='auto': " + "; ".join(trials.failures))
    agreements = {name: agreement for name, (_, agreement) in trials.found.items()}
    taken = best(agreements)
    remarks = [told(WHAT, agreements, taken)]
    if request.recovery is not None and (recovered := trials.recovered(agreements, request.recovery)):
        taken = best(recovered)
        remarks = [told(f"{WHAT}, after a tenth of the recovery", recovered, taken), f"after the refit, {remarks[0]}"]
    subject.begin(PLAN)
    plan, masked = trials.found[taken][0].carried_out(subject)
    return replace(plan, remarks=(*remarks, *trials.remarks, *trials.failures)), masked


class _Trials:
    """Divisions of a budget that were tried.

    Args:
        subject: the model, with calibration data.
        request: what is asked for.

    Attributes:
        found: each division by its name, and what came of it.
        remarks: what came of the ways to spend the whole budget on one granularity.
        failures: divisions that are not possible, and why.
    """

    def __init__(self, subject: Subject, request: Request) -> None:
        self.found: dict[str, tuple[_Division, Agreement | None]] = {}
        self.remarks: list[str] = []
        self.failures: list[str] = []
        self._subject = subject
        if request.latency is not None and request.latency_table is None:
            request = replace(request, latency_table=measure_for(subject, request))
        self._filters, self._kernels = request.parts()
        self._judge, self._planner = Judge(subject), FilterPlanner(subject)
        self._asked, self._branches = request.of_branches(), _branches_of(subject, request)
        self._alone: dict[str, Alone[Any]] = {}
        self.takes_branches = False
        if subject.is_recorded:
            self.failures.append("branches: they go from a graph only; output='graph' would try them")

    @property
    def has_branches(self) -> bool:
        """Whether there are branches that can go."""
        return self._branches is not None

    def of(self, name: str, trial: Callable[[], tuple[_Division, Agreement | None]]) -> None:
        """Try a division; that it is not possible is no reason to give up."""
        try:
            self.found[name] = trial()
        except PlanError as error:
            self.failures.append(f"{name}: {error}")

    def recovered(self, refitted: Mapping[str, Agreement | None], recovery: Recovery) -> dict[str, Agreement | None]:
        """What comes of the best divisions once they are recovered, see `recovered_agreements`."""
        ways = {name: division.carried_out for name, (division, _) in self.found.items()}
        return recovered_agreements(self._judge, ways, refitted, recovery, self._asked.seed)

    def kernels_alone(self) -> tuple[_Division, Agreement | None]:
        """The best way to spend all on kernels. It is judged as it would be carried out, for filters are, too."""
        ways, remarks = ways_to_spend(self._subject, replace(self._kernels, sensitivity=self._sensitivity))
        self.remarks.extend(f"kernels alone, {remark}" for remark in remarks)
        way = next(iter(ways))
        if len(ways) > 1:
            agreements = judged_ways(self._judge, ways)
            way = best(agreements)
            self.remarks.append(told("kernels alone, ways to spend the budget", agreements, way))
        division = _Division(kernels=ways[way])
        agreement = self._judged(division)
        self._alone["kernels"] = Alone(way, ways[way], agreement)
        return division, agreement

    def filters_alone(self) -> tuple[_Division, Agreement | None]:
        """The best way to spend all on filters."""
        plans = self._planner.plans(self._filters)
        return self._best_of("filters", "ways to spread them", plans)

    def both(self, part: float) -> tuple[_Division, Agreement | None]:
        """Filters for a part of the saving, spread as was best for all of it; kernels of what they leave for the
        rest, by the least damage.
        """
        eased = {name: 1 - part * (1 - share) for name, share in self._filters.shares.items()}
        asked = replace(self._filters.with_shares(eased), round_to=math.lcm(self._filters.round_to or 1, ROUND_TO))
        filters = next(iter(self._planner.plans(asked, self._way("filters")).values()))
        time = None if self._filters.latency is None else self._planner.share_of(filters)
        return self._followed(filters, time)

    def branches_alone(self) -> tuple[_Division, Agreement | None]:
        """The best way to choose branches for all of the saving."""
        assert self._branches is not None
        return self._best_of("branches", "ways to choose them", self._branches.plans(self._asked))

    def branches_first(self) -> tuple[_Division, Agreement | None]:
        """Branches for half of the saving, and of what they leave whichever was better alone, by the least damage."""
        assert self._branches is not None
        eased = {name: (1 + share) / 2 for name, share in self._asked.shares.items()}
        branches = next(iter(self._branches.plans(self._asked.with_shares(eased), self._way("branches")).values()))
        branches = replace(branches, remarks=())
        alone = {name: told[1] for name, told in self.found.items() if name in ("kernels alone", "filters alone")}
        narrows = best(alone) == "filters alone" if alone else False
        time = None
        if self._asked.latency is not None:
            time = self._branches.share_without(branches.branches, self._asked)
        return self._followed(branches, time, narrows)

    def _followed(
        self, first: PrunePlan, time: float | None, narrows: bool = False
    ) -> tuple[_Division, Agreement | None]:
        """What goes as a whole, and kernels, or filters, of what it leaves for the rest of the budget.

        Args:
            first: what goes first.
            time: the share of the dense time that it leaves, where time counts.
            narrows: whether filters follow.
        """
        asked: list[Request] = []

        def of_rest(rest: Subject) -> tuple[PrunePlan, nn.Module | None]:
            left = self._of_rest(rest, self._filters if narrows else self._kernels, time)
            if narrows:
                return replace(
                    next(iter(FilterPlanner(rest).plans(left, self._way("filters")).values())), remarks=()
                ), None
            asked.append(next(iter(ways_to_spend(rest, left)[0].values())))
            return planned(rest, asked[0], accurate=serves_accuracy(rest, asked[0]))

        plan, masked = with_rest(self._judge.fitted, first, of_rest)
        if masked is None:
            return _Division(plan), judged_plans(self._judge, {"": plan})[""]
        return _Division(first, asked[0]), self._judge.agreement(masked)

    def program(self, branches: bool = True) -> tuple[_Division, Agreement | None]:
        """What goes at the least loss, all kinds together."""
        solved = self._program.solved(branches)
        self.takes_branches = branches and solved.branches > 0
        self.remarks.append(f"{PROGRAM if branches else WITHOUT_BRANCHES}: {solved.remark}")
        division = _Division(solved.whole, solved.kernels)
        return division, self._judged(division)

    @cached_property
    def _sensitivity(self) -> Sensitivity:
        """Of kernels, measured once."""
        return sensitivity_of(self._subject, self._kernels)

    @cached_property
    def _program(self) -> ProgramPlanner:
        kernels, filters, branches = (self._alone.get(kind) for kind in ("kernels", "filters", "branches"))
        before = Before(kernels, filters, branches, self._sensitivity, self._planner, self._branches)
        return ProgramPlanner(self._subject, self._judge, self._filters, self._kernels, before)

    def _judged(self, division: _Division) -> Agreement | None:
        """What comes of a division where it is refitted without the held-out inputs."""
        plan, masked = division.carried_out(self._judge.fitted)
        return judged_plans(self._judge, {"": plan})[""] if masked is None else self._judge.agreement(masked)

    def _best_of(self, kind: str, what: str, plans: Mapping[str, PrunePlan]) -> tuple[_Division, Agreement | None]:
        """The best of several plans of one kind that goes as a whole; all is remarked."""
        agreements = judged_plans(self._judge, plans)
        way = best(agreements)
        if len(plans) > 1:
            self.remarks.append(told(f"{kind} alone, {what}", agreements, way))
        self.remarks.extend(f"{kind} alone, {remark}" for remark in plans[way].remarks)
        self._alone[kind] = Alone(way, plans[way], agreements[way])
        return _Division(plans[way]), agreements[way]

    def _of_rest(self, rest: Subject, request: Request, time: float | None) -> Request:
        """What the network that something left has to keep, so that the whole budget is kept.

        Args:
            rest: that network.
            request: with the whole budget.
            time: the share of the dense time that it takes, where time counts.

        Raises:
            PlanError: the budget is kept already.
        """
        left: dict[str, float] = {cost: _cost(rest, cost) / _cost(self._subject, cost) for cost in request.budgets}
        if time is not None:
            left["latency"] = time
        shares = {name: share / left[name] for name, share in request.shares.items()}
        if min(shares.values()) >= 1:
            what = ", ".join(f"{share:.4g} of the {name}" for name, share in left.items())
            raise PlanError(f"what goes first leaves {what}, and nothing to do for the rest")
        open_ = request.with_shares({name: share for name, share in shares.items() if share < 1})
        return replace(open_, latency_table=None)  # which is of the whole network

    def _way(self, kind: str) -> str | None:
        """How the whole budget was best spent on a kind, if it could be."""
        return self._alone[kind].way if kind in self._alone else None


def _branches_of(subject: Subject, request: Request) -> BranchPlanner | None:
    """What can plan branches, if there are any."""
    try:
        return BranchPlanner(subject, request.of_branches())
    except PlanError:
        return None


def _cost(subject: Subject, cost: Cost) -> int:
    """MACs or parameters of a network, as a sensitivity counts them."""
    if cost == "params":
        return sum(parameter.numel() for parameter in subject.trace.module.parameters())
    return sum(macs or 0 for _, macs in subject.costs.values())
