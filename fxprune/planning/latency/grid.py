"""Times of a convolution that is narrower: over the input channels and the filters that are kept, measured at a few
points and interpolated between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxprune.errors import PlanError

Array = npt.NDArray[np.float64]

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Of its inputs and filters that are kept where a layer is timed."""
LEAST_STEPS = 4
"""A channel space goes in so many steps at least, however few channels a step then has."""


def step_of(size: int, lanes: int) -> int:
    """How many channels of so many go at once: as many as a processor computes at once, for what is left of them takes
    as long as if they were there; fewer where the channels are few.
    """
    while lanes > 1 and LEAST_STEPS * lanes > size:
        lanes //= 2
    return max(1, lanes)


def widths(channels: int, lanes: int) -> tuple[int, ...]:
    """The numbers of channels at which a layer of so many is timed, ascending."""
    step = step_of(channels, lanes)
    rounded = {min(channels, max(1, round(share * channels / step)) * step) for share in SHARES}
    return tuple(sorted(rounded | {channels}))


@dataclass(frozen=True)
class LayerGrid:
    """The times of one convolution by its width. If the model calls it several times, the sum.

    Attributes:
        name: module path.
        inputs, filters: numbers of them that were timed, ascending; the last are those of the dense convolution. One
            where none can go. The filters of a depthwise convolution stand for its inputs as well.
        seconds: of its fastest form: for each number of inputs, for each number of filters.

    Raises:
        PlanError: a number is missing, not positive or not in order.
    """

    name: str
    inputs: tuple[int, ...]
    filters: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Check the rules above."""
        for what in ("inputs", "filters"):
            counts = getattr(self, what)
            whole = all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts)
            if not counts or not whole or list(counts) != sorted(set(counts)):
                raise PlanError(f"latency: {what} of {self.name} are {counts!r}; they must be positive and ascend")
        if [len(row) for row in self.seconds] != [len(self.filters)] * len(self.inputs):
            raise PlanError(f"latency: {self.name} must have a time for each number of inputs and of filters")
        for seconds in (seconds for row in self.seconds for seconds in row):
            is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not is_number or not 0 < seconds < float("inf"):
                raise PlanError(f"latency: a time of {self.name} is {seconds!r}; it must be a positive number")

    @property
    def dense(self) -> float:
        """Seconds of the dense convolution."""
        return self.seconds[-1][-1]

    def at(self, reads: Array, writes: Array) -> Array:
        """Seconds where shares of the inputs and of the filters are kept, arrays that broadcast: bilinear between the
        points; below the least width that was timed, as there.
        """
        times = np.asarray(self.seconds)
        row, above, across = _place(self.inputs, reads)
        column, right, along = _place(self.filters, writes)
        near = times[row, column] * (1 - along) + times[row, right] * along
        far = times[above, column] * (1 - along) + times[above, right] * along
        return np.asarray(near * (1 - across) + far * across)

    def __add__(self, other: "LayerGrid") -> "LayerGrid":
        """The times of two calls of one convolution."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        sums = tuple(tuple(a + b for a, b in zip(mine, theirs, strict=True)) for mine, theirs in pairs)
        return LayerGrid(self.name, self.inputs, self.filters, sums)


@dataclass(frozen=True)
class NetworkTimes:
    """The time of a network by the widths of its layers, as a share of the dense one's.

    The dense time is what its layers and the rest add up to: layers that were timed alone may take more than the
    network, in runtimes and on busy machines.

    Attributes:
        grids: of its layers, with the place of each among all layers.
        rest: seconds of what is in no grid, which stay.
        lanes: how many channels a processor computes at once.
    """

    grids: tuple[tuple[int, LayerGrid], ...]
    rest: float
    lanes: int

    def __call__(self, writes: Array, reads: Array) -> Array:
        """The share of the time from the shares of filters and of inputs that each of `L` layers keeps: `(L, ...)`
        each.
        """
        shape = np.broadcast_shapes(writes.shape[1:], reads.shape[1:])
        total = sum((grid.at(reads[row], writes[row]) for row, grid in self.grids), np.full(shape, self.rest))
        return np.asarray(total / (self.rest + sum(grid.dense for _, grid in self.grids)))


def _place(counts: Sequence[int], shares: Array) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Array]:
    """Between which two counts a share of the last lies, and how far from the first to the second."""
    if len(counts) == 1:
        zeros = np.zeros(np.shape(shares), np.intp)
        return zeros, zeros, np.zeros(np.shape(shares))
    wanted = np.clip(np.asarray(shares) * counts[-1], counts[0], counts[-1])
    low = np.clip(np.searchsorted(counts, wanted, side="right") - 1, 0, len(counts) - 2)
    points = np.asarray(counts, np.float64)
    return low, low + 1, (wanted - points[low]) / (points[low + 1] - points[low])
