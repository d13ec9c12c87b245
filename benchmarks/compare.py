r"""Which pruning is worth it? Accuracy against MACs and against measured time, of several pruners on one network.

    python -m benchmarks.compare --model resnet56 --weights resnet56.th --data cifar10:DIR --shares 0.57,0.4 \
        --seeds 0,1,2 --epochs 1 --train-images 10000 --output runs/resnet56
    python -m benchmarks.compare ... --latency-only

It is `fxprune compare` (`fxprune.cli.command_compare`), which says what it does and writes, and whose records of this
repository are `benchmarks/results/comparison-*.json`.

Exit codes: 0 done, 1 a method failed, 2 an error, 130 stopped.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks._commands import MODEL_HELP, run_as
from fxprune.cli import command_compare


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, and write what is known; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.partition("\n\n")[0].lstrip("r")
    )
    parser.add_argument("--model", help=MODEL_HELP)
    command_compare.add_options(parser)
    parser.set_defaults(error=parser.error)
    return run_as("benchmarks.compare", command_compare.run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
