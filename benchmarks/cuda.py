"""Everything about a CUDA device in one command, in the order of its worth. Each step writes what it found at once, so
that a kill loses nothing.

    python -m benchmarks.cuda --minutes 9 --output DIR
    python -m benchmarks.cuda --device cpu --dry --output DIR   # the same code on tiny sizes, without a device
    python -m benchmarks.cuda --page RECORD.json                # the tables of a record, as Markdown

It needs no network and nothing beyond what fxprune needs; Torch-Pruning takes part where it is installed. The record is
DIR/cuda-DEVICE.json, its page DIR/cuda-DEVICE.md.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._cuda_page import page
from benchmarks._cuda_steps import STEPS, VARIANTS, Place
from fxprune.environment import environment
from fxprune.files import write_json

MODELS = ("resnet18", "resnet50")
BATCHES = (32, 1)
LONGEST = {"tests": 120, "compilers": 90}
"""Seconds that a step may take; others what is left."""
RESERVE_SECONDS = 15
"""A step is not begun with less time than this."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the steps that there is time for; return 1 if one failed or a network computed something else."""
    options = read_options(arguments)
    if options.page:
        print(page(options.page))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.cuda: error: torch sees no CUDA device; try --device cpu --dry", file=sys.stderr)
        return 2
    if options.step:
        return take(options)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    path = options.output / f"cuda-{re.sub(r'[^A-Za-z0-9]+', '-', name).lower()}{'-dry' if options.dry else ''}.json"
    record: dict[str, Any] = {"environment": environment()}
    end = time.monotonic() + 60 * options.minutes
    for step, model, batch in jobs(options):
        label = f"{step} {model} {batch}"
        left = end - time.monotonic()
        found = take_aside(options, step, model, batch, left) if left > RESERVE_SECONDS else {"skipped": "no time left"}
        seconds = time.monotonic() - end + left
        record.setdefault("seconds", {})[label] = round(seconds, 1)
        if isinstance(found, list):
            record.setdefault(step, []).extend(found)
        elif step in ("networks", "compilers"):
            record.setdefault("failed", {})[label] = found
        else:
            record[step] = found
        write_json(path, record)
        path.with_suffix(".md").write_text(page(path), encoding="utf-8")
        print(f"{label}: {seconds:.0f} s, {max(0, left - seconds):.0f} s left, in {path}", flush=True)
    return int(is_wrong(record))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What to measure, and for how long."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="stop after about so long (default: %(default)s)")
    add("--output", type=Path, help="folder of the record")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dry", action="store_true", help="tiny sizes: only whether it runs")
    add("--steps", nargs="+", choices=tuple(STEPS), default=tuple(STEPS), metavar="STEP", help=", ".join(STEPS))
    add("--models", nargs="+", default=MODELS, help="names for `fxprune compile` (default: %(default)s)")
    add("--batches", nargs="+", type=int, default=BATCHES, help="images (default: %(default)s)")
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), help="of pruning (default: all)")
    add("--page", type=Path, metavar="RECORD", help="only print the tables of a record")
    add("--step", choices=tuple(STEPS), help="take only this step, in this process; its findings go to --output FILE")
    options = parser.parse_args(arguments)
    if options.output is None and options.page is None:
        parser.error("--output DIR is needed: where the record goes")
    if options.dry:
        options.models, options.batches, options.variants = MODELS[:1], (2,), ("kernels overlap", "filters")
    return options


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Step, network and batch of each process, what is worth most first."""
    for number, batch in enumerate(options.batches):
        for step in options.steps:
            if step in ("networks", "compilers"):
                yield from ((step, model, batch) for model in options.models)
            elif number == 0:
                yield step, options.models[0], batch


def take_aside(options: argparse.Namespace, step: str, model: str, batch: int, left: float) -> Any:
    """Take a step in a process of its own: what it found, or how it ended; what it found before it was stopped."""
    part = options.output / "parts" / f"{step}-{model}-{batch}.json"
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.cuda", "--step", step, "--output", str(part), "--models", model]
    command += ["--batches", str(batch), "--device", options.device, "--variants", *options.variants]
    command += ["--dry"] if options.dry else []
    end = "error", ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(left, LONGEST.get(step, left)))
        if done.returncode:
            end = "error", done.stderr.strip()[-500:]
    except subprocess.TimeoutExpired as late:
        end = "stopped", f"after {late.timeout:.0f} s"
    found = json.loads(part.read_text(encoding="utf-8"))["found"] if part.exists() else None
    return found if found is not None else dict([end])


def take(options: argparse.Namespace) -> int:
    """Take one step here, writing what is known of it again and again."""
    place = Place(options.device, options.dry, options.models[0], options.batches[0], options.variants)
    for found in STEPS[options.step](place):
        write_json(options.output, {"found": found})
    return 0


def is_wrong(record: Mapping[str, Any]) -> bool:
    """Whether a step ended in an error, or a network computed something else."""
    found = [*record.values(), *record.get("failed", {}).values()]
    failed = any("error" in entry for entry in found if isinstance(entry, Mapping))
    rows = [row for step in ("networks", "compilers") for race in record.get(step, ()) for row in race["rows"]]
    return failed or any(row["error"].startswith("wrong") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
