"""Filters first, then kernels of what they leave: one plan of both."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from fxprune.calibration.subject import Subject
from fxprune.planning.lossy import masked_by, put_back, without_removed
from fxprune.plans import PrunePlan


def kernels_of_rest(
    subject: Subject,
    filters: PrunePlan,
    plan_rest: Callable[[Subject], tuple[PrunePlan, nn.Module | None]],
    progress: bool = False,
) -> tuple[PrunePlan, nn.Module | None]:
    """Plan kernels of the network that removed filters leave, refitted if there are data.

    Args:
        subject: the model.
        filters: what goes as a whole.
        plan_rest: plans kernels of the narrower network, and refits it if it may.
        progress: show bars on stderr.

    Returns:
        one plan of both, and the model masked by it, of its full size, if it was refitted.
    """
    masked = masked_by(subject, filters, progress=progress)
    kernels, refitted = plan_rest(subject.of(without_removed(subject, masked, filters)))
    if refitted is not None:
        put_back(masked, refitted, filters)
    return _joined(filters, kernels), None if refitted is None else masked


def _joined(filters: PrunePlan, kernels: PrunePlan) -> PrunePlan:
    """One plan of both; why a layer keeps its filters is said beside why it stays dense, or noted."""
    skipped, notes = dict(kernels.skipped), dict(kernels.notes)
    for name, reason in filters.skipped.items():
        said = notes if name in kernels.layers else skipped
        before = f"{said[name]}; " if name in said else ""
        said[name] = f"{before}keeps its filters: {reason}"
    method = f"{filters.method}; {kernels.method}"
    return replace(kernels, removed=filters.removed, ratio={}, method=method, skipped=skipped, notes=notes)
