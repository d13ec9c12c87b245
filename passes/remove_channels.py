"""conv(x, W) without filter o, and the next conv without input channel o == the same, if filter o gives zero.

W1 (O, C, kh, kw), W2 (P, O, kh, kw): y = W2 * f(W1 * x) reads channel o of f(W1 * x) in W2[:, o] only. If W1[o], its
bias and the BatchNorm scale and shift of o are zero, and f keeps zero, that channel is zero: W2[:, o] does not matter.

1. Every module and parameter that the plan names loses its channels: filters, input channels, entries.
2. GroupNorm and LayerNorm go on counting the zeros in their statistics, see `fxprune.graph.norms`.
3. Operators that move channels with sizes written into them (slices, views, shuffles, padding) are corrected, see
   `fxprune.channels.compaction`; what cannot be corrected becomes a gather.
Left alone: nothing that the plan names. An error: channels that are not zero, or of which the plan names some but not
all that go together; channels that cannot go, with the reason (`fxprune.channels.removability`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.channels import ChannelAnalysis, analyze_channels
from fxprune.channels.compaction import Classes, Compaction, shorten
from fxprune.channels.removability import irremovable
from fxprune.channels.removal import entries_of
from fxprune.errors import PassError
from fxprune.graph.convolutions import Convolution, filter_dim
from fxprune.graph.editing import Outcome, Tensors, calls
from fxprune.graph.norms import norm_kind, with_zeros
from fxprune.graph.values import CarriedValues
from fxprune.plans import PrunePlan, RemovedChannels
from fxprune.plans.masking import entries_without_removed, remaining

COUNTS = {
    "outputs": ("out_channels", "out_features", "num_features", "num_parameters", "num_channels"),
    "inputs": ("in_channels", "in_features"),
}
"""Attributes in which modules repeat how many channels they have."""


@dataclass(frozen=True)
class RemoveChannels:
    """Take the channels that `plan` removes out of every module.

    Attributes:
        plan: what to remove.
        values: what the nodes give, to know shapes.
    """

    plan: PrunePlan
    values: CarriedValues

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        values = dict(self.values.of(gm))
        analysis = analyze_channels(gm, values)
        removed = self._atoms(analysis)
        refused = irremovable(gm, values, analysis)
        for c in np.unique(analysis.blocks.classes[removed]).tolist():
            if c in refused:
                raise PassError(f"a channel that the plan removes cannot go: {refused[c]}; make the plan anew")
        self._check_zero(gm)
        compaction = Compaction(gm, values, analysis, removed)
        changed = compaction.apply()
        tensors, shorter = Tensors(gm), set[int]()
        for name, channels in self.plan.removed.items():
            _shrink(gm, tensors, shorter, analysis, compaction, name, channels)
        _count_zeros(gm, compaction, values)
        for node, norm in calls(gm, nn.modules.instancenorm._InstanceNorm):
            if str(node.target) not in self.plan.removed and node in values:  # it counts channels without having any
                dim = -norm._get_no_batch_dim()  # type: ignore[no-untyped-call]
                norm.num_features = compaction.size(node, dim)
        self.values.forget()
        return Outcome((*self.plan.removed, *changed))

    def _atoms(self, analysis: ChannelAnalysis) -> Classes:
        """Which atoms go; all of a class, and the plan must say so wherever they stand."""
        classes = analysis.blocks.classes
        gone = np.zeros(analysis.blocks.count, dtype=np.bool_)
        entries = entries_of(analysis)
        for entry in entries:
            channels = self.plan.removed.get(entry.name)
            if channels is not None:
                gone[classes[entry.atoms[list(getattr(channels, entry.kind))]]] = True
        for entry in entries:
            channels = self.plan.removed.get(entry.name, None)
            listed = () if channels is None else getattr(channels, entry.kind)
            found = tuple(np.flatnonzero(gone[classes[entry.atoms]]).tolist())
            if found != listed:
                odd = sorted(set(found) ^ set(listed))[0]
                raise PassError(
                    f"{entry.name}: channel {odd} of its {entry.kind} goes together with others, and the plan removes "
                    "some of them only; make the plan with fxprune.make_plan"
                )
        atoms: Classes = gone[classes]
        return atoms

    def _check_zero(self, gm: fx.GraphModule) -> None:
        for name, stays in entries_without_removed(gm, self.plan).items():
            holder, _, attribute = name.rpartition(".")
            count = int(getattr(gm.get_submodule(holder), attribute)[~stays].count_nonzero())
            if count:
                raise PassError(
                    f"{name}: {count} entries of channels that the plan removes are not zero; rewrite the model that "
                    "fxprune.mask returns"
                )


def _count_zeros(gm: fx.GraphModule, compaction: Compaction, values: Mapping[fx.Node, Any]) -> None:
    """Let normalisations over channels count those that are gone."""
    done: dict[nn.Module, nn.Module] = {}
    for node, norm in calls(gm, nn.Module):
        kind = None if norm in done.values() else norm_kind(norm)
        kept = None if kind is None else compaction.positions(node, kind.dim)
        if kind is not None and kept is not None:
            parent, _, child = str(node.target).rpartition(".")
            new = with_zeros(norm, kind, kept, channels=values[node].shape[kind.dim])
            setattr(gm.get_submodule(parent), child, done.setdefault(norm, new))


def _shrink(
    gm: fx.GraphModule,
    tensors: Tensors,
    shorter: set[int],
    analysis: ChannelAnalysis,
    compaction: Compaction,
    name: str,
    channels: RemovedChannels,
) -> None:
    """Remove channels from one module, or from a parameter that the graph reads itself.

    A tensor that several modules own is replaced in all of them at once: `shorter` has the `id` of each new one.
    """
    holder, _, attribute = name.rpartition(".")
    direct = next((s for s in analysis.scales if s.dim is None and (s.owner, s.attribute) == (holder, attribute)), None)
    if direct is not None:
        tensor = getattr(gm.get_submodule(holder), attribute)
        labels = torch.from_numpy(direct.atoms).reshape(tensor.shape)
        tensors.replace(tensor, shorten(tensor.detach(), compaction.keep(labels) or {}))
        return
    module = gm.get_submodule(name)
    if isinstance(module, Convolution | nn.Linear):
        swapped = isinstance(module, Convolution) and filter_dim(module) == 1
        along = {"weight": ("inputs", "outputs") if swapped else ("outputs", "inputs"), "bias": ("outputs",)}
    else:
        along = {scale.attribute: ("outputs",) for scale in analysis.scales if scale.owner == name}
    depthwise = isinstance(module, Convolution) and module.groups > 1
    for attribute, kinds in along.items():
        tensor = getattr(module, attribute)
        if isinstance(tensor, Tensor) and id(tensor) not in shorter:
            kept = {d: remaining(tensor.shape[d], getattr(channels, kind)) for d, kind in enumerate(kinds)}
            if depthwise:
                kept.pop(1, None)
            shorter.add(id(tensors.replace(tensor, shorten(tensor.detach(), kept))))
    for kind, attributes in COUNTS.items():
        for attribute in attributes:
            if isinstance(count := getattr(module, attribute, None), int):
                setattr(module, attribute, count - len(getattr(channels, kind)))
    if depthwise:
        assert isinstance(module, Convolution)
        module.in_channels = module.groups = (
            module.in_channels * module.out_channels // (module.out_channels + len(channels.outputs))
        )
