"""What a comparison found: means over seeds with their intervals, and a table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.comparison.methods import DENSE, METHODS

CONFIDENCE = 0.95
"""Of the intervals."""
NEAR = 0.01
"""How far, relative to it, the MACs may be from what was asked for; further off is said."""


@dataclass(frozen=True)
class Run:
    """One network of one method, pruned and fine-tuned.

    Attributes:
        method: a name in `METHODS`.
        share: of the MACs that was asked for.
        seed: of the images and of the plan.
        macs, macs_share: of one image, and relative to the dense network.
        parameters: how many.
        before, after: top-1 accuracy in [0, 1], before and after fine-tuning.
        train_loss: mean of the last epoch; None if there was none.
        prune_seconds, train_seconds: what it took.
    """

    method: str
    share: float
    seed: int
    macs: int
    macs_share: float
    parameters: int
    before: float
    after: float
    train_loss: float | None
    prune_seconds: float
    train_seconds: float


@dataclass(frozen=True)
class Mean:
    """A mean, and half the width of its interval by Student's t; None for a single value."""

    value: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Of one value or more."""
        from scipy.stats import t as student  # here, for it takes a while to import

        count = len(values)
        if count < 2:
            return cls(values[0], None)
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
        return cls(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(count))


@dataclass(frozen=True)
class Point:
    """A method at a share of the MACs, over its seeds.

    Attributes:
        method, share: see `Run`.
        seeds: how many.
        macs_share, parameters: means.
        before, after: accuracy.
        lost: accuracy after fine-tuning that the dense network, fine-tuned with the same seed, has more; None where no
            seed is common.
        seconds, relative: of one call, by batch; and relative to the dense network. Of the first seed's structure.
    """

    method: str
    share: float
    seeds: int
    macs_share: float
    parameters: float
    before: Mean
    after: Mean
    lost: Mean | None
    seconds: Mapping[int, float]
    relative: Mapping[int, float]

    @property
    def label(self) -> str:
        """What the method is called."""
        return METHODS[self.method].label


def points_of(runs: Sequence[Run], latency: Sequence[Mapping[str, Any]] = ()) -> list[Point]:
    """A point for each method and share, in the order of `METHODS` and from large shares to small ones.

    Args:
        runs: in any order.
        latency: rows of `fxprune.comparison.latency`, the network of which is a method and the ratio a share.
    """
    order = list(METHODS)
    keys = sorted({(run.method, run.share) for run in runs}, key=lambda key: (order.index(key[0]), -key[1]))
    dense = {run.seed: run.after for run in runs if run.method == DENSE.name}
    points = []
    for method, share in keys:
        mine = [run for run in runs if (run.method, run.share) == (method, share)]
        paired = [dense[run.seed] - run.after for run in mine if run.seed in dense]
        timed = [
            row
            for row in latency
            if row["network"] == method and row["ratio"] in (share, None) and row["seconds"] is not None
        ]
        points.append(
            Point(
                method,
                share,
                len(mine),
                statistics.mean(run.macs_share for run in mine),
                statistics.mean(run.parameters for run in mine),
                Mean.of([run.before for run in mine]),
                Mean.of([run.after for run in mine]),
                Mean.of(paired) if paired else None,
                {row["batch"]: row["seconds"] for row in timed},
                {row["batch"]: row["relative"] for row in timed},
            )
        )
    return points


def table(points: Sequence[Point]) -> str:
    """The points in Markdown. Accuracies are percentages, intervals are in brackets after ±."""
    batches = sorted({batch for point in points for batch in point.relative})
    heads = ["method", "MACs", "parameters", "before", "after fine-tuning", "lost against dense"]
    heads += [f"time, batch {batch}" for batch in batches]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for point in points:
        near = point.method == DENSE.name or abs(point.macs_share / point.share - 1) <= NEAR
        cells = [
            point.label,
            f"{point.macs_share:.3f}" + ("" if near else f" (asked for {point.share:g})"),
            f"{point.parameters / 1e6:.3f} M",
            _percent(point.before),
            _percent(point.after),
            "" if point.lost is None or point.method == DENSE.name else _percent(point.lost),
        ]
        cells += [
            f"{point.relative[batch]:.2f} ({point.seconds[batch] * 1e3:.2f} ms)" if batch in point.relative else ""
            for batch in batches
        ]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(mean: Mean) -> str:
    return f"{mean.value * 100:.2f}" + ("" if mean.half_width is None else f" ± {mean.half_width * 100:.2f}")
