"""What a comparison found: means over seeds with their intervals, and a table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.comparison.experiments import Experiment, Published
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


PUBLISHED = "published: before", "after", "lost"
"""Heads of the columns of what a paper reports."""


def table(points: Sequence[Point], published: Sequence[Published] = ()) -> str:
    """The points in Markdown. Accuracies are percentages, intervals are in brackets after ±.

    Args:
        points: a line for each.
        published: what stands beside them.
    """
    batches = sorted({batch for point in points for batch in point.relative})
    heads = ["method", "MACs", "parameters", "before", "after fine-tuning", "lost against dense"]
    beside = [[found for found in published if found.is_of(point.method, point.share)] for point in points]
    heads += PUBLISHED if any(beside) else ()
    heads += [f"time, batch {batch}" for batch in batches]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for point, found in zip(points, beside, strict=True):
        near = point.method == DENSE.name or abs(point.macs_share / point.share - 1) <= NEAR
        cells = [
            point.label,
            f"{point.macs_share:.3f}" + ("" if near else f" (asked for {point.share:g})"),
            f"{point.parameters / 1e6:.3f} M",
            _percent(point.before),
            _percent(point.after),
            "" if point.lost is None or point.method == DENSE.name else _percent(point.lost),
        ]
        if any(beside):
            cells += _published_cells(found[0]) if found else [""] * len(PUBLISHED)
        cells += [
            f"{point.relative[batch]:.2f} ({point.seconds[batch] * 1e3:.2f} ms)" if batch in point.relative else ""
            for batch in batches
        ]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def beside_published(points: Sequence[Point], experiment: Experiment, differences: Sequence[str]) -> str:
    """The table of a recipe in Markdown: what was published beside what was measured, and below what else was
    published, where it is said, and what is not as in the paper.

    Args:
        points: what was measured.
        experiment: the recipe.
        differences: what was done otherwise than it says.
    """
    lines = [f"{experiment.title}. {experiment.paper}.", "", table(points, experiment.published)]
    if experiment.published:
        lines += [_row(["published", "MACs", "dense", "before", "after", "source"]), "|---" * 6 + "|"]
        for found in experiment.published:
            label = found.label or METHODS[found.method or ""].label
            shown = [_figure(found.dense), _figure(found.before), _figure(found.after), found.source]
            lines.append(_row([label, f"{found.share:.3f}", *shown]))
    else:
        lines.append("No figures of the paper are known.")
    said = [*(f"Otherwise than in the recipe: {line}." for line in differences), *experiment.notes]
    return "\n".join([*lines, "", *(f"{number}. {line}" for number, line in enumerate(said, 1))]) + "\n"


def _published_cells(found: Published) -> list[str]:
    lost = None if found.dense is None or found.after is None else found.dense - found.after
    return [_figure(found.before), _figure(found.after), "" if found.method == DENSE.name else _figure(lost)]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(mean: Mean) -> str:
    return f"{mean.value * 100:.2f}" + ("" if mean.half_width is None else f" ± {mean.half_width * 100:.2f}")
