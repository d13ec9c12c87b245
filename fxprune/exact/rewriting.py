"""The steps that follow a plan: mask, the only one that changes the function, and rewrite, which is exact."""

import warnings

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.calibration import FITS
from fxprune.errors import NothingRewrittenWarning, TraceError
from fxprune.exact.pipeline import default_pipeline, run
from fxprune.exact.record import RECORD, Record
from fxprune.exact.reporting import make_report
from fxprune.graph.copying import own_tensors
from fxprune.graph.costs import layer_costs
from fxprune.graph.examples import Inputs
from fxprune.graph.tracing import trace
from fxprune.graph.values import CarriedValues
from fxprune.plans import PrunePlan


def rewrite(
    masked: nn.Module, plan: PrunePlan, example_inputs: Inputs | None = None, *, fold_batch_norm: bool = False
) -> fx.GraphModule:
    """Rewrite a masked model into grouped convolutions. Exact: the result computes what `masked` computes.

    Args:
        masked: what `mask` returned, perhaps trained further with its zeros kept. It is not changed.
        plan: the plan it was masked with.
        example_inputs: positional arguments of forward, for shapes; probed if absent.
        fold_batch_norm: see `compile`.

    Raises:
        PlanError: the plan was made for another model.
        PassError: a kernel that the plan drops is not zero.
        TraceError: the model cannot be traced, or no usual image size fits it and no example is given.

    Warns:
        NothingRewrittenWarning: the plan names no convolution.
    """
    plan.check(masked)
    traced = trace(masked, example_inputs)
    if plan.removed and not traced.inputs:
        raise TraceError("removing channels needs the shapes of the model, and no usual size fits; pass example_inputs")
    gm = traced.module
    dense = layer_costs(gm, traced.values)
    params_dense = sum(p.numel() for p in gm.parameters())  # auxiliary heads that are never called are not pruned away
    values = CarriedValues(traced.inputs, traced.values)
    run(gm, default_pipeline(plan, values, fold_batch_norm=fold_batch_norm), traced.inputs)
    own_tensors(gm, masked)
    notes = [*traced.notes, *(f"{name}: {note}" for name, note in plan.notes.items())]
    if traced.probed:
        notes.append(
            "no example_inputs: MACs are for an assumed input size, and the result was not verified"
            if traced.inputs
            else _NO_SHAPES
        )
    if fold_batch_norm:
        notes.append("BatchNorm is folded: the result equals the masked model in evaluation mode only")
    report = make_report(
        plan,
        dense,
        gm,
        values.of(gm),
        errors={name: fit.refitted for name, fit in getattr(masked, FITS, {}).items()},
        params_dense=params_dense,
        input_shapes=tuple(tuple(leaf.shape) for leaf in tree_leaves(traced.inputs) if isinstance(leaf, Tensor)),
        notes=tuple(notes),
    )
    modes = ("eval",) if fold_batch_norm else traced.modes
    rounding = max((torch.finfo(p.dtype).eps for p in gm.parameters() if p.is_floating_point()), default=0.0)
    options = {"fold_batch_norm": fold_batch_norm}
    gm.meta[RECORD] = Record(plan, report, traced.inputs, modes, options, rounding if fold_batch_norm else 0.0)
    if not plan.layers and not plan.removed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:3])
        warnings.warn(
            f"no convolution was rewritten, the result is as large as the model ({reasons})",
            NothingRewrittenWarning,
            stacklevel=2,
        )
    return gm


_NO_SHAPES = (
    "no example_inputs, and no usual input size fits the model: "
    "all channels keep their order, and more gathers remain than need be"
)
