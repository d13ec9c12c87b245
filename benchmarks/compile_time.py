"""How long does compiling take, and how much memory? Seconds per step and peak memory, imports excluded.

    python -m benchmarks.compile_time [MODEL ...] [--repeat 3] [--threads 2] [--output FILE]

Every measurement runs in a fresh process, after the imports and after building the model, so that no cache of an
earlier one helps it; the medians over the repetitions are shown. Memory is the peak of the resident set above its level
just before, against a limit of three times the model's own parameters plus 200 MB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from fxprune.environment import environment
from fxprune.models import default_input_size, example_inputs, load_model

MODELS = ("resnet18", "resnet50", "densenet121", "efficientnet_b0")
TARGET_SECONDS = {"resnet18": 2.0, "resnet50": 10.0, "densenet121": 15.0, "efficientnet_b0": 10.0}
"""Upper limits for `compile` without verification on two cores; the analysis alone has one second."""
RESULTS = Path(__file__).parent / "results" / "compile_time.json"

Measurement = dict[str, float | None]
T = TypeVar("T")


def measure_steps(model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
    """Return the seconds of each step of `fxprune.compile`, called one by one; each step traces anew."""
    seconds: Measurement = {}
    seconds["analysis"], _ = _timed(lambda: fxprune.analyze(model, inputs))
    seconds["plan"], plan = _timed(lambda: fxprune.make_plan(model, 0.5, example_inputs=inputs))
    seconds["mask"], masked = _timed(lambda: fxprune.mask(model, plan))
    seconds["rewrite"], _ = _timed(lambda: fxprune.rewrite(masked, plan, inputs))
    return seconds


def measure_compile(model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
    """Return the seconds and the peak MB of `fxprune.compile` without verification."""
    seconds, peak = _timed_with_peak(lambda: fxprune.compile(model, 0.5, example_inputs=inputs, verify=False))
    return {"compile": seconds, "compile peak MB": peak}


def measure_verified(model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
    """Return the seconds and the peak MB of `fxprune.compile` with verification, its default with example inputs."""
    seconds, peak = _timed_with_peak(lambda: fxprune.compile(model, 0.5, example_inputs=inputs, verify=True))
    return {"verified": seconds, "verified peak MB": peak}


MEASUREMENTS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Measurement]] = {
    "steps": measure_steps,
    "compile": measure_compile,
    "verified": measure_verified,
}


def memory_limit_mb(model: nn.Module) -> float:
    """Return three times the size of the parameters plus 200 MB, in MB (10^6 bytes)."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6 + 200


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _timed_with_peak(work: Callable[[], object]) -> tuple[float, float | None]:
    before = _reset_peak_mb()
    seconds, _ = _timed(work)
    return seconds, None if before is None else _status_mb("VmHWM") - before


def _reset_peak_mb() -> float | None:
    """Set the kernel's high-water mark of resident memory to the present level, and return it; None where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return None
    return _status_mb("VmRSS")


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(f"/proc/self/status has no {field}")


def measure_in_fresh_process(name: str, kind: str, threads: int) -> Measurement:
    """Run one of `MEASUREMENTS` in a new interpreter.

    Raises:
        RuntimeError: it ended with an error, whose last line is in the message.
    """
    command = [sys.executable, "-m", "benchmarks.compile_time", name, "--inside", kind, "--threads", str(threads)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{name}, {kind}: exit code {done.returncode}: {reason}")
    measurement: Measurement = json.loads(done.stdout.splitlines()[-1])
    return measurement


def medians(runs: Sequence[Measurement]) -> Measurement:
    """Return the median of each quantity over the runs; None where a run lacks it."""
    found: Measurement = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        values = [value for run in runs if (value := run.get(key)) is not None]
        found[key] = statistics.median(values) if values else None
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as text: seconds, then memory in MB; `!` marks what is above its limit."""
    steps = ("analysis", "plan", "mask", "rewrite", "compile", "verified")
    memory = f"{'peak MB':>11}{'verified':>11}{'limit':>9}"
    lines = [f"{'seconds':<18}" + "".join(f"{step:>11}" for step in steps) + memory]
    for name, result in results.items():
        limits = {"analysis": 1.0, "compile": result["target_seconds"]}
        cells = [_cell(result.get(step), limits.get(step), ".2f") for step in steps]
        cells += [_cell(result.get(f"{kind} peak MB"), result["limit_mb"], ".0f") for kind in ("compile", "verified")]
        lines.append(f"{name:<18}" + "".join(f"{cell:>11}" for cell in cells) + f"{result['limit_mb']:>9.0f}")
    return "\n".join([*lines, "! above its limit"])


def _cell(value: float | None, limit: float | None, style: str) -> str:
    if value is None:
        return "-"
    return f"{value:{style}}" + ("!" if limit is not None and value > limit else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record; return 1 if a measurement failed."""
    description = "Seconds and peak memory of fxprune.compile, each in a fresh process."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=description)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each measurement (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON record (default: benchmarks/results/)")
    parser.add_argument("--inside", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    if options.inside:
        model = load_model(options.models[0])
        inputs = example_inputs(default_input_size(model))
        print(json.dumps(MEASUREMENTS[options.inside](model, inputs)))
        return 0

    results: dict[str, dict[str, Any]] = {}
    failed = False
    with tqdm(total=len(options.models) * len(MEASUREMENTS) * options.repeat, disable=not sys.stderr.isatty()) as bar:
        for name in options.models:
            runs = []
            for kind in MEASUREMENTS:
                for _ in range(options.repeat):
                    bar.set_description_str(f"{name} {kind}")
                    try:
                        runs.append(measure_in_fresh_process(name, kind, options.threads))
                    except RuntimeError as error:  # the other measurements are worth having all the same
                        tqdm.write(f"benchmarks.compile_time: error: {error}", file=sys.stderr)
                        failed = True
                    bar.update()
            limits = {"limit_mb": memory_limit_mb(load_model(name)), "target_seconds": TARGET_SECONDS.get(name)}
            results[name] = medians(runs) | limits
    print(table(results))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"ratio": 0.5, "repeat": options.repeat}
    record = {"environment": environment(), "settings": settings, "results": results}
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
