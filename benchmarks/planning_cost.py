"""What do planning and refit cost? Processor seconds and peak memory of each stage, for networks and numbers of images.

    python -m benchmarks.planning_cost [--only NAME ...] [--output FILE]

Every network runs in a process of its own, most with one thread, so that seconds of the processor are what it did;
seconds by the clock stand beside them. Memory is the peak of the resident set above its level before the stage, the
images not counted. Weights are random, and cost what trained ones do.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from benchmarks._cost import timed, with_peak
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
        arguments: of `fxprune.make_plan`.
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


def measure(case: Case) -> dict[str, dict[str, float | None]]:
    """Seconds and MB of each stage: the plan, sensitivities included where there is a budget, then mask with refit."""
    model = load_model(case.model).eval()
    images = torch.randn(case.images, 3, case.pixels, case.pixels, generator=torch.Generator().manual_seed(0))
    settle(model, images[:8])
    found: dict[str, dict[str, float | None]] = {}
    plan = _stage(found, "plan", lambda: fxprune.make_plan(model, calibration=images, **case.arguments))
    masked = _stage(found, "refit", lambda: fxprune.mask(model, plan, images))
    _stage(found, "rewrite and verify", lambda: _rewritten(masked, plan, images[:2]))
    return found


def _rewritten(masked: nn.Module, plan: fxprune.PrunePlan, x: Tensor) -> None:
    fxprune.verify(fxprune.rewrite(masked, plan, x), masked, x)


def _stage(found: dict[str, dict[str, float | None]], name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    (processor_seconds, result), peak = with_peak(lambda: timed(work, time.process_time))
    seconds = time.perf_counter() - start
    found[name] = {"processor_seconds": processor_seconds, "seconds": seconds, "peak_mb": peak}
    return result


def table(results: dict[str, Any]) -> str:
    """The stages in Markdown, one line a network."""
    stages = list(dict.fromkeys(stage for found in results.values() for stage in found))
    lines = [f"| network | {' | '.join(f'{stage}, s' for stage in stages)} | all, s | peak, MB |"]
    lines.append("|---" * (len(stages) + 3) + "|")
    for name, found in results.items():
        seconds = [found[stage]["processor_seconds"] for stage in stages]
        peaks = [found[stage]["peak_mb"] for stage in stages if found[stage]["peak_mb"] is not None]
        cells = " | ".join(f"{s:.0f}" for s in [*seconds, sum(seconds)])
        lines.append(f"| {name} | {cells} | {max(peaks, default=float('nan')):.0f} |")
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
