"""From a request to a plan."""

from dataclasses import replace

from torch import nn

from fxprune.calibration.subject import Subject
from fxprune.planning.filters import plan_filters
from fxprune.planning.kernels import plan_kernels
from fxprune.planning.lossy import masked_by, put_back, without_removed
from fxprune.planning.requests import Request
from fxprune.plans import PrunePlan


def plan_for(subject: Subject, request: Request) -> tuple[PrunePlan, nn.Module | None]:
    """The plan, and the masked model if it was refitted on the way.

    Raises:
        PlanError: nothing can be planned as asked for.
        AccelerationError: a latency is asked for, and the model cannot be accelerated.
        CalibrationError: the calibration data do not fit the model.
    """
    first, *rest = request.parts()
    if first.granularity == "kernel":
        return plan_kernels(subject, first)
    if first.after is not None:
        first.after.check(subject.model)
    plan = plan_filters(subject, first)
    if not rest:
        return plan, None
    (second,) = rest
    masked = masked_by(subject, plan, progress=request.progress)
    smaller = without_removed(subject, masked, plan)
    kernels, refitted = plan_kernels(subject.of(smaller), second)
    together = _joined(plan, kernels)
    if refitted is None:
        return together, None
    put_back(masked, refitted, plan)
    return together, masked


def noted_as_baked(plan: PrunePlan, names: tuple[str, ...]) -> PrunePlan:
    """The plan of a model in which the weights of some convolutions were computed, and are plain ones now."""
    notes = dict(plan.notes)
    for name in names:
        if name in plan.layers or name in plan.removed:
            notes[name] = f"{notes[name]}; {_BAKED}" if name in notes else _BAKED
    return replace(plan, baked=names, notes=notes)


_BAKED = "its weight was computed, and is a plain one now"


def _joined(filters: PrunePlan, kernels: PrunePlan) -> PrunePlan:
    """One plan of both; why a layer keeps its filters is said beside why it stays dense, or noted."""
    skipped, notes = dict(kernels.skipped), dict(kernels.notes)
    for name, reason in filters.skipped.items():
        said = notes if name in kernels.layers else skipped
        before = f"{said[name]}; " if name in said else ""
        said[name] = f"{before}keeps its filters: {reason}"
    method = f"{filters.method}; {kernels.method}"
    return replace(kernels, removed=filters.removed, ratio={}, method=method, skipped=skipped, notes=notes)
