"""Filters that go so that a share of the dense time remains: by the times of narrower layers, and the whole network."""

import numpy as np

from fxprune.calibration.subject import Subject
from fxprune.channels.removal import Removable
from fxprune.channels.units import ChannelUnits, Chosen
from fxprune.criteria.variety import Array
from fxprune.errors import PlanError
from fxprune.planning.latency.measure import Wanted, measure_layers
from fxprune.planning.latency.meeting import Meeting
from fxprune.planning.latency.network import WholeNetwork
from fxprune.planning.requests import Request
from fxprune.planning.selection import choose_units, shares_left
from fxprune.plans import PrunePlan


class FilterTimes:
    """The times of one network by the widths of its layers, and of the whole network without filters.

    Args:
        subject: the model, on the device to be fast on, with an example input.
        request: names the runtime, and has the table if it was measured before.
        units: those of the network.

    Attributes:
        table: the times.
        by_width: the share of the dense time by the widths of the layers.

    Raises:
        PlanError: the table is of something else, or layers cannot be timed in the runtime.
        AccelerationError: the model cannot be accelerated.
    """

    def __init__(self, subject: Subject, request: Request, units: ChannelUnits) -> None:
        self._network = WholeNetwork.of(subject, request)
        self.table = request.latency_table or measure_layers(self._network, Wanted(units=units))
        self.table.check(self._network.model, self._network.inputs, request.runs_in, request.precision)
        self.by_width = self.table.by_width(tuple(units.layers))
        self._pace = 1.0

    def prices(self, units: ChannelUnits) -> Array:
        """The share of the dense time that one unit of each space saves, `(S,)`, the mean over half of the space: times
        fall in steps of several units.
        """
        whole = self.share_without(units, np.zeros(units.count, dtype=np.bool_))
        prices: list[float] = []
        for space in range(len(units.names)):
            mine = np.flatnonzero(units.space == space)
            half = np.zeros(units.count, dtype=np.bool_)
            half[mine[: (len(mine) + 1) // 2]] = True
            prices.append((whole - self.share_without(units, half)) / max(1, int(half.sum())))
        least = np.finfo(np.float64).eps
        return np.maximum(np.array(prices), least)

    def share_without(self, units: ChannelUnits, gone: Chosen) -> float:
        """The share of the dense time that remains without some units, by the table."""
        return float(self.by_width(*shares_left(units, gone)))

    def meet(
        self, removable: Removable, scores: Array, request: Request, gone: Chosen, comparable: bool
    ) -> tuple[Chosen, tuple[str, ...]]:
        """The units `(U,)` without which a share of the time remains when the whole network is measured, and what came
        of it.

        Args:
            removable: of the network.
            scores, request, gone, comparable: see `fxprune.planning.selection.choose_units`.
        """
        assert request.latency is not None
        units = removable.units

        def chosen(places: tuple[int, ...]) -> Chosen:
            which = np.zeros(units.count, dtype=np.bool_)
            which[list(places)] = True
            return which

        def choose(share: float) -> tuple[int, ...]:
            asked = request.with_shares({**request.shares, "latency": share})
            found = choose_units(units, scores, asked, gone, comparable, self.by_width)
            return tuple(np.flatnonzero(found).tolist())

        def share_of(places: tuple[int, ...]) -> float:
            return self.share_with(PrunePlan({}, removed=removable.removed(chosen(places))))

        meeting: Meeting[tuple[int, ...]] = Meeting(
            request.latency,
            choose=choose,
            predicted=lambda places: self.share_without(units, chosen(places)),
            damage=lambda places: float(scores[list(places)].sum()),
            measure=share_of if self.table.is_from_here else None,
        )
        met = meeting.met(self._pace)
        self._pace = met.pace
        return chosen(met.choice), (met.told(request.latency, self.table),)

    def share_with(self, plan: PrunePlan) -> float:
        """The share of the dense time that the whole network takes without the filters of a plan, measured.

        Raises:
            PlanError: the table is of another machine.
        """
        if not self.table.is_from_here:
            raise PlanError(
                "what filters leave has to be timed anew before kernels of it can be planned, and the table is of "
                f"another machine ({self.table.place()})"
            )
        return self._network.share_with(plan)
