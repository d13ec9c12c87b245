"""Pictures of what was measured: speed-up against MACs, and accuracy against MACs and time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxprune.comparison.extras import ComparisonError, require
from fxprune.comparison.methods import DENSE
from fxprune.comparison.points import Mean, Point

FORMATS = (".png", ".svg")
MARKERS = "osD^vP*X"


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


def draw_speed_up(records: Mapping[str, Any], path: Path) -> int:
    """Draw how much faster than dense each network is against how many times fewer MACs it has; return the number of
    points.

    On the dashed line all saved MACs are saved time. A point is a row of a record of `fxprune bench` that was
    timed, in its faster layout; colours tell networks apart, marks runtimes, and numbers are batches.

    Args:
        records: by the names to complain of.
        path: where the picture goes, one of `FORMATS`.

    Raises:
        ComparisonError: something is no such record, or matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points = [point for name, record in records.items() for point in _points(name, record)]
    colours = {label: f"C{number % 10}" for number, label in enumerate(dict.fromkeys(p["label"] for p in points))}
    runtimes = dict.fromkeys(p["runtime"] for p in points)
    marks = {runtime: MARKERS[number % len(MARKERS)] for number, runtime in enumerate(runtimes)}
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    for p in points:
        axes.plot(p["saving"], p["speed_up"], marks[p["runtime"]], color=colours[p["label"]], alpha=0.8)
        axes.annotate(str(p["batch"]), (p["saving"], p["speed_up"]), (4, 4), textcoords="offset points", fontsize=7)
    end = max([2.0, *(p["saving"] for p in points)]) * 1.05
    (ideal,) = axes.plot([1, end], [1, end], "--", color="grey", label="ideal")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set_xlabel("MACs, dense / pruned")
    axes.set_ylabel("speed-up over dense in the same runtime")
    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=label) for label, colour in colours.items()]
    handles += [Line2D([], [], color="black", marker=mark, linestyle="", label=name) for name, mark in marks.items()]
    axes.legend(handles=[ideal, *handles], fontsize=8)
    axes.set_title("numbers: batch", fontsize=8, loc="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return len(points)


def _points(name: str, record: Any) -> list[dict[str, Any]]:
    try:
        settings = record["settings"]
        where = f"{settings['model']}, {settings['device']} {settings['dtype']}"
        return [
            {
                "label": f"{row['network']}, {where}",
                "runtime": row["runtime"],
                "batch": row["batch"],
                "saving": 1 / row["macs_share"],
                "speed_up": 1 / row["relative"],
            }
            for row in record["rows"]
            if row["best"] and row["relative"] is not None and row["network"] != "dense"
        ]
    except (KeyError, TypeError) as error:
        raise ComparisonError(f"{name}: is no record of fxprune bench ({type(error).__name__}: {error})") from error


def draw_fronts(points: Sequence[Point], path: Path, title: str) -> list[Path]:
    """Draw accuracy before and after fine-tuning against MACs and, of what was timed, against time; return the files.

    Args:
        points: what to draw; a line joins those of one method.
        path: without suffix; a file of each of `FORMATS` is written.
        title: of the whole picture.

    Raises:
        ComparisonError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    batches = sorted({batch for point in points for batch in point.relative})
    columns = [None, *batches]
    figure = Figure(figsize=(4.5 * len(columns) + 2.5, 8), layout="constrained")
    grid = figure.subplots(2, len(columns), sharey="row", sharex="col", squeeze=False)
    methods = list(dict.fromkeys(point.method for point in points))
    handles = []
    for number, method in enumerate(methods):
        mine = [point for point in points if point.method == method]
        look = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "capsize": 3, "alpha": 0.85}
        if method == DENSE.name:
            look |= {"color": "black", "linestyle": ""}
        for row, part in enumerate(("before", "after")):
            for column, batch in enumerate(columns):
                shown = [point for point in mine if batch is None or batch in point.relative]
                xs = [point.macs_share if batch is None else point.relative[batch] for point in shown]
                means: list[Mean] = [getattr(point, part) for point in shown]
                drawn = grid[row][column].errorbar(
                    xs, [mean.value * 100 for mean in means], [(mean.half_width or 0) * 100 for mean in means],
                    label=mine[0].label, **look,
                )  # fmt: skip
                if row == column == 0:
                    handles.append(drawn)
    for row, words in enumerate(("before fine-tuning", "after fine-tuning")):
        grid[row][0].set_ylabel(f"top-1 accuracy in %, {words}")
    for column, batch in enumerate(columns):
        words = "MACs" if batch is None else f"time at batch {batch}"
        grid[1][column].set_xlabel(f"{words}, share of the dense network's")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    files = [path.with_suffix(suffix) for suffix in FORMATS]
    for file in files:
        figure.savefig(file, dpi=150)
    return files
