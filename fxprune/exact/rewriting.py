"""The step that follows a mask: the same function with smaller layers, as a graph or as the user's own module."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.calibration import FITS
from fxprune.calibration.agreement import AGREEMENT
from fxprune.channels.capture import capture, check_output, recorded
from fxprune.errors import NothingRewrittenWarning, PassError, TraceError, warn_user
from fxprune.exact.narrowing import narrow
from fxprune.exact.operating import operate
from fxprune.exact.pipeline import default_pipeline, run
from fxprune.exact.placements import PlacementError
from fxprune.exact.record import Record, keep_record
from fxprune.exact.reporting import make_report
from fxprune.exact.surgery import describe
from fxprune.graph.copying import own_tensors
from fxprune.graph.costs import layer_costs
from fxprune.graph.examples import Inputs, as_examples
from fxprune.graph.recording import Recording
from fxprune.graph.tracing import Trace, check_is_model
from fxprune.graph.values import CarriedValues
from fxprune.plans import PrunePlan
from fxprune.plans.plan import check_is_plan
from fxprune.vocabulary import Output


def rewrite(
    masked: nn.Module,
    plan: PrunePlan,
    example_inputs: Inputs | None = None,
    *,
    output: Output = "auto",
    fold_batch_norm: bool = False,
) -> Any:
    """Rewrite a masked model into grouped convolutions. Exact: the result computes what `masked` computes.

    Args:
        masked: what `mask` returned, perhaps trained further with its zeros kept. It is not changed.
        plan: the plan it was masked with.
        example_inputs: arguments of forward, see `compile`; for shapes and for recording.
        output: see `compile`.
        fold_batch_norm: see `compile`.

    Raises:
        PlanError: the plan was made for another model, or `output` is unknown.
        PassError: a kernel that the plan drops is not zero.
        TraceError: the model cannot be traced, or no usual image size fits it and no example is given.

    Warns:
        NothingRewrittenWarning: the plan names no convolution.
    """
    check_output(output)
    check_is_model(masked)
    check_is_plan(plan)
    plan.check(masked)
    examples = () if example_inputs is None else as_examples(example_inputs, masked)
    return rewritten(masked, plan, capture(masked, examples, output), fold_batch_norm=fold_batch_norm)


def rewritten(masked: nn.Module, plan: PrunePlan, captured: Trace, *, fold_batch_norm: bool = False) -> nn.Module:
    """The same for a masked model that is traced or recorded already: a graph, or the user's own module."""
    if isinstance(captured, Recording) and fold_batch_norm:
        raise PassError(
            "fold_batch_norm changes the graph, and the result is the model's own module; fold BatchNorm there with "
            "torch.nn.utils.fuse_conv_bn_eval, or pass output='graph'"
        )
    if isinstance(captured, Recording) and plan.branches:
        raise PassError(
            f"{next(iter(plan.branches))}: a branch cannot go from the model's own module, whose forward computes it; "
            "pass output='graph'"
        )
    if not isinstance(captured, Recording) and (plan.removed or plan.branches) and not captured.inputs:
        raise TraceError(
            "removing channels or branches needs the shapes of the model, and no usual size fits; pass example_inputs"
        )
    dense = layer_costs(captured.module, captured.values)
    params_dense = sum(p.numel() for p in captured.module.parameters())  # without heads that are never called
    inputs = captured.inputs
    notes = [*captured.notes, *plan.remarks, *(f"{name}: {note}" for name, note in plan.notes.items())]
    if isinstance(captured, Recording):
        result, graph, values, plan = _operated(masked, plan, captured)
    else:
        result = graph = captured.module
        carried = CarriedValues(captured.inputs, captured.values)
        run(graph, default_pipeline(plan, carried, fold_batch_norm=fold_batch_norm), captured.inputs)
        own_tensors(graph, masked)
        values = carried.of(graph)
    if captured.probed:
        notes.append(
            "no example_inputs: MACs are for an assumed input size, and the result was not verified"
            if captured.inputs
            else _NO_SHAPES
        )
    if fold_batch_norm:
        notes.append("BatchNorm is folded: the result equals the masked model in evaluation mode only")
    report = make_report(
        plan,
        dense,
        graph,
        values,
        errors={name: fit.refitted for name, fit in getattr(masked, FITS, {}).items()},
        params_dense=params_dense,
        input_shapes=tuple(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)),
        notes=tuple(notes),
        agreement=getattr(masked, AGREEMENT, None),
    )
    modes = ("eval",) if fold_batch_norm else captured.modes
    rounding = max((torch.finfo(p.dtype).eps for p in result.parameters() if p.is_floating_point()), default=0.0)
    options = {"fold_batch_norm": fold_batch_norm}
    surgery = describe(masked, result) if isinstance(captured, Recording) else {}
    keep_record(result, Record(plan, report, inputs, modes, options, rounding if fold_batch_norm else 0.0, surgery))
    if not (plan.layers or plan.removed or plan.branches):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:3])
        warn_user(
            f"no convolution was rewritten, the result is as large as the model ({reasons or 'the plan is empty'})",
            NothingRewrittenWarning,
        )
    return result


def _operated(
    masked: nn.Module, plan: PrunePlan, recording: Recording
) -> tuple[nn.Module, fx.GraphModule, Mapping[fx.Node, Any], PrunePlan]:
    """A copy of the user's model with smaller layers; its graph and what that gives, for the report; and the plan as
    far as it could be followed: a layer that would need gathers in the model's own code stays dense.
    """
    current = masked
    if plan.removed:
        current, recording = narrow(masked, plan, recording)
    kernels = replace(plan, removed={})
    while True:
        carried = CarriedValues(recording.inputs, recording.values)
        run(recording.module, default_pipeline(kernels, carried, for_module=True), recording.inputs)
        try:
            result = operate(current, recording.module)
        except PlacementError as error:
            if not error.layers.keys() & kernels.layers.keys():
                raise PassError(
                    f"{error}; leave the layers before it dense with ignore=, or pass output='graph'"
                ) from error
            kernels = _without(kernels, error.layers)
            recording = recorded(current, recording.examples)
            continue
        for told in (FITS, AGREEMENT):
            vars(result).pop(told, None)
        return result, recording.module, carried.of(recording.module), replace(kernels, removed=plan.removed)


def _without(plan: PrunePlan, dense: Mapping[str, str]) -> PrunePlan:
    """The plan if some layers stay dense, for reasons."""
    reasons = {name: why for name, why in dense.items() if name in plan.layers}
    kept = {name: kernels for name, kernels in plan.layers.items() if name not in reasons}
    return replace(plan, layers=kept, skipped={**plan.skipped, **reasons})


_NO_SHAPES = (
    "no example_inputs, and no usual input size fits the model: "
    "all channels keep their order, and more gathers remain than need be"
)
