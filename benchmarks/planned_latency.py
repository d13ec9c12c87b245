"""Is a share of the latency reached that was asked for in a runtime?

    python -m benchmarks.planned_latency --model resnet18,resnet50 --runtime onnxruntime,openvino --record

A network is compiled with `latency=`, then raced against the best dense form of itself in that runtime, anew and for
longer than the planner does. Weights are random: which kernels or filters go changes no time. The share is the median
of the ratios of neighbouring calls, by the clock, and beside it by the time that the processor spent, which other work
on the machine does not touch.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn

import fxprune
from benchmarks._commands import MODEL_HELP, add_output, output_of, run_as
from fxprune.cli import values
from fxprune.environment import environment
from fxprune.files import write_json
from fxprune.models import load_model
from fxprune.vocabulary import Granularity, RuntimeName

NAME = "planned-latency-cpu.json"
ROUNDS = 101


def measure(options: argparse.Namespace) -> int:
    """Compile and race each network as asked, write the record and print the table."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.model:
        model = load_model(name, None).eval()
        inputs = torch.randn(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
        for runtime in options.runtime:
            dense = fxprune.accelerate(model, inputs, runtime=runtime)
            for granularity in options.granularity:
                row = {"model": name, "runtime": runtime, "granularity": granularity, "asked": options.latency}
                try:
                    row |= planned(model, dense, inputs, runtime, granularity, options.latency)
                except fxprune.PlanError as error:  # out of reach: a result, too
                    row["refused"] = str(error)
                rows.append(row)
                print(line(rows[-1]), flush=True)
                write_json(output_of(options, NAME), {"environment": environment(), "size": options.size, "rows": rows})
    return 0


def planned(
    model: nn.Module,
    dense: nn.Module,
    inputs: torch.Tensor,
    runtime: RuntimeName,
    granularity: Granularity,
    share: float,
) -> dict[str, Any]:
    """Compile a network for a share of the latency, and see what it takes."""
    began = time.perf_counter()
    table = fxprune.measure_latency(
        model, example_inputs=inputs, runtime=runtime, target="cpu", granularity=granularity
    )
    measured = time.perf_counter()
    fast = fxprune.compile(
        model, latency=share, runtime=runtime, target="cpu", granularity=granularity, example_inputs=inputs,
        latency_table=table, verify=False,
    )  # fmt: skip
    seconds = {"table": measured - began, "compile": time.perf_counter() - measured}
    report = fxprune.report(fast)
    said = next(note for note in report.notes if note.startswith("latency: "))
    by_clock, by_processor = shares(dense, fast, inputs)
    return {
        "reached": by_clock, "reached_processor_time": by_processor, "said": said, "table": table.place(),
        "macs": (report.macs_pruned or 0) / (report.macs_dense or 1), "seconds": seconds,
    }  # fmt: skip


@torch.inference_mode()
def shares(dense: nn.Module, fast: nn.Module, inputs: torch.Tensor) -> tuple[float, float]:
    """What `fast` takes of the time of `dense`, by the clock and by the processor: medians over rounds."""
    clocks: tuple[Callable[[], float], ...] = (time.perf_counter, time.process_time)
    ratios: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 2):
        taken: dict[str, list[float]] = {}
        order = (("dense", dense), ("fast", fast))
        for name, network in order if turn % 2 else order[::-1]:
            before = [clock() for clock in clocks]
            network(inputs)
            taken[name] = [clock() - start for clock, start in zip(clocks, before, strict=True)]
        if turn >= 2:
            for found, mine, theirs in zip(ratios, taken["fast"], taken["dense"], strict=True):
                found.append(mine / theirs)
    by_clock, by_processor = map(statistics.median, ratios)
    return by_clock, by_processor


def line(row: dict[str, Any]) -> str:
    """A row of a Markdown table."""
    names = ("macs", "reached", "reached_processor_time")
    figures = (f"{row[name]:.3f}" for name in names) if "refused" not in row else (row["refused"],)
    return f"| {' | '.join((row['model'], row['runtime'], row['granularity'], *figures))} |"


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.planned_latency", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=lambda text: text.split(","), default=["resnet18"], help=MODEL_HELP)
    parser.add_argument("--runtime", type=values.some_of("runtime", get_args(RuntimeName)), default=["onnxruntime"])
    parser.add_argument("--granularity", type=values.some_of("granularity", get_args(Granularity)), default=["kernel"])
    parser.add_argument("--latency", type=float, default=0.6, metavar="SHARE")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS")
    add_output(parser, NAME)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run as `python -m benchmarks.planned_latency`; returns the exit code."""
    return run_as("benchmarks.planned_latency", measure, read_options(arguments))


if __name__ == "__main__":
    sys.exit(main())
