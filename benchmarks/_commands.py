"""Benchmarks that are commands of fxprune under a name of their own, beside their records."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from fxprune.errors import FxpruneError
from fxprune.models.cifar import CIFAR_MODELS

RESULTS = Path(__file__).parent / "results"
"""The records of this repository. They change where that is asked for, and at no other time."""
DRAFTS = Path("build") / "benchmarks"
"""Where a benchmark writes unless it is told."""

MODEL_HELP = f"{', '.join(CIFAR_MODELS)}, or a name for `fxprune compile`"


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """Add where the record goes that is called `name` in the repository."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help=f"JSON record (default: {DRAFTS}/{name})")
    where.add_argument("--record", action="store_true", help=f"replace the record of this repository, results/{name}")


def output_of(options: argparse.Namespace, name: str) -> Path:
    """Where the record goes."""
    chosen: Path | None = options.output
    return chosen or (RESULTS if options.record else DRAFTS) / name


def run_as(name: str, run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command of `fxprune.cli`; `name` speaks, and any error is one line and exit code 2."""
    options.speaker = name
    try:
        return run(options)
    except (FxpruneError, OSError, ValueError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
