"""The one step that changes the function: what a plan drops becomes zero, and what stays is refitted."""

import warnings
from dataclasses import replace

import torch
from torch import nn

from fxprune.calibration import FITS, Calibration
from fxprune.calibration.agreement import AGREEMENT, Agreement
from fxprune.calibration.judging import Judge
from fxprune.calibration.subject import Subject
from fxprune.errors import PoorAgreementWarning
from fxprune.exact.narrowing import narrow
from fxprune.exact.pipeline import run
from fxprune.graph.baking import baked
from fxprune.graph.convolutions import Convolution, convolutions, oriented
from fxprune.graph.copying import copied, own_tensors
from fxprune.graph.examples import Inputs
from fxprune.graph.recording import Recording
from fxprune.graph.values import CarriedValues
from fxprune.passes import RemoveChannels
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.plans.masking import entries_without_removed, masked_copy, remaining, zero_pruned


def mask(
    model: nn.Module,
    plan: PrunePlan,
    calibration: Calibration | None = None,
    *,
    example_inputs: Inputs | None = None,
    bake: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Return a copy of `model` in which the kernels and channels that `plan` drops are zero: the oracle of all that
    follows.

    Args:
        model: the dense model. It is not changed.
        plan: what to drop.
        calibration: see `compile`; with it the kernels that stay are refitted.
        example_inputs: see `compile`; needed where forward takes arguments by name, or more than it requires.
        bake: make computed weights plain ones first, as for `make_plan(..., bake=True)`.
        progress: show a bar on stderr.

    Raises:
        PlanError: the plan was made for another model.
        CalibrationError: the calibration data are malformed, or do not fit the model.
        TraceError: with calibration data, the model does not run on the example.

    Warns:
        PoorAgreementWarning: see `compile`.
    """
    if bake:
        model, _ = baked(model)
    plan.check(model)
    if calibration is None:
        return masked_copy(model, plan)
    subject = Subject(model, example_inputs, calibration, "auto")
    masked = masked_by(subject, plan, progress=progress)
    tell_agreement(subject, plan, masked, progress=progress)
    return masked


def masked_by(subject: Subject, plan: PrunePlan, *, progress: bool = False) -> nn.Module:
    """The same for a model whose trace and calibration data, if there are any, are known.

    What whole channels leave behind is refitted first, then the kernels of the network without them.
    """
    model = subject.model
    if subject.batches is None:
        return masked_copy(model, plan)
    if not plan.removed:
        masked = masked_copy(model, plan)
        if plan.layers:
            subject.reconstruct(masked, plan.layers, lambda name, conv, samples: plan.layers[name], plan.seed, progress)
        return masked
    masked = copied(model)
    zero_pruned(masked, entries_without_removed(model, plan))
    refit_readers(subject, masked, plan, progress=progress)
    if plan.layers:
        smaller = without_removed(subject, masked, plan)
        kernels = replace(plan, removed={})
        put_back(masked, masked_by(subject.of(smaller), kernels, progress=progress), plan)
    return masked


def tell_agreement(subject: Subject, plan: PrunePlan, masked: nn.Module, *, progress: bool = False) -> Agreement | None:
    """Measure how well `plan` follows the dense network on inputs it is not refitted on, keep that with `masked`, which
    was refitted on all, for its report, and warn if it is poor. None without calibration data, and where outputs cannot
    be compared.

    Warns:
        PoorAgreementWarning: below 90 %.
    """
    if subject.batches is None or not (plan.layers or plan.removed):
        return None
    judge = Judge(subject)
    twin = masked_by(judge.fitted, plan, progress=progress) if judge.held_out else copied(masked)
    found = judge.agreement(twin)
    if found is not None:
        setattr(masked, AGREEMENT, found)
        if found.is_poor:
            warnings.warn(f"{found}; {_WAY_OUT}", PoorAgreementWarning, stacklevel=3)
    return found


def refit_readers(subject: Subject, masked: nn.Module, plan: PrunePlan, *, progress: bool = False) -> None:
    """Refit, in place, the convolutions that read channels which `plan` removes: the others make up for them."""
    readers = [
        name
        for name, conv in convolutions(masked).items()
        if conv.groups == 1 and name in plan.removed and plan.removed[name].inputs
    ]

    def choose(name: str, conv: Convolution, samples: object) -> GroupedKernels:
        kept = tuple(remaining(conv.in_channels, plan.removed[name].inputs).tolist())
        return GroupedKernels(tuple(range(conv.out_channels)), (kept,), conv.in_channels, 0.0)

    subject.reconstruct(masked, readers, choose, plan.seed, progress)
    zero_pruned(masked, entries_without_removed(masked, plan))  # the fit gives the removed filters a value again


def without_removed(subject: Subject, masked: nn.Module, plan: PrunePlan) -> nn.Module:
    """The network without the channels that `plan` removes, its convolutions still dense: a graph, or the user's own
    module.
    """
    traced = subject.captured(masked)
    if isinstance(traced, Recording):
        return narrow(masked, plan, traced)
    values = CarriedValues(traced.inputs, traced.values)
    run(traced.module, (RemoveChannels(plan, values),), traced.inputs)
    own_tensors(traced.module, masked)
    return traced.module


@torch.no_grad()
def put_back(masked: nn.Module, smaller: nn.Module, plan: PrunePlan) -> None:
    """Write the tensors of the network without the removed channels to their places in the masked one, in place."""
    setattr(masked, FITS, getattr(masked, FITS, {}) | getattr(smaller, FITS, {}))
    found, convs = smaller.state_dict(), convolutions(masked)
    for name, tensor in masked.state_dict().items():
        if name not in found:
            continue
        holder, _, attribute = name.rpartition(".")
        new, channels = found[name], plan.removed.get(holder)
        if attribute == "weight" and holder in convs:
            tensor, new = oriented(tensor, convs[holder]), oriented(new, convs[holder])
        if tensor.shape == new.shape:
            tensor.copy_(new)
        elif channels is not None:
            rows = remaining(tensor.shape[0], channels.outputs)
            if tensor.dim() > 1 and tensor.shape[1] != new.shape[1]:
                tensor[rows[:, None], remaining(tensor.shape[1], channels.inputs)] = new
            else:
                tensor[rows] = new


_WAY_OUT = (
    "more calibration images help most; then a smaller ratio or larger budget, groups=8, or a few epochs of fine-tuning"
)
