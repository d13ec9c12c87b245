"""Lottery tickets: subnetworks that are trained again from early weights, and random ones to judge them by.

A plan is chosen on the trained network. A *ticket* is the early network with what the plan drops set to zero; trained
as the dense one was, it may reach the same accuracy (Frankle, Carbin, "The Lottery Ticket Hypothesis: Finding Sparse,
Trainable Neural Networks", ICLR 2019, section 1). Large networks need weights of an early epoch instead of the first
ones (Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020,
section 4):

    early = copy.deepcopy(model.state_dict())        # at the start, or after an epoch or two
    ...                                              # train
    plan = fxprune.make_plan(model, ratio=0.5)
    ticket = fxprune.rewind(model, plan, early)
    sparsifier = fxprune.hold(ticket, plan, optimizer)
    ...                                              # train again: from the epoch of `early`, with its learning rates

*Learning-rate rewinding* (Renda, Frankle, Carbin, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", ICLR
2020, section 2) keeps the trained weights and repeats the learning rates of the early epochs. It needs no early
weights: `hold(mask(model, plan), plan, optimizer)` and a schedule of learning rates that begins anew.

What a ticket is worth shows against a *random ticket*, of as many kernels and filters, retrained alike from the same
seed, and against plain fine-tuning.
"""

import copy
import glob
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.calibration.subject import Subject
from fxprune.criteria.snapshots import Snapshot, state_of
from fxprune.errors import PlanError, near_matches
from fxprune.files import without_prefix
from fxprune.graph.convolutions import convolutions
from fxprune.graph.examples import Inputs
from fxprune.methods import Clustering
from fxprune.planning.filters import removable_of, removed_units
from fxprune.planning.selection import random_units
from fxprune.plans import GroupedKernels, PrunePlan, RemovedChannels
from fxprune.plans.fields import check_seed
from fxprune.plans.masking import kept_entries, zero_pruned


def rewind(
    model: nn.Module, plan: PrunePlan, early: Snapshot, *, batch_norm: Literal["reset", "rewind"] = "reset"
) -> nn.Module:
    """A copy of `model` with its early weights, and zeros where `plan` drops something.

    Args:
        model: the dense model that the plan was made for. It is not changed.
        plan: what to drop.
        early: the model earlier in its training: a state dict, a module, or the path of a file, see
            `fxprune.make_plan(snapshots=...)`. All parameters and buffers must be in it; they are copied.
        batch_norm: `"reset"`: BatchNorm begins anew, scale 1, shift 0, without statistics, as tickets of the library
            fasterai do, whichever epoch the other weights are of; `"rewind"`: it goes back with them.

    Returns:
        the ticket, in the mode, type and device of `model`. Train it under `fxprune.hold`.

    Raises:
        PlanError: the plan or the early state is of another model, holds NaN or infinity, or cannot be read.
    """
    if batch_norm not in ("reset", "rewind"):
        raise PlanError(f"batch_norm is {batch_norm!r}; it must be 'reset' or 'rewind'")
    kept = kept_entries(model, plan)
    ticket = copy.deepcopy(model)
    ticket.load_state_dict(_checked(state_of("early", early), model.state_dict()))
    if batch_norm == "reset":
        for module in ticket.modules():
            if isinstance(module, _BatchNorm):
                module.reset_parameters()
    zero_pruned(ticket, kept)  # last: what BatchNorm has of removed channels goes too
    return ticket


def random_ticket(model: nn.Module, plan: PrunePlan, seed: int, example_inputs: Inputs | None = None) -> PrunePlan:
    """A plan that drops as much as `plan` does in each layer, but at random.

    Every layer keeps its form, its number of groups, and how many channels each keeps (in blocks if they are kept in
    blocks); which filters are grouped and which channels they keep is drawn, uniformly. Layers with the same groups
    of filters get the same again, so that the rewritten network has no more gathers than that of `plan`.

    Of whole filters, each channel space loses as many as in `plan`, drawn uniformly; all layers that share the space
    lose the same.

    Args:
        model: the model that the plan was made for.
        plan: what to be compared with.
        seed: of the draw, 0 or more; that of a layer's kernels depends on its name and the seed alone.
        example_inputs: positional arguments of forward, as the plan was made with; probed if absent. Only a plan that
            removes whole filters needs them.

    Raises:
        PlanError: the plan was made for another model or other inputs, the seed is no such integer, or the shapes of
            the model are not known.
        TraceError: the plan removes whole filters, and the model cannot be traced.
    """
    check_seed(seed)
    plan.check(model)
    if plan.branches:
        raise PlanError("the plan removes whole branches, of which none are drawn; compare plans of kernels or filters")
    removed = _drawn_channels(model, plan, seed, example_inputs) if plan.removed else {}
    grouping: dict[tuple[tuple[int, ...], int], str] = {}  # groups of filters to the first layer that has them
    layers = {}
    for name, kernels in plan.layers.items():
        first = grouping.setdefault((kernels.out_order, kernels.groups), name)
        filters, channels = (np.random.default_rng([seed, *path.encode()]) for path in (first, f"{name}.kept"))
        layers[name] = _drawn(kernels, filters, channels)
    return replace(plan, layers=layers, removed=removed, method="random", criterion="random", seed=seed)


def _drawn_channels(
    model: nn.Module, plan: PrunePlan, seed: int, example_inputs: Inputs | None
) -> dict[str, RemovedChannels]:
    """As many units of each channel space as `plan` removes."""
    whole = [
        glob.escape(name) for name in convolutions(model) if not plan.removed.get(name, RemovedChannels()).outputs
    ]  # left out as the plan left them out, or the same channels may form other spaces
    removable = removable_of(Subject(model, example_inputs, None), whole)
    units = removed_units(removable, plan)
    found = removable.removed(units)
    for name in {**plan.removed, **found}:
        ours, theirs = found.get(name, RemovedChannels()), plan.removed.get(name, RemovedChannels())
        if (ours.outputs, ours.inputs) != (theirs.outputs, theirs.inputs):
            raise PlanError(
                f"{name}: the plan removes channels of it that do not go together, or not all that do; make the plan "
                "with fxprune.make_plan for this model, and pass the example_inputs that it was made with"
            )
    drawn = removable.removed(random_units(removable.units, units, seed))
    asked = {name: channels.asked_ratio for name, channels in plan.removed.items()}
    return {name: replace(channels, asked_ratio=asked.get(name)) for name, channels in drawn.items()}


def _drawn(kernels: GroupedKernels, filters: np.random.Generator, channels: np.random.Generator) -> GroupedKernels:
    """A layer of the same counts; one generator draws the groups of filters, the other their channels."""
    groups, blocks = kernels.groups, kernels.in_channels // kernels.block
    labels = filters.permutation(np.repeat(np.arange(groups), kernels.group_width))
    if kernels.form == "partition":
        dealt = channels.permutation(np.repeat(np.arange(groups), blocks // groups))
        chosen = np.equal.outer(np.arange(groups), dealt)  # (n, C / block)
    else:
        kept = np.arange(blocks) < kernels.kept_channels // kernels.block
        chosen = np.stack([channels.permutation(kept) for _ in range(groups)])
    drawn = Clustering.from_labels(labels, chosen.repeat(kernels.block, axis=1))
    return replace(kernels, out_order=drawn.out_order, kept=drawn.kept, redundancy=None, block_cost=None)


def _checked(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The early state, complete, of the shapes that the model has and with finite values."""
    state = without_prefix(state, list(own))
    for names, known, who in ((own, state, "the early state has no"), (state, own, "the model has no")):
        for name in names:
            if name not in known:
                raise PlanError(f"early: {who} {name!r}{near_matches(name, known)}; pass a state of the same model")
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise PlanError(
                f"early: {name!r} has shape {tuple(state[name].shape)}, in the model {tuple(value.shape)}; pass a "
                "state of the same model"
            )
        if not torch.isfinite(state[name]).all():
            raise PlanError(f"early: {name!r} holds NaN or infinity; pass a state from before that")
    return state
