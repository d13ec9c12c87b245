"""Calibration data in two parts: what plans are fitted on, and what they are judged on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from fxprune.calibration.agreement import Agreement, hold_out, measure_agreement
from fxprune.calibration.effort import Effort
from fxprune.calibration.subject import Subject
from fxprune.graph.copying import copied
from fxprune.graph.modes import in_evaluation

T = TypeVar("T")

TOLD = Effort(rows=16_384)
"""What is fitted to tell how good a plan is, and not handed out: on a quarter of the positions that a refit takes,
still some 30 for each unknown of a layer with 64 channels."""
LESS = replace(TOLD, rows=8192, rounds=3)
"""What is fitted to be compared with others: half of that, and as far as the first rounds come."""


class Judge:
    """Measures pruned models on inputs that they were not fitted on.

    Args:
        subject: with calibration data.
        effort: that is spent on fits to the first part.

    Attributes:
        fitted: the subject with the first part.
        held_out: whether there is a second part; with very few inputs both are all of them.
    """

    def __init__(self, subject: Subject, effort: Effort = LESS) -> None:
        assert subject.batches is not None
        parts = hold_out(subject.batches, subject.takes_any_size)
        self.held_out = parts is not None
        fitted, self._judged = (subject.batches, subject.batches) if parts is None else parts
        self.fitted = subject if parts is None else subject.calibrated_on(fitted, effort)
        self._dense = copied(subject.model).eval()

    def compare(self, ways: Mapping[str, T], fit: Callable[[Subject, T], nn.Module]) -> dict[str, Agreement | None]:
        """What comes of several ways, by name. Each has the pulls of the layers that those before it found.

        Args:
            ways: what is fitted in each.
            fit: prunes and refits the model of a subject in one of them.
        """
        found, fitted = {}, self.fitted
        for name, way in ways.items():
            masked = fit(fitted, way)
            found[name], fitted = self.agreement(masked), fitted.refitted_as(masked)
        return found

    def agreement(self, masked: nn.Module) -> Agreement | None:
        """Of a model that was pruned and refitted on `fitted`; None if its outputs cannot be compared."""
        with in_evaluation(masked):
            return measure_agreement(self._dense, masked, self._judged, self.fitted.output_of, self.held_out)


def best(agreements: Mapping[str, Agreement | None]) -> str:
    """The name of the one that is nearest to the dense network, the first of equals."""

    def distance(name: str) -> float:
        found = agreements[name]
        return math.inf if found is None else found.distance

    return min(agreements, key=distance)
