"""Pictures of what was measured."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORMATS = (".png", ".svg")
MARKERS = "osD^vP*X"


def read_records(paths: Sequence[Path]) -> dict[str, Any]:
    """Read JSON files, by their names.

    Raises:
        OSError: one cannot be read.
        ValueError: one is not JSON.
    """
    records = {}
    for path in paths:
        try:
            records[str(path)] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is no JSON: {error}") from error
    return records


def draw_speed_up(records: Mapping[str, Any], path: Path) -> int:
    """Draw how much faster than dense each network is against how many times fewer MACs it has; return the number of
    points.

    On the dashed line all saved MACs are saved time. A point is a row of a record of `benchmarks.latency` that was
    timed, in its faster layout; colours tell networks apart, marks runtimes, and numbers are batches.

    Args:
        records: by the names to complain of.
        path: where the picture goes, one of `FORMATS`.

    Raises:
        ValueError: something is no such record.
    """
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
        raise ValueError(f"{name}: is no record of benchmarks.latency ({type(error).__name__}: {error})") from error
