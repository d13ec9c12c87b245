"""How sparsity grows while a network trains: from the progress of the training to a share of the target sparsity."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from fxprune.errors import PlanError, near_matches

RECOVERY = 0.25
"""Share of the training that gradual schedules leave after the last pruning, for the network to recover. A choice of
ours; Zhu & Gupta (see `Agp`) stop before the end too, how early differs between their experiments."""
STEEPEST = 30
"""Beyond this the ends of the logistic curve are so flat that their differences are lost to rounding."""

ROUNDING = 1e-9
"""A moment this little before a step of `Iterative`, in steps, is that of the step."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


@dataclass(frozen=True)
class Schedule(ABC):
    """A share of the target sparsity for each moment of a training: it never falls, is 0 before `start` and 1 from
    `end` on. A schedule of one's own is a subclass with `shape`.

    Args:
        start: progress at which pruning begins, in `[0, 1]`; progress is the share of all steps that have been made.
        end: progress at which the target is reached, from `start` to 1.

    Raises:
        PlanError: a field has no legal value.

    >>> schedule = Agp(start=0.25, end=0.75)
    >>> [schedule(progress) for progress in (0.1, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.0, 0.875, 1.0, 1.0]
    """

    start: float = 0.0
    end: float = 1 - RECOVERY

    name: ClassVar[str]
    """As errors call it, and as users ask for it."""
    gradual: ClassVar[bool] = True
    """Whether there is a share between 0 and 1."""

    def __post_init__(self) -> None:
        """Check the rules above."""
        for field in ("start", "end"):
            value = getattr(self, field)
            if not _is_number(value) or not 0 <= value <= 1:
                raise PlanError(
                    f"schedule {self.name!r}: {field} is {value!r}; it must be a share of the training, in [0, 1]"
                )
        if self.end < self.start:
            raise PlanError(
                f"schedule {self.name!r}: it ends at {self.end}, before its start at {self.start}; pass a later end"
            )

    @abstractmethod
    def shape(self, elapsed: float) -> float:
        """The share when `elapsed`, in `[0, 1)`, of the time from start to end has passed."""

    def __call__(self, progress: float) -> float:
        """The share of the target sparsity, in `[0, 1]`, when the share `progress` of the training is done."""
        if progress < self.start:
            return 0.0
        if progress >= self.end:
            return 1.0
        return min(1.0, max(0.0, self.shape((progress - self.start) / (self.end - self.start))))


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at `start`, then fine-tuning. There is no way between, so `end` says nothing and follows `start`."""

    end: float = 0.0

    name: ClassVar[str] = "one-shot"
    gradual: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Let the end be the start."""
        object.__setattr__(self, "end", self.start)  # the one way to set a field of a frozen dataclass
        super().__post_init__()

    def shape(self, elapsed: float) -> float:
        """Never asked: no time passes between start and end."""
        return 1.0


@dataclass(frozen=True)
class Iterative(Schedule):
    """Equal steps, with equal times of training after each: prune, train, prune, train.

    Iterative pruning is that of Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural
    Networks", NeurIPS 2015, section 3; they take an equal share of what is left each time, here it is an equal share of
    the target. The first step is at `start`, the last one a step's time before `end`.

    Args:
        steps: their number, 1 or more.
    """

    steps: int = 3

    name: ClassVar[str] = "iterative"

    def __post_init__(self) -> None:
        """Check the number too."""
        super().__post_init__()
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PlanError(f"schedule {self.name!r}: steps is {self.steps!r}; it must be an integer, 1 or more")

    def shape(self, elapsed: float) -> float:
        """Steps up."""
        return (math.floor(elapsed * self.steps + ROUNDING) + 1) / self.steps


@dataclass(frozen=True)
class Agp(Schedule):
    """Automated gradual pruning, `1 - (1 - t)^3`: fast while there is much to remove, slow towards the end.

    Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017 (arXiv
    1710.01878), section 3, with initial sparsity 0.
    """

    name: ClassVar[str] = "agp"

    def shape(self, elapsed: float) -> float:
        """The cubic."""
        return 1 - (1 - elapsed) ** 3


@dataclass(frozen=True)
class OneCycle(Schedule):
    """A logistic curve: little at first, most around `beta / alpha` of the time, little at the end.

    Hubens, Mancas, Gosselin, Preda, Zaharia, "One-Cycle Pruning: Pruning ConvNets Under a Tight Training Budget", 2021
    (arXiv 2107.02086): one schedule over the whole training from scratch. Known, from the code of the authors'
    library fasterai: `(1 + e^(beta - alpha)) / (1 + e^(beta - alpha t))` with `alpha = 14`, `beta = 6`, which is 1 at
    the end, but 0.0025 and not 0 at the start. Ours: that value is taken off and the rest stretched to end at 1.

    Args:
        alpha: steepness, above 0.
        beta: the middle of the curve is at `beta / alpha`.
    """

    end: float = 1.0
    alpha: float = 14.0
    beta: float = 6.0

    name: ClassVar[str] = "one-cycle"

    def __post_init__(self) -> None:
        """Check the curve too."""
        super().__post_init__()
        if not _is_number(self.alpha) or not 0 < self.alpha <= STEEPEST:
            raise PlanError(
                f"schedule {self.name!r}: alpha is {self.alpha!r}; it must be a steepness above 0, up to {STEEPEST}"
            )
        if not _is_number(self.beta) or not abs(self.beta) <= STEEPEST:
            raise PlanError(
                f"schedule {self.name!r}: beta is {self.beta!r}; it must be a number, at most {STEEPEST} from 0"
            )

    def shape(self, elapsed: float) -> float:
        """The logistic, from 0 to 1."""
        first, value, last = (1 / (1 + math.exp(self.beta - self.alpha * t)) for t in (0.0, elapsed, 1.0))
        return (value - first) / (last - first)


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {schedule.name: schedule for schedule in (OneShot(), Iterative(), Agp(), OneCycle())}
)
"""Schedules by name, with their usual start and end."""


def resolve_schedule(schedule: object, start: float | None = None, end: float | None = None) -> Schedule:
    """Turn what a user passes as `schedule=` into a schedule.

    Args:
        schedule: a name in `SCHEDULES` or a `Schedule`.
        start: instead of its own start, if not None.
        end: the same for the end; `"one-shot"` has none.

    Raises:
        PlanError: it is neither, or start and end are not legal.

    >>> resolve_schedule("iterative", end=0.9)
    Iterative(start=0.0, end=0.9, steps=3)
    """
    if isinstance(schedule, str) and schedule in SCHEDULES:
        schedule = SCHEDULES[schedule]
    if not isinstance(schedule, Schedule):
        close = near_matches(schedule, SCHEDULES) if isinstance(schedule, str) else ""
        names = ", ".join(map(repr, SCHEDULES))
        raise PlanError(f"schedule is {schedule!r}{close}; it must be one of {names}, or a Schedule")
    if end is not None and not schedule.gradual:
        raise PlanError(f"schedule {schedule.name!r} prunes once, at its start; leave end={end!r} out")
    given = {field: value for field, value in (("start", start), ("end", end)) if value is not None}
    return replace(schedule, **given)
