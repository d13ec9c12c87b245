"""Benchmarks that are commands of fxprune under a name of their own, beside their records."""

import argparse
import sys
from collections.abc import Callable

from fxprune.errors import FxpruneError
from fxprune.models.cifar import CIFAR_MODELS

MODEL_HELP = f"{', '.join(CIFAR_MODELS)}, or a name for `fxprune compile`"


def run_as(name: str, run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command of `fxprune.cli`; `name` speaks, and any error is one line and exit code 2."""
    options.speaker = name
    try:
        return run(options)
    except (FxpruneError, OSError, ValueError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
