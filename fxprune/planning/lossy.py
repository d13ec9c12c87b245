"""The one step that changes the function: what a plan drops becomes zero, and what stays is refitted."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.calibration import FITS, Calibration
from fxprune.calibration.agreement import AGREEMENT, Agreement, measure_agreement
from fxprune.calibration.judging import TOLD, Judge
from fxprune.calibration.recovery import Recovery, drawn_from
from fxprune.calibration.subject import Subject
from fxprune.errors import CalibrationError, PlanError, PoorAgreementWarning, warn_user
from fxprune.exact.narrowing import narrow
from fxprune.exact.pipeline import run
from fxprune.graph.baking import baked
from fxprune.graph.convolutions import Layer, convolutions, kernels_of, oriented
from fxprune.graph.copying import copied, own_tensors
from fxprune.graph.editing import Pass
from fxprune.graph.examples import Inputs
from fxprune.graph.modes import in_evaluation
from fxprune.graph.recording import Recording
from fxprune.graph.tracing import check_is_model
from fxprune.graph.values import CarriedValues
from fxprune.passes import RemoveBranches, RemoveChannels
from fxprune.planning.estimates import REFIT, TELLING, foreseen_refit
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.plans.eligibility import obstacle_of, parameters_of_several_modules, refittable_linears
from fxprune.plans.fields import check_seed
from fxprune.plans.masking import (
    entries_without_branches,
    entries_without_removed,
    kept_entries,
    kernels_that_stay,
    masked_copy,
    remaining,
    zero_pruned,
)
from fxprune.plans.plan import check_is_plan
from fxprune.plans.shapes import AUTO_GROUPS
from fxprune.vocabulary import AugmentName


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
        PoorAgreementWarning, UnlikeTrainingWarning: see `compile`.
    """
    check_is_model(model)
    check_is_plan(plan)
    if bake:
        model, _ = baked(model)
    plan.check(model)
    if calibration is None:
        return masked_copy(model, plan)
    subject = Subject(model, example_inputs, calibration, "auto")
    subject.announce(foreseen_refit(subject), progress)
    subject.begin(REFIT)
    masked = masked_by(subject, plan, progress=progress)
    tell_agreement(subject, plan, masked, progress=progress)
    subject.finish()
    return masked


def recover(
    model: nn.Module,
    masked: nn.Module,
    plan: PrunePlan,
    calibration: Calibration,
    *,
    example_inputs: Inputs | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    augment: AugmentName | Callable[[Any], Any] | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Return a copy of `masked` whose weights were trained on the calibration images, without labels, until its blocks
    give what those of `model` give: residual additions, concatenations, ends of stages. What `plan` drops stays zero,
    statistics stay what they are, and nothing has to be tuned (`fxprune.calibration.recovery`).

        plan = fxprune.make_plan(model, macs=0.5, calibration=images)
        masked = fxprune.mask(model, plan, images)
        masked = fxprune.recover(model, masked, plan, images, seconds=120, augment="flip+crop")
        small = fxprune.rewrite(masked, plan, images[:2])

    A tenth of the images is held out; the result has the weights that did best on them, and is `masked` unchanged where
    none did better. How it went is logged, and is kept with the result (`fxprune.calibration.recovery.RECOVERED`).
    Under `torch.autocast("cpu", torch.bfloat16)`, or `"cuda"`, it computes in bfloat16.

    Args:
        model: the dense model, as it was pruned. It is not changed.
        masked: what `mask` made of it, or training under a `Sparsifier`. It is not changed.
        plan: what is pruned in `masked`.
        calibration: see `compile`; a few hundred inputs. They are drawn one by one, whatever the batches are.
        example_inputs: see `mask`.
        seconds: how long it may take, by the clock.
        steps: how many steps it may make, of 32 inputs or fewer; equal arguments then give equal weights. If both are
            given, it ends with what comes first. By default 1500 steps, and at most 180 seconds.
        augment: changes each batch, so that few inputs go further: `"flip"` mirrors images, `"crop"` shifts them by up
            to an eighth, `"flip+crop"` does both; or a function of the tensor that forward takes, of the tuple if it
            takes several. Only what the network has been trained to see alike helps.
        seed: of the inputs that are held out, of their order, and of `augment`.
        progress: show a bar on stderr, with the held-out loss.
        checkpoint: a file in which the state is kept. If it exists, recovery goes on where it stopped; with the same
            arguments it must be called with.

    Raises:
        PlanError: an argument is not legal, the plan was made for another model, or `masked` is not pruned by it.
        CalibrationError: the calibration data are malformed, do not fit the model or hold one input; `augment` fails or
            changes shapes.
        StorageError: the checkpoint cannot be read or written, or is of another run.
        TraceError: a model cannot be traced.

    Warns:
        UnlikeTrainingWarning: see `compile`.
    """
    recovery = Recovery(seconds=seconds, steps=steps, augment=augment, checkpoint=checkpoint)
    check_seed(seed)
    plan.check(model)
    subject = Subject(model, example_inputs, calibration, "auto")
    return recovered_by(subject, masked, plan, recovery, seed=seed, progress=progress)


def refit(
    model: nn.Module,
    masked: nn.Module,
    plan: PrunePlan,
    calibration: Calibration,
    *,
    example_inputs: Inputs | None = None,
    progress: bool = False,
) -> nn.Module:
    """Return a copy of `masked` whose layers are refitted once more, as they are now: after training, recovery, or a
    change of the data. `mask` with calibration data has done it once.

        masked = fxprune.recover(model, masked, plan, images)
        masked = fxprune.refit(model, masked, plan, more_images)

    Layer by layer the kernels that stay are solved so that what the next layer reads is what it reads in `model`; the
    BatchNorm that follows counts as it is now in each of both, and the pull is toward the present weights. Outputs of
    `model` are the only target: what training has found better than the dense network is given up as far as the data
    speak against it. What `plan` drops stays zero.

    Args:
        model: the dense model, which the result is to follow. It is not changed.
        masked: what `mask` or `recover` made of it, or training under a `Sparsifier`. It is not changed.
        plan: what is pruned in `masked`.
        calibration: see `compile`.
        example_inputs: see `mask`.
        progress: show a bar on stderr.

    Raises:
        PlanError: the plan was made for another model, or `masked` is not pruned by it.
        CalibrationError: the calibration data are malformed, or do not fit the model.
        TraceError: a model cannot be traced.

    Warns:
        UnlikeTrainingWarning: see `compile`.
    """
    check_is_model(model)
    check_is_plan(plan)
    plan.check(model)
    subject = Subject(model, example_inputs, calibration, "auto")
    result, kept = _copy_pruned_by(masked, plan)
    layers: dict[str, Layer] = {**convolutions(result), **refittable_linears(subject.layers, subject.trace)}
    reading = {*_readers(layers, plan), *_behind_branches(subject, plan)}
    stays = {
        name: kernels_that_stay(plan, name, *kernels_of(layer).shape[:2])
        for name, layer in layers.items()
        if name in plan.layers or name in reading
    }
    subject.announce(foreseen_refit(subject, agreement=False), progress)
    subject.begin(REFIT)
    subject.refit(result, stays, plan.seed, progress)
    subject.finish()
    zero_pruned(result, kept)  # the fit gives the removed filters a bias again
    vars(result).pop(AGREEMENT, None)  # it was of what it was before
    return result


def _readers(layers: Mapping[str, Layer], plan: PrunePlan) -> list[str]:
    """The layers that read channels which `plan` removes, and can be solved without these."""
    return [
        name
        for name, layer in layers.items()
        if getattr(layer, "groups", 1) == 1 and name in plan.removed and plan.removed[name].inputs
    ]


def _copy_pruned_by(masked: nn.Module, plan: PrunePlan) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A copy of a masked model, and what stays of its parameters.

    Raises:
        PlanError: it is not pruned by the plan.
    """
    kept = kept_entries(masked, plan)
    with torch.inference_mode(False):
        result = copied(masked)
    zero_pruned(result, kept)
    now, before = result.state_dict(), masked.state_dict()
    if changed := next((name for name in kept if not torch.equal(now[name], before[name])), None):
        raise PlanError(
            f"{changed}: the plan drops entries that are not zero; pass what fxprune.mask gave for this plan"
        )
    return result, kept


def recovered_by(
    subject: Subject, masked: nn.Module, plan: PrunePlan, recovery: Recovery, *, seed: int = 0, progress: bool = False
) -> nn.Module:
    """The same for a model whose trace and calibration data are known."""
    if subject.batches is None:
        raise CalibrationError("recovery learns from calibration data; pass calibration=, or leave recover out")
    subject.finish()  # recovery has a bar of its own, with the held-out loss
    result = trained(subject, masked, plan, recovery, seed, progress=progress)
    held = [batch for batch, _ in drawn_from(subject.batches, seed).held_out()]
    with in_evaluation(result):
        dense = copied(subject.model).eval()  # the refit was fitted to what recovery held out, so this flatters
        setattr(result, AGREEMENT, measure_agreement(dense, result, held, subject.output_of, held_out=False))
    return result


def trained(
    subject: Subject, masked: nn.Module, plan: PrunePlan, recovery: Recovery, seed: int, *, progress: bool = False
) -> nn.Module:
    """A copy of `masked` that was recovered; how near it comes is not looked at."""
    result, kept = _copy_pruned_by(masked, plan)
    subject.recover(result, kept, plan.branches, recovery, seed, progress)
    return result


def masked_by(subject: Subject, plan: PrunePlan, *, progress: bool = False) -> nn.Module:
    """The same for a model whose trace and calibration data, if there are any, are known.

    What whole branches leave is refitted first, then what whole channels leave of that, then the kernels of the rest.
    """
    model = subject.model
    if subject.batches is None:
        return masked_copy(model, plan)
    if plan.branches:
        masked = copied(model)
        zero_pruned(masked, entries_without_branches(model, plan))
        refit_behind_branches(subject, masked, plan, progress=progress)
        rest = replace(plan, branches={})
        if rest.layers or rest.removed:
            left = subject.of(without_removed(subject, masked, replace(plan, removed={})))
            put_back(masked, masked_by(left, rest, progress=progress), rest)
        return masked
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
    if subject.batches is None or not (plan.layers or plan.removed or plan.branches):
        return None
    judge = Judge(subject, TOLD)
    fitted = judge.fitted.refitted_as(masked)
    fitted.begin(TELLING)
    twin = masked_by(fitted, plan, progress=progress) if judge.held_out else copied(masked)
    found = judge.agreement(twin)
    if found is not None:
        setattr(masked, AGREEMENT, found)
        if found.is_poor:
            warn_user(f"{found}; {way_out(plan, recovered=False)}", PoorAgreementWarning)
    return found


def refit_readers(subject: Subject, masked: nn.Module, plan: PrunePlan, *, progress: bool = False) -> None:
    """Refit, in place, the layers that read channels which `plan` removes: their other weights make up for them."""
    layers: dict[str, Layer] = {**convolutions(masked), **refittable_linears(subject.layers, subject.trace)}

    def choose(name: str, layer: Layer, samples: object) -> GroupedKernels:
        return _one_group(layer, plan.removed[name].inputs)

    subject.reconstruct(masked, _readers(layers, plan), choose, plan.seed, progress)
    zero_pruned(masked, entries_without_removed(masked, plan))  # the fit gives the removed filters a value again


def refit_behind_branches(subject: Subject, masked: nn.Module, plan: PrunePlan, *, progress: bool = False) -> None:
    """Refit, in place, all layers behind the first branch that `plan` removes, toward what they gave in the dense
    network; those that feed a sum so that the sum comes out right, see `fxprune.calibration.refitting`.
    """
    layers = _behind_branches(subject, plan)
    subject.reconstruct(masked, layers, lambda name, layer, samples: _one_group(layer), plan.seed, progress)


def _behind_branches(subject: Subject, plan: PrunePlan) -> list[str]:
    """The layers behind the first branch that `plan` removes that can be solved anew."""
    if not plan.branches:
        return []
    gone = {name for names in plan.branches.values() for name in names}
    shared = parameters_of_several_modules(subject.layers)
    layers: dict[str, Layer] = {
        name: conv
        for name, conv in convolutions(subject.layers).items()
        if name not in subject.obstacles and not obstacle_of(conv, shared)
    }
    layers |= refittable_linears(subject.layers, subject.trace)
    called = [str(node.target) for node in subject.trace.module.graph.nodes if node.op == "call_module"]
    behind = dict.fromkeys(called[min(map(called.index, plan.branches)) :])
    return [name for name in behind if name in layers and name not in gone]


def _one_group(layer: Layer, removed: Collection[int] = ()) -> GroupedKernels:
    """A layer that is solved anew as it is, without some of its input channels."""
    filters, channels = kernels_of(layer).shape[:2]
    return GroupedKernels(tuple(range(filters)), (tuple(remaining(channels, removed).tolist()),), channels, 0.0)


def without_removed(subject: Subject, masked: nn.Module, plan: PrunePlan) -> nn.Module:
    """The network without the branches and channels that `plan` removes, its convolutions still dense: a graph, or the
    user's own module.

    Raises:
        PlanError: branches are to go from the user's own module.
    """
    traced = subject.captured(masked)
    if isinstance(traced, Recording):
        if plan.branches:
            raise PlanError(
                "a branch cannot go from the model's own module, whose forward computes it; pass output='graph'"
            )
        return narrow(masked, plan, traced)[0]
    values = CarriedValues(traced.inputs, traced.values)
    passes: list[Pass] = [RemoveBranches(plan, values)] if plan.branches else []
    run(traced.module, (*passes, *([RemoveChannels(plan, values)] if plan.removed else [])), traced.inputs)
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


def way_out(plan: PrunePlan, *, recovered: bool) -> str:
    """What to try where the agreement is poor and was not tried, as the end of a warning."""
    others = ["a smaller ratio or larger budget"]
    if not recovered:
        others = ["recovery (recover=True, --recover)", *others]
    if any(kernels.groups < AUTO_GROUPS[0] for kernels in plan.layers.values()):
        others += [f"{AUTO_GROUPS[0]} groups for kernels"]
    return f"more calibration images help most; then {', '.join(others)}, or fine-tuning"
