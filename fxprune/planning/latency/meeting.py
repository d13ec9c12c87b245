"""The choice with which a share of the dense time remains when the whole network is measured: the sum of single layers
is not quite the time of the network, so a choice is made, measured, and made anew for a corrected share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fxprune.errors import PlanError
from fxprune.planning.latency.table import NEAR, TOLERANCE, LatencyTable

T = TypeVar("T")

CORRECTIONS = 3
"""If the time of the whole network is further than `NEAR` from what was predicted, the prediction is corrected, so many
times at most."""


@dataclass(frozen=True)
class Meeting(Generic[T]):
    """What is needed to meet a share of the time.

    Attributes:
        share: what may remain.
        choose: the choice of least damage that leaves a share by the table; falsy where it is the dense network.
        predicted: the share that a choice leaves by the table.
        damage: of a choice.
        measure: the share that the whole network has with a choice; None if it cannot be measured here, so that the
            table alone counts.
        least: the least share by the table.
    """

    share: float
    choose: Callable[[float], T]
    predicted: Callable[[T], float]
    damage: Callable[[T], float]
    measure: Callable[[T], float] | None
    least: float = 0.0

    def met(self, pace: float = 1.0) -> "Met[T]":
        """The choice that leaves the share.

        Args:
            pace: what the whole network takes relative to what the table predicts, as far as it is known.

        Returns:
            Of the choices that leave it, or `NEAR` of it more, the one with the least damage; else the fastest.

        Raises:
            PlanError: what `choose` raises.
        """
        budget = min(1.0, self.share / pace)
        try:
            choice = self.choose(budget)
        except PlanError:  # what the table does not reach the network might
            budget = self.share
            choice = self.choose(budget)
        tried: list[tuple[bool, float, Met[T]]] = []
        while choice and self.measure is not None and all(choice != met.choice for *_, met in tried):
            reached, predicted = self.measure(choice), self.predicted(choice)
            misses = reached > self.share * (1 + NEAR)
            tried.append((misses, reached if misses else self.damage(choice), Met(choice, predicted, reached)))
            is_near = abs(reached / self.share - 1) <= NEAR
            is_as_predicted = abs(reached / (predicted * self.share / budget) - 1) <= NEAR
            if is_near or is_as_predicted or len(tried) > CORRECTIONS:
                break
            budget = self._within(self.share * predicted / reached)
            try:
                choice = self.choose(budget)
            except PlanError:  # no further by the table
                break
        if tried:
            return min(tried, key=lambda attempt: attempt[:2])[2]
        return Met(choice, self.predicted(choice), None if choice else 1.0)

    def _within(self, budget: float) -> float:
        return min(1.0, max(budget, self.least))


@dataclass(frozen=True)
class Met(Generic[T]):
    """A choice, and what it leaves.

    Attributes:
        choice: what was chosen.
        predicted: the share of the dense time by the table.
        reached: the same as it was measured; None if it was not.
    """

    choice: T
    predicted: float
    reached: float | None

    @property
    def pace(self) -> float:
        """What the whole network takes relative to what the table predicts."""
        return 1.0 if self.reached is None else self.reached / self.predicted

    def told(self, share: float, table: LatencyTable) -> str:
        """What was asked of the time and came of it, in a sentence."""
        measured = (
            f"{self.reached:.2f} when the whole network was measured"
            if self.reached is not None
            else f"not measured here, for the table is of another machine ({table.place()})"
        )
        if self.reached is not None and self.reached > share * (1 + TOLERANCE):
            measured += (
                ": it was missed; ask for a larger share or another granularity, or of kernels a wider choice of groups"
            )
        return (
            f"latency: asked for {share:.2f} of the best dense time in {table.where}; {self.predicted:.2f} by the "
            f"times of single layers, {measured}"
        )
