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
from fxprune.planning.latency_budget import meet_latency
from fxprune.planning.planner import Planner, prunable_shapes, serves_accuracy
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import Sensitivity, measure
from fxprune.plans import PrunePlan


def plan_kernels(subject: Subject, request: Request) -> tuple[PrunePlan, nn.Module | None]:
    """A plan, and the masked model if it was refitted on the way.

    Raises:
        PlanError: nothing can be planned, or the budget cannot be met.
        CalibrationError: the calibration data do not fit the model.
    """
    if request.budget is None:
        if request.latency is not None:
            request = meet_latency(subject, request, sensitivity_of(subject, request), _writers(subject, request))
        subject.begin(PLAN)
        return planned(subject, request)
    ways = ways_to_spend(subject, request)
    if subject.batches is None or len(ways) == 1:
        subject.begin(PLAN)
        return planned(subject, next(iter(ways.values())), accurate=serves_accuracy(subject, request))
    judge = Judge(subject)
    found = judged_ways(judge, ways)
    way = best(found)
    subject.begin(PLAN)
    plan, masked = planned(subject, ways[way], accurate=serves_accuracy(subject, request))
    return replace(plan, remarks=(told("ways to spend the budget", found, way),)), masked


def ways_to_spend(subject: Subject, request: Request) -> dict[str, Request]:
    """The request with a ratio for each layer in place of the budget, in several ways, see `candidates`; the first is
    that of least damage.

    Raises:
        PlanError: the budget cannot be met.
        CalibrationError: the calibration data do not fit the model.
    """
    assert request.budget is not None
    cost, share = request.budget
    ways = candidates(sensitivity_of(subject, request), share, cost, request.effective_block)
    form = "overlap" if request.form == "auto" else request.form
    request = replace(request, form=form, macs=None, params=None, sensitivity=None)
    return {way: replace(request, ratio=ratios) for way, ratios in ways.items()}


def judged_ways(judge: Judge, ways: Mapping[str, Request]) -> dict[str, Agreement | None]:
    """What comes of each way to spend a budget, fitted without the inputs on which it is judged. Ratios are judged, so
    kernels are chosen in a cheaper way.
    """
    found = {}
    judge.fitted.begin(JUDGING, len(ways))
    for way, request in ways.items():
        if request.method_for(calibrated=True) == "reconstruction":
            request = replace(request, method="cocluster", criterion="activation")
        _, masked = planned(judge.fitted, request, accurate=serves_accuracy(judge.fitted, request))
        assert masked is not None
        found[way] = judge.agreement(masked)
    return found


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
        return planner.from_weights(request.progress), None
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


def sensitivity_of(subject: Subject, request: Request) -> Sensitivity:
    """The sensitivity of all convolutions that can be pruned, from the table of the request if there is one.

    Raises:
        PlanError: nothing can be pruned, the MACs are not known, or the table was measured on another model.
        CalibrationError: the calibration data do not fit the model.
    """
    groups = {name: shape.groups for name, shape in prunable_shapes(subject, request).items()}
    if request.sensitivity is not None:
        return request.sensitivity.among(subject.layers, groups)
    graph = subject.trace.module if subject.batches is None else subject.network
    subject.begin(SENSITIVITY)
    return measure(
        graph,
        groups,
        subject.costs,
        subject.network_batches,
        seed=request.seed,
        rows=subject.rows,
        progress=subject.run or request.progress,
    )
