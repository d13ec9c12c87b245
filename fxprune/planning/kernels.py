"""A plan of kernels: the ratio of each layer, its groups, and the input channels that each group keeps."""

from dataclasses import replace

from torch import nn

from fxprune.calibration import survey
from fxprune.calibration.subject import Subject
from fxprune.channels.writers import common_writers
from fxprune.graph.copying import copied
from fxprune.planning.latency_budget import meet_latency
from fxprune.planning.planner import Planner, prunable_shapes
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import Sensitivity, measure
from fxprune.plans import PrunePlan


def plan_kernels(subject: Subject, request: Request) -> tuple[PrunePlan, nn.Module | None]:
    """A plan, and the masked model if it was refitted on the way.

    Raises:
        PlanError: nothing can be planned, or the budget cannot be met.
        CalibrationError: the calibration data do not fit the model.
    """
    if request.budget is not None:
        cost, share = request.budget
        ratios = sensitivity_of(subject, request).ratios(share, cost, request.effective_block)
        form = "overlap" if request.form == "auto" else request.form
        request = replace(request, ratio=ratios, form=form, macs=None, params=None, sensitivity=None)
    writers = common_writers(subject.trace.module, subject.trace.values) if request.shares_groups else ()
    if request.latency is not None:
        request = meet_latency(subject, request, sensitivity_of(subject, request), writers)
    planner = Planner(
        subject.layers, request, calibrated=subject.batches is not None, obstacles=subject.obstacles, writers=writers
    )
    if subject.batches is None:
        return planner.from_weights(request.progress), None
    if planner.sharing:
        seed, progress, batches = request.seed, request.progress, subject.network_batches or []
        for name, samples in survey(subject.network, batches, planner.sharing, seed=seed, progress=progress):
            planner.survey(name, samples)
    masked = copied(subject.model)
    kernels = subject.reconstruct(masked, planner.shapes, planner.choose, request.seed, request.progress)
    return planner.plan(kernels), masked


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
    return measure(graph, groups, subject.costs, subject.network_batches, seed=request.seed, progress=request.progress)
