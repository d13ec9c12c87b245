"""One budget over filters, kernels and branches as one problem: what becomes of each channel space, convolution and
branch is chosen at once, by an integer program (`fxprune.planning.program.integer_program`).

Losses are on one scale: what is expected to come of it when the network is judged. The errors of single layers, spaces
and branches were measured each in its own way, so each kind is scaled by what the plan of that kind alone came to: the
squared distance from the dense network on held-out inputs, refitted, over the sum of its losses. (Squared, because
distances of class probabilities rise about with the root of the errors: on ResNet-20 from 0.017 to 0.029 to 0.053 where
the losses of kernels that go are 0.11, 0.39 and 0.84, and from 0.028 to 0.054 for 0.13 and 0.37 of filters.) Spaces
and layers lose what the way to spread that did best alone says: what was measured, the plainest, or between.

How good it is: on ResNet-20 at 57 % of the multiply-accumulates (1,024 images, one seed) its distance on held-out data
is 0.078, that of kernels alone 0.090 and of filters alone 0.101; with filters counted twice as much 0.088.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from typing import Generic, TypeVar

import numpy as np

from fxprune.calibration.agreement import Agreement
from fxprune.calibration.damage import loss_of
from fxprune.calibration.judging import Judge
from fxprune.calibration.subject import Subject
from fxprune.channels.removal import Removable
from fxprune.channels.units import Chosen
from fxprune.errors import PlanError
from fxprune.planning.branches import BranchPlanner
from fxprune.planning.candidates import judged_plans, tables
from fxprune.planning.filters import FilterPlanner, is_counted, plan_of_units, removed_units
from fxprune.planning.kernels import sensitivity_of
from fxprune.planning.latency.meeting import Meeting
from fxprune.planning.latency.network import WholeNetwork
from fxprune.planning.lossy import masked_by, without_removed
from fxprune.planning.program.integer_program import GAP, Array, Choice, IntegerProgram
from fxprune.planning.program.interaction import WIDTH, slopes
from fxprune.planning.program.kernel_ways import kernel_ways
from fxprune.planning.program.selected_plans import SelectedPlans
from fxprune.planning.program.terms import WIDTHS, Kernels, Losses, NetworkTerms, Selected, widths_of
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import LayerSensitivity, Sensitivity
from fxprune.planning.unit_sensitivity import UnitSensitivity
from fxprune.plans import PrunePlan

T = TypeVar("T")

LEAST_ERROR = 1e-8
"""A plan that changes nothing on the held-out inputs has such an error all the same, so that losses count."""


@dataclass(frozen=True)
class Alone(Generic[T]):
    """The whole budget spent on one kind.

    Attributes:
        way: how it was spread.
        what: the plan, or the request with ratios.
        agreement: what came of it.
    """

    way: str
    what: T
    agreement: Agreement | None

    @property
    def error(self) -> float | None:
        """How far it is from the dense network, so that errors add up; None if that is not known."""
        return None if self.agreement is None else error_of(self.agreement)


@dataclass(frozen=True)
class Before:
    """What is known before the program is written.

    Attributes:
        kernels, filters, branches: what came of each alone, if it was possible.
        sensitivity: of kernels in the dense network.
        planner: of filters.
        trials: of branches, if there are any.
    """

    kernels: Alone[Request] | None
    filters: Alone[PrunePlan] | None
    branches: Alone[PrunePlan] | None
    sensitivity: Sensitivity
    planner: FilterPlanner
    trials: BranchPlanner | None


@dataclass(frozen=True)
class Solved:
    """What the program chose.

    Attributes:
        whole: the branches and filters that go, if any.
        kernels: the request for kernels of what they leave, if any.
        branches: how many go.
        remark: what it is, in words.
    """

    whole: PrunePlan | None
    kernels: Request | None
    branches: int
    remark: str


class ProgramPlanner:
    """Plans of one network by the program.

    Args:
        subject: with calibration data.
        judge: of plans.
        filters, kernels: the request for each, with all budgets.
        before: what is known.

    Raises:
        PlanError: nothing can go.
        CalibrationError: the calibration data do not fit the model.
    """

    def __init__(self, subject: Subject, judge: Judge, filters: Request, kernels: Request, before: Before) -> None:
        self._subject, self._judge, self._before = subject, judge, before
        self._filters, self._kernels, self._pace = filters, kernels, 1.0
        self._removable, self._units = self._measured_units()
        way = None if before.filters is None else before.filters.way
        spaces = before.planner.tables(filters, self._removable, self._units)
        self._spaces = [_losses(space) for space in spaces.get(way or "global", self._units.table).layers]
        way = None if before.kernels is None else before.kernels.way
        self._layers = tables(before.sensitivity, kernels.budgets).get(way or "sensitivity", before.sensitivity)

    def solved(self, branches: bool = True) -> Solved:
        """What goes at the least loss.

        Args:
            branches: whether branches may.

        Raises:
            PlanError: the budgets cannot be met; the message says how near one comes.
            AccelerationError: a latency is asked for, and the model cannot be accelerated.
        """
        terms = self._terms(branches)
        program = terms.program()
        timed = self._filters.latency is not None
        choice, told = self._met(terms, program) if timed else (self._choice(program), ())
        selected = terms.selected(choice)
        whole, kernels = self._plans.whole(selected), self._plans.kernels(selected)
        return Solved(whole, kernels, len(selected.branches), "; ".join((self._told(selected, choice), *told)))

    # --- what is measured ---------------------------------------------------------------------------------------------

    def _measured_units(self) -> tuple[Removable, UnitSensitivity]:
        """The units and their order. In a user's own module those that its code counts stay."""
        before, subject = self._before, self._subject
        first = None if before.filters is None else before.filters.what
        while True:
            removable, found = before.planner.sensitivity(self._filters, first)
            if not subject.is_recorded or not removable.units.count:
                return removable, found
            plan = plan_of_units(subject, self._filters, removable, self._keeping(removable, found, 0.0), "", "")
            if not is_counted(subject, plan):
                return removable, found

    def _keeping(self, removable: Removable, found: UnitSensitivity, share: float) -> Chosen:
        """The units that go where each space keeps the width that is nearest to a share of it."""
        goes = np.zeros(removable.units.count, dtype=np.bool_)
        for space in range(len(removable.units.names)):
            mine = found.order[removable.units.space[found.order] == space]
            widths = widths_of(len(mine), WIDTHS[0], self._filters.multiple(len(mine)))
            kept = min(widths, key=lambda width: abs(width / len(mine) - share))
            goes[mine[: len(mine) - kept]] = True
        return goes

    @cached_property
    def _slopes(self) -> dict[str, float]:
        """How losses of kernels change with inputs that go, see `fxprune.planning.program.interaction`."""
        dense, goes = self._before.sensitivity, self._keeping(self._removable, self._units, WIDTH)
        if not dense.layers or not goes.any():
            return {}
        plan = plan_of_units(self._subject, self._filters, self._removable, goes, "", "")
        rest = self._subject.of(without_removed(self._subject, masked_by(self._judge.fitted, plan), plan))
        narrow = sensitivity_of(rest, self._kernels)
        units = self._removable.units
        stays = np.append(~goes, True)  # STAYS is the last
        reads = {name: layer.reads for name, layer in units.layers.items() if layer.reads is not None}
        inputs = {name: float(stays[labels].mean()) for name, labels in reads.items()}
        return slopes(dense, narrow, inputs)

    # --- one scale ----------------------------------------------------------------------------------------------------

    @cached_property
    def _scales(self) -> tuple[float, float]:
        """What a loss of kernels, and one of filters, comes to when the network is judged; where one is not known, it
        is taken to be as the other.
        """
        before, known = self._before, {}
        if before.kernels is not None and before.kernels.error is not None:
            loss = sum(loss_of(layer.at(ratio)) for layer, ratio in self._ratios(before.kernels.what))
            known["kernels"] = _scale(before.kernels.error, loss)
        if before.filters is not None and before.filters.error is not None:
            gone, units = removed_units(self._removable, before.filters.what), self._removable.units
            stay = np.bincount(units.space, ~gone, minlength=len(units.names)).astype(int)
            loss = sum(float(losses[kept - 1] - losses[-1]) for losses, kept in zip(self._spaces, stay, strict=True))
            known["filters"] = _scale(before.filters.error, loss)
        usual = next(iter(known.values()), 1.0)
        return known.get("kernels", usual), known.get("filters", usual)

    def _ratios(self, request: Request) -> Iterable[tuple[LayerSensitivity, float]]:
        """The layers with the ratios that were asked for; by name, or by the pattern that matches the name alone."""
        assert isinstance(request.ratio, Mapping)
        for layer in self._layers.layers:
            yield layer, request.ratio.get(layer.name, request.ratio.get(escape(layer.name), 0.0))

    @cached_property
    def _branch_losses(self) -> dict[str, float]:
        """What the network without each branch comes to. How far it is from the dense one was compared before any
        refit, so all are scaled by a plan that was judged after it.
        """
        before = self._before
        if before.trials is None:
            return {}
        alone = before.branches
        way = None if alone is None else alone.way
        far = before.trials.distances(way)
        if alone is None:  # they are too few for all of the saving
            plan = before.trials.first(None, math.ceil(len(far) / 2), self._filters.of_branches())
            alone = Alone("", plan, judged_plans(self._judge, {"": plan})[""])
        if alone.error is None or alone.agreement is None:
            return {}
        power = 2 if alone.agreement.classes else 1
        scale = _scale(alone.error, sum(far[name] ** power for name in alone.what.branches))
        return {name: scale * distance**power for name, distance in far.items()}

    # --- the program --------------------------------------------------------------------------------------------------

    def _terms(self, branches: bool) -> NetworkTerms:
        spaces = [self._scales[1] * losses for losses in self._spaces]
        losses = Losses(self._units.order, spaces, self._ways, self._branch_losses if branches else {})
        network, shares = self._subject.trace.module, self._filters.shares
        table, multiple = self._filters.latency_table, self._filters.multiple
        return NetworkTerms(network, self._removable, losses, self._held, shares, multiple, table)

    @property
    def _plans(self) -> SelectedPlans:
        names = [layer.name for layer in self._layers.layers]
        return SelectedPlans(self._subject, self._filters, self._kernels, self._removable, self._held, names)

    @cached_property
    def _ways(self) -> dict[str, Kernels]:
        return kernel_ways(self._subject, self._kernels, self._layers, self._slopes, self._scales[0])

    @property
    def _held(self) -> Mapping[str, tuple[str, ...]]:
        """The modules of each branch that can go."""
        return {} if self._before.trials is None else self._before.trials.layers

    def _choice(self, program: IntegerProgram) -> Choice:
        choice = program.solved()
        if choice is not None:
            return choice
        asked = ", ".join(f"{name}={share:.4g}" for name, share in self._filters.shares.items())
        near = " and ".join(
            f"{program.least(place):.4g} of the {name}" for place, name in enumerate(self._filters.shares)
        )
        raise PlanError(
            f"{asked} cannot be met by filters, kernels and branches together; at least {near} must remain: ask for "
            "more, or let more layers be pruned"
        )

    def _met(self, terms: NetworkTerms, program: IntegerProgram) -> tuple[Choice, tuple[str, ...]]:
        """The choice with which the share of the time remains when the whole network is measured, and what came of
        it.
        """
        latency, table = self._filters.latency, self._filters.latency_table
        assert latency is not None
        assert table is not None
        place = list(self._filters.shares).index("latency")

        def choose(share: float) -> Choice:
            limits = program.limits.copy()
            limits[place] = share
            return self._choice(program.within(limits))

        meeting: Meeting[Choice] = Meeting(
            latency,
            choose=choose,
            predicted=lambda choice: float(program.costs(choice)[place]),
            damage=program.loss,
            measure=(lambda choice: self._share_of(terms.selected(choice))) if table.is_from_here else None,
        )
        met = meeting.met(self._pace)
        self._pace = met.pace
        return met.choice, (met.told(latency, table),)

    def _share_of(self, selected: Selected) -> float:
        """The share of the dense time that the whole network takes."""
        return WholeNetwork.of(self._subject, self._kernels).share_with(self._plans.from_weights(selected))

    # --- what a choice means ------------------------------------------------------------------------------------------

    def _told(self, selected: Selected, choice: Choice) -> str:
        """What was chosen, in words."""
        units = self._removable.units
        filters, spaces = int(selected.removed.sum()), len(np.unique(units.space[selected.removed]))
        parts = [
            f"{filters} of {units.count} filters go, in {spaces} of {len(units.names)} channel spaces",
            f"kernels in {len(selected.ratios)} of {len(self._layers.layers)} convolutions",
        ]
        if self._held:
            parts.append(f"{len(selected.branches)} of {len(self._held)} branches")
        gap = f", within {choice.gap:.1%} of the least loss" if choice.gap > GAP else ""
        return ", ".join(parts) + gap


def _losses(space: LayerSensitivity) -> Array:
    """Of a space, by the units that stay."""
    return np.array([loss_of(damage) for damage in space.damage])


def error_of(agreement: Agreement) -> float:
    """How far a network is from the dense one, in a measure that adds up: distances of probabilities rise with the
    root of errors, the other is one.
    """
    return agreement.distance**2 if agreement.classes else agreement.distance


def _scale(error: float, loss: float) -> float:
    return max(error, LEAST_ERROR) / loss if loss > 0 else 1.0
