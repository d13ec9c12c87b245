r"""Train a network, dense or pruned, and record how accurate it becomes.

    python -m benchmarks.train --model resnet20 --weights resnet20.th --data cifar10:DIR --ratio 0.5 \
        --calibration-images 512 --epochs 5 --output runs/resnet20
    python -m benchmarks.train --model cifar_vgg16 --data cifar10:DIR --lr 0.1 --schedule cosine --epochs 30 \
        --output runs/vgg16
    torchrun --nproc-per-node 2 -m benchmarks.train ...

It is `fxprune train` (`fxprune.cli.command_train`), which says what it does and writes, and whose records of this
repository are `benchmarks/results/train-*.json`.

Exit codes: 0 done, 2 an error, 130 (or 143) stopped by SIGINT (or SIGTERM), its state saved.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks._commands import MODEL_HELP, run_as
from fxprune.cli import command_train


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train", description=__doc__.partition("\n\n")[0].lstrip("r")
    )
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    command_train.add_options(parser)
    parser.set_defaults(error=parser.error)
    return run_as("benchmarks.train", command_train.run, parser.parse_args(arguments))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
