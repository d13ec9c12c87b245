"""What goes as a whole first, then something of what that leaves: one plan of both."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from fxprune.calibration.subject import Subject
from fxprune.planning.lossy import masked_by, put_back, without_removed
from fxprune.plans import PrunePlan


def with_rest(
    subject: Subject,
    first: PrunePlan,
    plan_rest: Callable[[Subject], tuple[PrunePlan, nn.Module | None]],
    progress: bool = False,
) -> tuple[PrunePlan, nn.Module | None]:
    """Plan something of the network that removed branches or filters leave, refitted if there are data.

    Args:
        subject: the model.
        first: what goes as a whole.
        plan_rest: plans filters or kernels of the smaller network, and refits it if it may.
        progress: show bars on stderr.

    Returns:
        one plan of both, and the model masked by it, of its full size, if it was refitted.
    """
    masked = masked_by(subject, first, progress=progress)
    rest, refitted = plan_rest(subject.of(without_removed(subject, masked, first)))
    if refitted is not None:
        put_back(masked, refitted, first)
    return joined(first, rest), None if refitted is None else masked


def joined(first: PrunePlan, rest: PrunePlan) -> PrunePlan:
    """One plan of both; why a layer keeps its filters is said beside why it stays dense, or noted."""
    skipped, notes = dict(rest.skipped), dict(rest.notes)
    for name, reason in first.skipped.items():
        said = notes if name in rest.layers else skipped
        before = f"{said[name]}; " if name in said else ""
        said[name] = f"{before}keeps its filters: {reason}"
    return replace(
        rest,
        branches={**first.branches, **rest.branches},
        removed={**first.removed, **rest.removed},
        ratio={},
        method=f"{first.method}; {rest.method}",
        skipped=skipped,
        notes=notes,
        remarks=(*first.remarks, *rest.remarks),
    )
