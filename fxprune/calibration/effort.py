"""How much is spent on the fit of each layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxprune.calibration.samples import MAX_ROWS

ROUNDS = 24
"""Of the one-sided problem of a layer, at most; MobileNetV2 takes eleven until one gains less than a thousandth."""


@dataclass(frozen=True)
class Effort:
    """How much is spent on the fit of each layer.

    Attributes:
        rows: about how many positions of the data it is fitted on at most, see `fxprune.calibration.samples.draw`.
        rounds: of the one-sided problem at most, see `fxprune.calibration.refitting`.
        ridges: the pull toward the present weights of layers, where it is known from another fit: a number for each
            layer, which takes long to find, and differs little on a part of the data.
    """

    rows: int = MAX_ROWS
    rounds: int = ROUNDS
    ridges: Mapping[str, float] = field(default_factory=dict)


FULL = Effort()
"""What a network gets that is handed out."""
