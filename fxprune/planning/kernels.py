"""A plan of kernels: the ratio of each layer, its groups, and the input channels that each group keeps."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from fxprune.calibration import survey
from fxprune.calibration.agreement import Agreement
from fxprune.calibration.judging import Judge, best
from fxprune.calibration.subject import Subject
from fxprune.channels.writers import common_writers
from fxprune.graph.copying import copied
from fxprune.planning.candidates import candidates, told
from fxprune.planning.estimates import JUDGING, PLAN, SENSITIVITY
from fxprune.planning.latency.budget import meet_latency
from fxprune.planning.planner import Planner, prunable_shapes, serves_accuracy
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import Sensitivity, measure, unmeasured
from fxprune.plans import PrunePlan


def plan_kernels(subject: Subject, request: Request) -> tuple[PrunePlan, nn.Module | None]:
    """A plan, and the masked model if it was refitted on the way.

    Raises:
        PlanError: nothing can be planned, or the budget cannot be met.
        CalibrationError: the calibration data do not fit the model.
    """
    if not request.has_budget:
        subject.begin(PLAN)
        return planned(subject, request)
    ways, remarks = ways_to_spend(subject, request)
    accurate = serves_accuracy(subject, request)
    way = next(iter(ways))
    if subject.batches is not None and len(ways) > 1:
        found = judged_ways(Judge(subject), ways)
        way = best(found)
        remarks = (told("ways to spend the budget", found, way), *remarks)
    subject.begin(PLAN)
    plan, masked = planned(subject, ways[way], accurate=accurate)
    return replace(plan, remarks=remarks), masked


def ways_to_spend(subject: Subject, request: Request) -> tuple[dict[str, Request], tuple[str, ...]]:
    """The request with a ratio for each layer in place of its budgets, in several ways, see `candidates`; the first is
    that of least damage. Of a time there is this one only, and it is said what came of it.

    Raises:
        PlanError: the budgets cannot be met.
        CalibrationError: the calibration data do not fit the model.
        AccelerationError: a latency is asked for, and the model cannot be accelerated.
    """
    sensitivity = sensitivity_of(subject, request, alone=True)
    if request.latency is not None:
        found, remark = meet_latency(subject, request, sensitivity, _writers(subject, request))
        return {"sensitivity": found}, (remark,)
    ways = candidates(sensitivity, request.budgets, request.effective_block)
    form = "overlap" if request.form == "auto" else request.form
    return {way: request.without_budgets(ratio=ratios, form=form) for way, ratios in ways.items()}, ()


def judged_ways(judge: Judge, ways: Mapping[str, Request]) -> dict[str, Agreement | None]:
    """What comes of each way to spend a budget, fitted without the inputs on which it is judged. Ratios are judged, so
    kernels are chosen in a cheaper way.
    """

    def fit(fitted: Subject, request: Request) -> nn.Module:
        if request.method_for(calibrated=True) == "reconstruction":
            request = replace(request, method="cocluster", criterion="activation")
        _, masked = planned(fitted, request, accurate=serves_accuracy(fitted, request))
        assert masked is not None
        return masked

    judge.fitted.begin(JUDGING, len(ways))
    return judge.compare(ways, fit)


def planned(subject: Subject, request: Request, accurate: bool = False) -> tuple[PrunePlan, nn.Module | None]:
    """The plan for ratios, and the masked model if there are data to refit it.

    Args:
        subject: the model.
        request: with ratios.
        accurate: whether the number of groups, where it is open, serves accuracy, see `Planner`.
    """
    writers = _writers(subject, request)
    planner = Planner(
        subject.layers,
        request,
        calibrated=subject.batches is not None,
        accurate=accurate,
        obstacles=subject.obstacles,
        writers=writers,
    )
    if subject.batches is None:
        return planner.from_weights(request.progress and subject.run is None), None
    if planner.sharing:
        seed, progress, batches = request.seed, request.progress and not subject.run, subject.network_batches or []
        for name, samples in survey(subject.network, batches, planner.sharing, seed=seed, progress=progress):
            planner.survey(name, samples)
    masked = copied(subject.model)
    kernels = subject.reconstruct(masked, planner.shapes, planner.choose, request.seed, request.progress)
    return planner.plan(kernels), masked


def _writers(subject: Subject, request: Request) -> Sequence[Collection[str]]:
    """Sets of convolutions that write the same channels, if these are to share their groups."""
    return tuple(common_writers(subject.trace.module, subject.trace.values)) if request.shares_groups else ()


def sensitivity_of(subject: Subject, request: Request, *, alone: bool = False) -> Sensitivity:
    """The sensitivity of all convolutions that can be pruned, from the table of the request if there is one.

    Args:
        subject: the model.
        request: what is asked for.
        alone: whether kernels have to meet the budgets alone: that they can is seen before anything is measured.

    Raises:
        PlanError: nothing can be pruned, the MACs are not known, or the table was measured on another model.
        CalibrationError: the calibration data do not fit the model.
    """
    groups = {name: shape.groups for name, shape in prunable_shapes(subject, request).items()}
    if request.sensitivity is not None:
        return request.sensitivity.among(subject.layers, groups)
    graph = subject.trace.module if subject.batches is None else subject.network
    table = unmeasured(graph, groups, subject.costs)
    if alone:
        for cost, share in request.budgets.items():
            table.check_reachable(share, cost, request.effective_block)
    subject.begin(SENSITIVITY)
    return measure(
        table,
        graph,
        subject.network_batches,
        seed=request.seed,
        rows=subject.effort.rows,
        progress=subject.run or request.progress,
    )
