r"""Are saved MACs saved time? The latency of a dense network against pruned ones, in one runtime or several.

    python -m benchmarks.latency --model resnet50 --ratio 0.5 --batch 1,8 --runtime eager,compile,script
    python -m benchmarks.latency --model resnet18 --ratio 0.5,0.75 --against dense,torch-pruning --layers --plot r18.png
    python -m benchmarks.latency --plot all.svg --from benchmarks/results/latency-*.json

It is `fxprune bench` (`fxprune.cli.command_bench`; the method is in `fxprune.comparison.latency`). Its records go to
`build/benchmarks/`, or with `--record` to those of this repository.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from benchmarks._commands import DRAFTS, MODEL_HELP, output_of, run_as
from fxprune.cli import command_bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the record after each batch; return 1 if a network computed something else."""
    return run_as("benchmarks.latency", command_bench.run, read_options(arguments))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Those of `fxprune bench`, and where the record of this repository is."""
    description = "Latency of a network, dense and pruned, in one runtime or several."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=description)
    parser.add_argument("--model", help=MODEL_HELP)
    command_bench.add_options(parser, f"JSON record (default: {DRAFTS}/latency-MODEL-DEVICE.json)")
    parser.add_argument("--record", action="store_true", help="replace the record of this repository in results/")
    parser.set_defaults(error=parser.error, json=False, quiet=False)
    options = parser.parse_args(arguments)
    if not options.records and options.model is None:
        parser.error("--model is needed: what to measure")
    if options.record and options.output is not None:
        parser.error("--record says where the record goes, and so does --output; leave one out")
    if options.model is not None:
        name = re.sub(r"[^\w.-]+", "-", options.model)
        options.output = output_of(options, f"latency-{name}-{options.device}.json")
    return options


if __name__ == "__main__":
    sys.exit(main())
