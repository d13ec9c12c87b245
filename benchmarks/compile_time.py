"""How long does compiling take, and how much memory? Seconds per step and peak memory, imports excluded.

    python -m benchmarks.compile_time [MODEL ...] [--repeat 3] [--threads 2] [--output FILE]
    python -m benchmarks.compile_time --scaling [--repeat 3] [--threads 1] [--output FILE]

Every measurement runs in a fresh process, after the imports and after building the model, so that no cache of an
earlier one helps it; the medians over the repetitions are shown. Memory is the peak of the resident set above its level
just before, against a limit of three times the model's own parameters plus 200 MB.

With `--scaling` it asks whether compiling takes longer than the network grows: processor time of each step for one
grouped convolution, over families of networks of growing depth, at 96 pixels. Processor time and not seconds, for other
programs on the machine then matter less; the least of the repetitions, for what they add is never negative.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from benchmarks._commands import add_output, output_of
from benchmarks._cost import timed, with_peak
from fxprune.environment import environment
from fxprune.models import default_input_size, example_inputs, load_model

MODELS = ("resnet18", "resnet50", "densenet121", "efficientnet_b0")
TARGET_SECONDS = {"resnet18": 2.0, "resnet50": 10.0, "densenet121": 15.0, "efficientnet_b0": 10.0}
"""Upper limits for `compile` without verification on two cores; the analysis alone has one second."""
RESULTS = "compile_time.json"

FAMILIES = {
    "resnet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "densenet": ("densenet121", "densenet169", "densenet201"),
    "inception_resnet_v2": ("timm:inception_resnet_v2",),
}
"""Networks of one kind, the smallest first."""
SCALING_PIXELS = 96
SCALING_RESULTS = "compile_time_scaling.json"
LARGEST_GROWTH = 1.5
"""How many times the processor time of the smallest network of a family a grouped convolution may take in another."""
SCALING_TARGET_SECONDS = {"timm:inception_resnet_v2": 12.0, "densenet201": 10.0}
"""Upper limits for all steps with verification, on one idle core."""

Measurement = dict[str, float | None]


def measure_steps(model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
    """Return the seconds of each step of `fxprune.compile`, called one by one; each step traces anew."""
    seconds: Measurement = {}
    seconds["analysis"], _ = timed(lambda: fxprune.analyze(model, inputs))
    seconds["plan"], plan = timed(lambda: fxprune.make_plan(model, 0.5, example_inputs=inputs))
    seconds["mask"], masked = timed(lambda: fxprune.mask(model, plan))
    seconds["rewrite"], _ = timed(lambda: fxprune.rewrite(masked, plan, inputs))
    return seconds


def measure_compile(model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
    """Return the seconds and the peak MB of `fxprune.compile` without verification."""
    (seconds, _), peak = with_peak(
        lambda: timed(lambda: fxprune.compile(model, 0.5, example_inputs=inputs, verify=False))
    )
    return {"compile": seconds, "compile peak MB": peak}


def measure_verified(model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
    """Return the seconds and the peak MB of `fxprune.compile` with verification, its default with example inputs."""
    (seconds, _), peak = with_peak(
        lambda: timed(lambda: fxprune.compile(model, 0.5, example_inputs=inputs, verify=True))
    )
    return {"verified": seconds, "verified peak MB": peak}


def measure_scaling(model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
    """Return the processor seconds of each step of `fxprune.compile` with verification, and the grouped convolutions;
    the inputs give the batch only.
    """
    inputs = tuple(torch.randn(*x.shape[:2], SCALING_PIXELS, SCALING_PIXELS) for x in inputs)
    seconds: Measurement = {}
    clock = time.process_time
    seconds["plan"], plan = timed(lambda: fxprune.make_plan(model, 0.5, example_inputs=inputs), clock)
    seconds["mask"], masked = timed(lambda: fxprune.mask(model, plan), clock)
    seconds["rewrite"], pruned = timed(lambda: fxprune.rewrite(masked, plan, inputs), clock)
    seconds["verify"], _ = timed(lambda: fxprune.verify(pruned, masked, inputs), clock)
    return {**seconds, "convolutions": len(plan.layers)}


MEASUREMENTS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Measurement]] = {
    "steps": measure_steps,
    "compile": measure_compile,
    "verified": measure_verified,
    "scaling": measure_scaling,
}
STEPS = ("plan", "mask", "rewrite", "verify")


def memory_limit_mb(model: nn.Module) -> float:
    """Return three times the size of the parameters plus 200 MB, in MB (10^6 bytes)."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6 + 200


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


def scaling(runs: Sequence[Measurement]) -> dict[str, Any]:
    """The least processor seconds of each step over the runs, their sum, and milliseconds a grouped convolution."""
    seconds = {step: min(run[step] or 0.0 for run in runs) for step in STEPS}
    total, count = sum(seconds.values()), int(runs[0]["convolutions"] or 0)
    return {
        "convolutions": count,
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "total_seconds": round(total, 3),
        "ms_per_convolution": round(1000 * total / count, 2),
    }


def growth(family: Sequence[str], results: dict[str, dict[str, Any]]) -> float:
    """How many times as long a grouped convolution takes in the largest network of a family as in the smallest."""
    smallest, largest = (results[name]["ms_per_convolution"] for name in (family[0], family[-1]))
    return float(largest / smallest)


def scaling_table(results: dict[str, dict[str, Any]]) -> str:
    """The results as text; `!` marks what is above its limit."""
    lines = [
        f"{'processor seconds':<26}" + "".join(f"{step:>9}" for step in (*STEPS, "all")) + f"{'convs':>7}{'ms/conv':>9}"
    ]
    for family, names in FAMILIES.items():
        for name in names:
            result = results[name]
            cells = [f"{result['seconds'][step]:.2f}" for step in STEPS]
            cells.append(_cell(result["total_seconds"], SCALING_TARGET_SECONDS.get(name), ".2f"))
            line = f"{name:<26}" + "".join(f"{cell:>9}" for cell in cells)
            lines.append(f"{line}{result['convolutions']:>7}{result['ms_per_convolution']:>9.1f}")
        lines.append(
            f"{family}: from the smallest to the largest x {_cell(growth(names, results), LARGEST_GROWTH, '.2f')}"
        )
    return "\n".join([*lines, "! above its limit"])


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
    parser.add_argument("--threads", type=int, help="of torch (default: 2, with --scaling 1)")
    add_output(parser, RESULTS)
    parser.add_argument("--scaling", action="store_true", help="processor time over families of networks instead")
    parser.add_argument("--inside", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.threads = options.threads or (1 if options.scaling else 2)
    options.output = output_of(options, SCALING_RESULTS if options.scaling else RESULTS)
    torch.set_num_threads(options.threads)

    if options.inside:
        model = load_model(options.models[0])
        inputs = example_inputs(default_input_size(model))
        print(json.dumps(MEASUREMENTS[options.inside](model, inputs)))
        return 0

    if options.scaling:
        return measure_families(options.repeat, options.threads, options.output)
    results: dict[str, dict[str, Any]] = {}
    failed = False
    kinds = [kind for kind in MEASUREMENTS if kind != "scaling"]
    with tqdm(total=len(options.models) * len(kinds) * options.repeat, disable=not sys.stderr.isatty()) as bar:
        for name in options.models:
            runs = []
            for kind in kinds:
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
    _write(options.output, {"ratio": 0.5, "repeat": options.repeat}, results)
    return int(failed)


def measure_families(repeat: int, threads: int, output: Path) -> int:
    """Measure `FAMILIES`, print the table, write the record."""
    names = [name for family in FAMILIES.values() for name in family]
    results = {
        name: scaling([measure_in_fresh_process(name, "scaling", threads) for _ in range(repeat)])
        for name in tqdm(names, disable=not sys.stderr.isatty())
    }
    print(scaling_table(results))
    grown = {family: round(growth(members, results), 3) for family, members in FAMILIES.items()}
    settings = {"ratio": 0.5, "repeat": repeat, "pixels": SCALING_PIXELS, "growth": grown}
    _write(output, settings, results)
    return 0


def _write(output: Path, settings: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(), "settings": settings, "results": results}
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
