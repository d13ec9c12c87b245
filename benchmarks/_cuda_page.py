"""The tables of a record of `benchmarks.cuda`, as Markdown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def page(path: Path) -> str:
    """A section for the documentation, made from the record in `path`."""
    record = json.loads(path.read_text(encoding="utf-8"))
    where = record["environment"]
    device = where["cuda_device"] or where["cpu"]
    parts = [f"Measured on {device}, {where['date'][:10]}, torch {where['torch']}. Record: `{path.name}`."]
    if "tests" in record:
        parts.append(f"Tests: {record['tests'].get('summary') or record['tests']}")
    for step in ("networks", "compilers"):
        for race in _list(record.get(step)):
            parts.append(f"{race['model']}, batch {race['batch']}:\n\n{_networks(race['rows'])}")
    if layers := _list(record.get("layers")):
        parts.append(f"3x3 layers with ReLU, batch {layers[0]['batch']}, microseconds:\n\n{_layers(layers)}")
    if "reached" in (goal := record.get("target", {})):
        parts.append(
            f"`latency={goal['asked']}` for {goal['model']}, batch {goal['batch']}: {goal['reached']:.3f} of the dense "
            f"time at {goal['macs_share']:.2f} of the MACs ({goal['chosen']}), planned in "
            f"{goal['planning_seconds']:.0f} s."
        )
    if "epochs" in (found := record.get("training", {})):
        steps = ", ".join(f"{epoch['loss']:.3f} ({epoch['seconds']:.1f} s)" for epoch in found["epochs"])
        parts.append(f"Fine-tuning ResNet-20 on {found['images']} made images, loss by epoch: {steps}.")
    for step, found in [*record.items(), *record.get("failed", {}).items()]:
        if isinstance(found, Mapping):
            parts += [f"{step}: {word} {found[word]}" for word in ("error", "stopped", "skipped") if word in found]
    return "\n\n".join(parts) + "\n"


def _list(found: Any) -> Sequence[Any]:
    return found if isinstance(found, list) else ()


def _networks(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a network, with its times in each runtime; the best dense one is 1."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    times = {(row["network"], row["ratio"], row["runtime"]): row for row in rows if row["best"] or row["error"]}
    dense = [row["seconds"] for row in rows if row["network"] == "dense" and row["seconds"]]
    best = min(dense, default=None)
    lines = [
        f"| network | ratio | MACs | {' | '.join(f'{name}, ms' for name in runtimes)} | best to best dense |",
        f"|---|---|---|{'---|' * len(runtimes)}---|",
    ]
    for network, ratio in dict.fromkeys((row["network"], row["ratio"]) for row in rows):
        cells, mine = [], []
        for runtime in runtimes:
            row = times.get((network, ratio, runtime))
            if row is None or row["seconds"] is None:
                cells.append("failed" if row else "-")
                continue
            mine.append(row["seconds"])
            cells.append(f"{row['seconds'] * 1e3:.3f}")
        share = next((row["macs_share"] for row in rows if (row["network"], row["ratio"]) == (network, ratio)), None)
        relative = f"{min(mine) / best:.2f}" if mine and best else "-"
        lines.append(
            f"| {network} | {ratio or '-'} | {f'{share:.2f}' if share else '-'} | {' | '.join(cells)} | {relative} |"
        )
    return "\n".join(lines)


def _layers(rows: Sequence[Mapping[str, Any]]) -> str:
    forms = list(dict.fromkeys(form for row in rows for form in row["seconds"]))
    lines = [
        f"| channels | pixels | groups | block | MACs | {' | '.join(forms)} | best pruned to best dense |",
        f"|---|---|---|---|---|{'---|' * len(forms)}---|",
    ]
    for row in rows:
        cells = [f"{row['seconds'][form] * 1e6:.1f}" if form in row["seconds"] else "-" for form in forms]
        pruned, dense = (
            min(seconds for form, seconds in row["seconds"].items() if form.startswith(kind))
            for kind in ("pruned", "dense")
        )
        lines.append(
            f"| {row['channels']} | {row['pixels']} | {row['groups']} | {row['block']} | {row['macs_share']} | "
            f"{' | '.join(cells)} | {pruned / dense:.2f} |"
        )
    return "\n".join(lines)
