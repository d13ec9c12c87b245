"""What a compiled module remembers of its compilation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.errors import FxpruneError
from fxprune.exact.reporting import Report
from fxprune.plans import PrunePlan

RECORD = "fxprune"
"""Key of `GraphModule.meta` under which a compiled module keeps the record of its compilation."""

ACCELERATION = "fxprune_acceleration"
"""Key of `GraphModule.meta` under which an accelerated module keeps its report."""


@dataclass(frozen=True)
class Record:
    """What a compiled module remembers, under `gm.meta["fxprune"]`: survives deepcopy, not pickle.

    Attributes:
        plan: the plan that was applied.
        report: the account of the result.
        inputs: arguments of forward as the shapes were known at compile time, see `fxprune.graph.tracing.Trace`.
        modes: modes in which the graph follows the model.
        options: how the passes were configured.
        rounding: relative step of the weights' type if a pass rounded weights anew (folded BatchNorm), else 0.
    """

    plan: PrunePlan
    report: Report
    inputs: tuple[Any, ...]
    modes: tuple[str, ...]
    options: Mapping[str, Any]
    rounding: float = 0.0


def record_of(pruned: nn.Module) -> Record:
    """Return what a compiled module remembers of its compilation.

    Raises:
        FxpruneError: the module was not compiled by fxprune, or lost its record in pickling.
    """
    meta = getattr(pruned, "meta", None)
    record = meta.get(RECORD) if isinstance(meta, dict) else None
    if isinstance(meta, dict) and ACCELERATION in meta:
        raise FxpruneError(
            "the model is accelerated: its weights are packed for one device; pass the module that it was made from"
        )
    if not isinstance(record, Record):
        raise FxpruneError(
            f"{type(pruned).__name__} carries no record of a compilation; "
            "pass the module that fxprune.compile, rewrite or load returned"
        )
    return record
