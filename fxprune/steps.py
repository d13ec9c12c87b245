"""The steps that follow a plan: mask, the only one that changes the function, and rewrite, which is exact."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.acceleration import ACCELERATION
from fxprune.calibration import FITS, Calibration
from fxprune.errors import FxpruneError, NothingRewrittenWarning, TraceError
from fxprune.masking import entries_without_removed, kept_entries, remaining, zero_pruned
from fxprune.passes import RemoveChannels
from fxprune.pipeline import default_pipeline, run
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.report import Report, layer_costs, make_report
from fxprune.subject import Subject
from fxprune.tracing import Inputs, meta_values, trace
from fxprune.verification import RECORD


@dataclass(frozen=True)
class Record:
    """What a compiled module remembers, under `gm.meta["fxprune"]`: survives deepcopy, not pickle.

    Attributes:
        plan: the plan that was applied.
        report: the account of the result.
        inputs: arguments of forward as meta tensors, as the shapes were known at compile time.
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


def mask(
    model: nn.Module, plan: PrunePlan, calibration: Calibration | None = None, *, progress: bool = False
) -> nn.Module:
    """Return a copy of `model` in which the kernels and channels that `plan` drops are zero: the oracle of all that
    follows.

    Args:
        model: the dense model. It is not changed.
        plan: what to drop.
        calibration: see `compile`; with it the kernels that stay are refitted.
        progress: show a bar on stderr.

    Raises:
        PlanError: the plan was made for another model.
        CalibrationError: the calibration data are malformed, or do not fit the model.
    """
    plan.check(model)
    data = None if calibration is None else Subject(model, None, calibration)
    return masked_by(model, plan, data, progress=progress)


def masked_by(model: nn.Module, plan: PrunePlan, data: Subject | None, *, progress: bool = False) -> nn.Module:
    """The same, given the calibration data with the trace of the model.

    What whole channels leave behind is refitted first, then the kernels of the network without them.
    """
    masked = copy.deepcopy(model)
    if data is None or not plan.removed:
        zero_pruned(masked, kept_entries(model, plan))
        if data is not None and plan.layers:
            data.reconstruct(masked, plan.layers, lambda name, conv, samples: plan.layers[name], plan.seed, progress)
        return masked
    zero_pruned(masked, entries_without_removed(model, plan))
    refit_readers(masked, plan, data, progress=progress)
    if plan.layers:
        smaller = without_removed(masked, plan, data.example_inputs)
        kernels = replace(plan, removed={})
        put_back(masked, masked_by(smaller, kernels, data.of(smaller), progress=progress), plan)
    return masked


def refit_readers(masked: nn.Module, plan: PrunePlan, data: Subject, *, progress: bool = False) -> None:
    """Refit, in place, the convolutions that read channels which `plan` removes: the others make up for them."""
    readers = [
        name
        for name, conv in masked.named_modules()
        if isinstance(conv, nn.Conv2d) and conv.groups == 1 and name in plan.removed and plan.removed[name].inputs
    ]

    def choose(name: str, conv: nn.Conv2d, samples: object) -> GroupedKernels:
        kept = tuple(remaining(conv.in_channels, plan.removed[name].inputs).tolist())
        return GroupedKernels(tuple(range(conv.out_channels)), (kept,), conv.in_channels, 0.0)

    data.reconstruct(masked, readers, choose, plan.seed, progress)
    zero_pruned(masked, entries_without_removed(masked, plan))  # the fit gives the removed filters a value again


def without_removed(masked: nn.Module, plan: PrunePlan, example_inputs: Inputs | None) -> fx.GraphModule:
    """The network without the channels that `plan` removes, its convolutions still dense."""
    traced = trace(masked, example_inputs)
    run(traced.module, (RemoveChannels(plan, traced.inputs),), traced.inputs)
    _own_tensors(traced.module, masked)
    return traced.module


@torch.no_grad()
def put_back(masked: nn.Module, smaller: nn.Module, plan: PrunePlan) -> None:
    """Write the tensors of the network without the removed channels to their places in the masked one, in place."""
    setattr(masked, FITS, getattr(masked, FITS, {}) | getattr(smaller, FITS, {}))
    found = smaller.state_dict()
    for name, tensor in masked.state_dict().items():
        if name not in found:
            continue
        new, channels = found[name], plan.removed.get(name.rpartition(".")[0])
        if tensor.shape == new.shape:
            tensor.copy_(new)
        elif channels is not None:
            rows = remaining(tensor.shape[0], channels.outputs)
            if tensor.dim() > 1 and tensor.shape[1] != new.shape[1]:
                tensor[rows[:, None], remaining(tensor.shape[1], channels.inputs)] = new
            else:
                tensor[rows] = new


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
    run(gm, default_pipeline(plan, traced.inputs, fold_batch_norm=fold_batch_norm), traced.inputs)
    _own_tensors(gm, masked)
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
        meta_values(gm, traced.inputs)[0] if traced.inputs else {},
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


def _own_tensors(gm: fx.GraphModule, masked: nn.Module) -> None:
    """Give `gm` its own copy of every tensor that it still shares with the masked model, one copy for each, so that
    ties stay.
    """
    shared = {id(t) for t in (*masked.parameters(), *masked.buffers())}
    copies: dict[int, Tensor] = {}
    for module in gm.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or id(tensor) not in shared:
                    continue
                if id(tensor) not in copies:
                    data = tensor.detach().clone()
                    copies[id(tensor)] = (
                        nn.Parameter(data, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else data
                    )
                store[name] = copies[id(tensor)]  # type: ignore[assignment]  # a parameter replaces a parameter
