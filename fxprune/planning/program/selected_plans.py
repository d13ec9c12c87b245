"""What was selected in a network as plans: branches first, then filters of what they leave, then kernels of that."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fxprune.calibration.subject import Subject
from fxprune.channels.removal import Removable
from fxprune.channels.units import STAYS, Chosen
from fxprune.planning.branches import plan_of_branches
from fxprune.planning.filters import plan_of_units, removable_of
from fxprune.planning.joint import joined, with_rest
from fxprune.planning.kernels import planned
from fxprune.planning.lossy import without_removed
from fxprune.planning.patterns import one_each
from fxprune.planning.program.kernel_ways import form_for
from fxprune.planning.program.terms import Selected
from fxprune.planning.requests import Request
from fxprune.plans import PrunePlan
from fxprune.plans.masking import masked_copy

WAY = "program"
"""How filters and branches were chosen, as a plan says it."""


@dataclass(frozen=True)
class SelectedPlans:
    """Makes plans for one network.

    Attributes:
        subject: the model.
        filters, of_kernels: the request for each.
        removable: the units of the network.
        branches: the modules of each branch that can go.
        layers: names of the convolutions whose kernels can go.
    """

    subject: Subject
    filters: Request
    of_kernels: Request
    removable: Removable
    branches: Mapping[str, tuple[str, ...]]
    layers: Collection[str]

    def whole(self, selected: Selected) -> PrunePlan | None:
        """The plan of the branches and filters that go, if any."""
        if not selected.branches:
            return self._plan_of(selected.removed, self.removable) if selected.removed.any() else None
        first = plan_of_branches(self.branches, selected.branches, self.filters.of_branches(), WAY)
        if not selected.removed.any():
            return first
        model = self.subject.model
        rest = self.subject.of(without_removed(self.subject, masked_copy(model, first), first))
        left = removable_of(rest, self.filters.patterns)
        return joined(first, self._plan_of(_same_units(self.removable, left, selected.removed), left))

    def kernels(self, selected: Selected) -> Request | None:
        """The request for the kernels of what these leave, if any go."""
        if not selected.ratios:
            return None
        gone = {layer for name in selected.branches for layer in self.branches[name]}
        ratios = one_each({name: selected.ratios.get(name, 0.0) for name in self.layers if name not in gone})
        groups, form = one_each(selected.groups), form_for(self.of_kernels)
        return self.of_kernels.without_budgets(ratio=ratios, groups=groups, form=form)

    def from_weights(self, selected: Selected) -> PrunePlan:
        """The plan of all, its kernels chosen in the cheapest way: which of them stay changes no time and no count."""
        whole, kernels, bare = self.whole(selected), self.kernels(selected), self.subject.without_data()
        if kernels is None:
            return PrunePlan({}) if whole is None else whole
        cheapest = kernels.by_weights(kernels.ratio, kernels.groups, kernels.form)
        if whole is None:
            return planned(bare, cheapest)[0]
        return with_rest(bare, whole, lambda rest: planned(rest, cheapest))[0]

    def _plan_of(self, goes: Chosen, removable: Removable) -> PrunePlan:
        return plan_of_units(self.subject, self.filters, removable, goes, f"filter, {WAY}", "loss")


def _same_units(before: Removable, after: Removable, chosen: Chosen) -> Chosen:
    """The units of a network without some branches that are chosen in the one with them, by the filters that both
    have.
    """
    goes = np.zeros(after.units.count, dtype=np.bool_)
    was = np.append(chosen, False)  # STAYS is the last
    for name, layer in after.units.layers.items():
        movable = layer.writes != STAYS
        goes[layer.writes[movable]] |= was[before.units.layers[name].writes[movable]]
    return goes
