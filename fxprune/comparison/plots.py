"""Pictures of what was measured: time against MACs, and accuracy against time and MACs, in small multiples."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fxprune.comparison.extras import ComparisonError, require
from fxprune.comparison.looks import GREY, label_beside, look_of, pareto
from fxprune.comparison.methods import DENSE
from fxprune.comparison.points import Mean, Point

FORMATS = (".png", ".svg")
PANEL = (4.6, 3.6)
"""Width and height of a panel in inches, its column of labels included."""
MARGIN = 0.42
"""Share of a panel's width for the labels."""


def read_records(paths: Sequence[Path]) -> dict[str, Any]:
    """Read JSON files, by their names.

    Raises:
        OSError: one cannot be read.
        ComparisonError: one is not JSON.
    """
    records = {}
    for path in paths:
        try:
            records[str(path)] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ComparisonError(f"{path}: is no JSON: {error}") from error
    return records


def draw_latencies(records: Mapping[str, Any], path: Path) -> int:
    """Draw the time of each pruned network against its MACs, both as shares of the dense one's; return how many points.

    A panel is a network and a batch. A line joins what one method gives in one runtime; a filled mark is the
    fastest runtime that was measured. On the dotted line all saved MACs are saved time.

    Args:
        records: of `fxprune bench`, by the names to complain of.
        path: where the picture goes, one of `FORMATS`.

    Raises:
        ComparisonError: something is no such record, or matplotlib is not installed.
    """
    require("matplotlib")
    points = [point for name, record in records.items() for point in _points(name, record)]
    panels = list(dict.fromkeys((point["where"], point["batch"]) for point in points))
    columns = min(3, max(1, len(panels)))
    figure, grid = _panels(-(-len(panels) // columns) or 1, columns)
    for axes, (where, batch) in zip(grid, panels, strict=False):
        mine = [point for point in points if (point["where"], point["batch"]) == (where, batch)]
        axes.set_title(f"{where}, batch {batch}", fontsize=9)
        axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1)
        axes.axhline(1, color=GREY, linewidth=0.5)
        labels = []
        for network, runtime in dict.fromkeys((point["network"], point["runtime"]) for point in mine):
            line = sorted(
                (point["macs"], point["time"])
                for point in mine
                if (point["network"], point["runtime"]) == (network, runtime)
            )
            look = look_of(network)
            style = {**look.mark, "markerfacecolor": look.colour if runtime == mine[0]["fastest"] else "white"}
            axes.plot(*zip(*line, strict=True), linewidth=1, **style)
            labels.append((*line[-1], f"{network}, {runtime}", look))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, max([1.05, *(1.05 * point["time"] for point in mine)]))
        axes.set_xlabel("MACs, share of dense", fontsize=8)
        axes.set_ylabel("time, share of dense", fontsize=8)
        label_beside(axes, labels, fontsize=7)
    for axes in grid[len(panels) :]:
        axes.remove()
    _save(figure, [path])
    return len(points)


def _points(name: str, record: Any) -> list[dict[str, Any]]:
    try:
        settings = record["settings"]
        rows = [row for row in record["rows"] if row["best"] and row["relative"] is not None]
        where = f"{settings['model']}, {settings['device']} {settings['dtype']}"
        dense = {(row["batch"], row["runtime"]): row["seconds"] for row in rows if row["network"] == "dense"}
        return [
            {
                "where": where,
                "network": row["network"],
                "runtime": row["runtime"],
                "batch": row["batch"],
                "macs": row["macs_share"],
                "time": row["relative"],
                "fastest": min((key for key in dense if key[0] == row["batch"]), key=dense.__getitem__)[1],
            }
            for row in rows
            if row["network"] != "dense"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ComparisonError(f"{name}: is no record of fxprune bench ({type(error).__name__}: {error})") from error


def draw_fronts(points: Sequence[Point], path: Path, title: str) -> list[Path]:
    """Draw accuracy after and before fine-tuning against time and against MACs; return the files.

    A column is a batch that was timed, the largest first, and then the MACs, which of one share say little. The line is
    the Pareto front: no other method is as accurate in less.

    Args:
        points: what to draw; a thin line joins those of one method.
        path: without suffix; a file of each of `FORMATS` is written.
        title: of the whole picture.

    Raises:
        ComparisonError: matplotlib is not installed.
    """
    require("matplotlib")
    batches = sorted({batch for point in points for batch in point.relative}, reverse=True)
    shares = {point.share for point in points if point.method != DENSE.name}
    columns: list[int | None] = [*batches, *([None] if not batches or len(shares) > 1 else [])]
    figure, grid = _panels(2, len(columns))
    for number, axes in enumerate(grid):
        batch, part = columns[number % len(columns)], ("after", "before")[number // len(columns)]
        shown = [point for point in points if batch is None or batch in point.relative]
        _draw_front(axes, shown, batch, part)
        axes.set_ylabel(f"top-1 accuracy in %, {part} fine-tuning", fontsize=8)
        words = "MACs" if batch is None else f"time at batch {batch}"
        axes.set_xlabel(f"{words}, share of dense", fontsize=8)
    figure.suptitle(title, fontsize=10)
    files = [path.with_suffix(suffix) for suffix in FORMATS]
    _save(figure, files)
    return files


def _draw_front(axes: Any, points: Sequence[Point], batch: int | None, part: str) -> None:
    """One panel: `part` is `"before"` or `"after"`. What lies far below the rest is at the foot, with its accuracy."""
    labels, places = [], []
    foot = _foot([100 * getattr(point, part).value for point in points])
    for method in dict.fromkeys(point.method for point in points):
        mine = [point for point in points if point.method == method]
        means: list[Mean] = [getattr(point, part) for point in mine]
        xs = [point.macs_share if batch is None else point.relative[batch] for point in mine]
        ys = [max(foot, mean.value * 100) for mean in means]
        look = look_of(method)
        axes.errorbar(xs, ys, [(mean.half_width or 0) * 100 for mean in means], capsize=2, linewidth=0.8, **look.mark)
        places += list(zip(xs, ys, strict=True))
        low = means[0].value * 100 < foot
        labels.append((xs[0], ys[0], f"{mine[0].label}: {means[0].value:.0%}" if low else mine[0].label, look))
    front = pareto(places)
    axes.plot(*zip(*front, strict=True), "-", color=GREY, linewidth=3, alpha=0.25, zorder=0)
    axes.grid(alpha=0.25)
    axes.margins(0.08)
    axes.autoscale_view()
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    label_beside(axes, labels, fontsize=7)


def _foot(values: Sequence[float]) -> float:
    """Where an axis begins so that a few low values do not flatten the others: a little below the largest gap, where
    that is more than half of what all span, and fewer than half of them lie below it; else below everything.

    >>> _foot([12.0, 84.0, 89.0])
    83.5
    >>> _foot([12.0, 13.0, 89.0])
    -inf
    """
    ordered = sorted(values)
    gaps = [high - low for low, high in pairwise(ordered)]
    below = gaps.index(max(gaps)) + 1 if gaps else len(ordered)
    if 2 * below >= len(ordered) or 2 * gaps[below - 1] <= ordered[-1] - ordered[0]:
        return -math.inf
    return ordered[below] - (ordered[-1] - ordered[below]) / 10


def _panels(rows: int, columns: int) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row, with room for labels at the right of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    inner = 1 - MARGIN - 0.12
    figure.subplots_adjust(
        left=0.12 / columns, right=1 - MARGIN / columns, wspace=(MARGIN + 0.12) / inner, hspace=0.35,
        bottom=0.14 / rows, top=1 - 0.16 / rows,
    )  # fmt: skip
    for axes in grid.flat:
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def _save(figure: Any, files: Sequence[Path]) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
