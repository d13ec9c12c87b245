"""What a compiled model remembers of its compilation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxprune.errors import FxpruneError
from fxprune.exact.reporting import Report
from fxprune.graph.copying import RECORD_ATTRIBUTE
from fxprune.graph.tracing import check_is_module
from fxprune.plans import PrunePlan

RECORD = "fxprune"
"""Key of `GraphModule.meta` under which a compiled graph keeps the record of its compilation."""

ACCELERATION = "fxprune_acceleration"
"""Key of `GraphModule.meta` under which an accelerated module keeps its report."""


@dataclass(frozen=True)
class Record:
    """What a compiled model remembers. A graph loses it in pickling, a user's own module does not.

    Attributes:
        plan: the plan that was applied.
        report: the account of the result.
        inputs: arguments of forward as the shapes were known at compile time, see `fxprune.graph.tracing.Trace`.
        modes: modes in which the result follows the model.
        options: how the passes were configured.
        rounding: relative step of the weights' type if a pass rounded weights anew (folded BatchNorm), else 0.
        surgery: what was done to the layers of a user's own module, see `fxprune.exact.surgery`; empty for a graph.
    """

    plan: PrunePlan
    report: Report
    inputs: tuple[Any, ...]
    modes: tuple[str, ...]
    options: Mapping[str, Any]
    rounding: float = 0.0
    surgery: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> "Record":
        """Nothing in it ever changes."""
        return self


def keep_record(pruned: nn.Module, record: Record) -> None:
    """Make a compiled model remember its compilation."""
    if isinstance(pruned, fx.GraphModule):
        pruned.meta[RECORD] = record
    else:
        vars(pruned)[RECORD_ATTRIBUTE] = record


def find_record(module: nn.Module) -> Record | None:
    """The same for a module that may have none.

    Raises:
        TraceError: it is no module.
    """
    check_is_module(module)
    meta = getattr(module, "meta", None)
    found = vars(module).get(RECORD_ATTRIBUTE) or (meta.get(RECORD) if isinstance(meta, dict) else None)
    return found if isinstance(found, Record) else None


def record_of(pruned: nn.Module) -> Record:
    """Return what a compiled model remembers of its compilation.

    Raises:
        FxpruneError: the module was not compiled by fxprune, or lost its record in pickling; or it is none.
    """
    meta = getattr(pruned, "meta", None)
    if isinstance(meta, dict) and ACCELERATION in meta:
        raise FxpruneError(
            "the model is accelerated: its weights are packed for one device; pass the module that it was made from"
        )
    record = find_record(pruned)
    if record is None:
        raise FxpruneError(
            f"{type(pruned).__name__} carries no record of a compilation; "
            "pass the module that fxprune.compile, rewrite or load returned"
        )
    return record
