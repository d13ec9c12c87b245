"""`fxprune demo`: the question; `demo` has the answer."""

import argparse
from pathlib import Path

from fxprune.cli.options import add_output_options
from fxprune.cli.output import Subparsers, show, shows_progress


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("demo", help="train a network on digits, make it smaller, compare")
    parser.add_argument("--output", type=Path, default=Path("fxprune-demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.75, help="share of kernel groups to prune (%(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo; return the exit code."""
    from fxprune.files import check_folder

    check_folder(options.output)
    from fxprune.cli import demo

    result = demo.run(
        options.output,
        ratio=options.ratio,
        epochs=options.epochs,
        seed=options.seed,
        progress=shows_progress(options),
    )
    return show(options, result.to_dict(), str(result))
