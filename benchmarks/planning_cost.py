"""What does `compile` cost? Seconds and peak memory of each stage, for networks and numbers of images.

    python -m benchmarks.planning_cost [--only NAME ...] [--output FILE]

Every network runs in a process of its own, most with one thread, so that seconds of the processor are what it did;
seconds by the clock stand beside them. Memory is the peak of the resident set above its level before the run, the
images not counted. Weights are random, and cost what trained ones do.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import fxprune
from benchmarks._cost import peak_mb, reset_peak_mb
from fxprune.calibration.stages import Run
from fxprune.comparison.rivals import settle
from fxprune.environment import environment
from fxprune.files import write_json
from fxprune.models import load_model

RESULTS = Path(__file__).parent / "results" / "planning_cost.json"


@dataclass(frozen=True)
class Case:
    """A network and its calibration images.

    Attributes:
        model: a name for `load_model`.
        pixels: height and width of the images.
        images: how many.
        arguments: of `fxprune.compile`.
        threads: of PyTorch.
    """

    model: str
    pixels: int
    images: int
    arguments: dict[str, Any]
    threads: int = 1


CASES = {
    "resnet20, 1024 images, macs=0.57": Case("resnet20", 32, 1024, {"macs": 0.57}),
    "resnet20, 1024 images, ratio=0.5": Case("resnet20", 32, 1024, {"ratio": 0.5}),
    "cifar_vgg16, 256 images, ratio=0.5": Case("cifar_vgg16", 32, 256, {"ratio": 0.5}),
    "mobilenet_v2, 64 images, ratio=0.25": Case("mobilenet_v2", 224, 64, {"ratio": 0.25}),
    "resnet18, 64 images, ratio=0.5": Case("resnet18", 224, 64, {"ratio": 0.5}),
    "resnet50, 512 images, macs=0.57, 2 threads": Case("resnet50", 224, 512, {"macs": 0.57}, threads=2),
}


@dataclass
class Cost:
    """What a stage costs so far.

    Attributes:
        processor_seconds, seconds: the latter by the clock.
        peak_mb: of memory above the level at the start of the run, in MB (10^6 bytes); None where the system does not
            tell it.
    """

    processor_seconds: float = 0.0
    seconds: float = 0.0
    peak_mb: float | None = None


class Stages:
    """What each stage of a run costs: the run says when the next one begins.

    Attributes:
        found: by stage, in their order.
    """

    def __init__(self) -> None:
        self.found: dict[str, Cost] = {}
        self._level, self._name = reset_peak_mb(), "capture"
        self._clocks = time.process_time(), time.perf_counter()

    def begin(self, name: str) -> None:
        """The stage before it is over."""
        clocks, cost = (time.process_time(), time.perf_counter()), self.found.setdefault(self._name, Cost())
        cost.processor_seconds += clocks[0] - self._clocks[0]
        cost.seconds += clocks[1] - self._clocks[1]
        if self._level is not None:
            cost.peak_mb = max(cost.peak_mb or 0.0, peak_mb() - self._level)
            reset_peak_mb()
        self._name, self._clocks = name, clocks


def measure(case: Case) -> dict[str, dict[str, float | None]]:
    """What each stage of `compile` costs."""
    model = load_model(case.model).eval()
    images = torch.randn(case.images, 3, case.pixels, case.pixels, generator=torch.Generator().manual_seed(0))
    settle(model, images[:8])
    stages, begin = Stages(), Run.begin

    def noted(run: Run, stage: str, passes: int = 1) -> None:
        stages.begin(stage)
        begin(run, stage, passes)

    with patch.object(Run, "begin", noted), patch.object(Run, "finish", lambda run: stages.begin("rewrite and verify")):
        fxprune.compile(model, calibration=images, **case.arguments)
    stages.begin("")
    return {stage: asdict(cost) for stage, cost in stages.found.items()}


def table(results: dict[str, Any]) -> str:
    """The stages in Markdown, one line a network."""
    stages = list(dict.fromkeys(stage for found in results.values() for stage in found))
    columns = ["network", *(f"{stage}, s" for stage in stages), "all, s", "by the clock, s", "peak, MB"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, found in results.items():
        spent = [found[stage]["processor_seconds"] if stage in found else None for stage in stages]
        clock = sum(cost["seconds"] for cost in found.values())
        peaks = [cost["peak_mb"] for cost in found.values() if cost["peak_mb"] is not None]
        figures = [*spent, sum(s for s in spent if s is not None), clock, max(peaks, default=None)]
        lines.append(f"| {name} | {' | '.join('' if value is None else f'{value:.0f}' for value in figures)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each case in a process of its own, and write the record after each."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--case", choices=tuple(CASES), help="measure it in this process, and print JSON")
    options = parser.parse_args(arguments)
    if options.case:
        torch.set_num_threads(CASES[options.case].threads)
        print(json.dumps(measure(CASES[options.case])))
        return 0
    results: dict[str, Any] = {}
    for name in options.only:
        command = [sys.executable, "-m", "benchmarks.planning_cost", "--case", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {done.stderr.strip()[-500:]}", file=sys.stderr)
            return 1
        results[name] = json.loads(done.stdout.splitlines()[-1])
        write_json(options.output, {"environment": environment(), "results": results})
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
