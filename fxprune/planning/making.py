"""From a request to a plan."""

from dataclasses import replace

from torch import nn

from fxprune.calibration.subject import Subject
from fxprune.planning.auto import plan_auto
from fxprune.planning.branches import plan_branches
from fxprune.planning.estimates import foreseen
from fxprune.planning.filters import plan_filters
from fxprune.planning.joint import with_rest
from fxprune.planning.kernels import plan_kernels
from fxprune.planning.planner import ZERO
from fxprune.planning.requests import AUTO, BRANCH, Request
from fxprune.plans import PrunePlan

SPARED = "the budget was met without it"
"""Why a layer stays whole that could be pruned."""


def plan_for(subject: Subject, request: Request, *, alone: bool = True) -> tuple[PrunePlan, nn.Module | None]:
    """The plan, and the masked model if it was refitted on the way. What it will take is said beforehand.

    Args:
        subject: the model.
        request: what is asked for.
        alone: whether the plan is all that is wanted; else the run goes on as `compile` does.

    Raises:
        PlanError: nothing can be planned as asked for.
        AccelerationError: a latency is asked for, and the model cannot be accelerated.
        CalibrationError: the calibration data do not fit the model.
    """
    subject.announce(foreseen(subject, request, compiles=not alone), request.progress)
    plan, masked = _plan_for(subject, request)
    if request.has_budget:
        plan = replace(plan, skipped={name: SPARED if why == ZERO else why for name, why in plan.skipped.items()})
    if alone:
        subject.finish()
    return plan, masked


def _plan_for(subject: Subject, request: Request) -> tuple[PrunePlan, nn.Module | None]:
    if request.granularity == AUTO:
        return plan_auto(subject, request)
    if request.granularity == BRANCH:
        return plan_branches(subject, request), None
    first, *rest = request.parts()
    if first.granularity == "kernel":
        return plan_kernels(subject, first)
    if first.after is not None:
        first.after.check(subject.model)
    plan = plan_filters(subject, first)
    if not rest:
        return plan, None
    (second,) = rest
    return with_rest(subject, plan, lambda left: plan_kernels(left, second), request.progress)


def noted_as_baked(plan: PrunePlan, names: tuple[str, ...]) -> PrunePlan:
    """The plan of a model in which the weights of some convolutions were computed, and are plain ones now."""
    notes = dict(plan.notes)
    for name in names:
        if name in plan.layers or name in plan.removed:
            notes[name] = f"{notes[name]}; {_BAKED}" if name in notes else _BAKED
    return replace(plan, baked=names, notes=notes)


_BAKED = "its weight was computed, and is a plain one now"
