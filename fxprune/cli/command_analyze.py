"""`fxprune analyze`: the channel spaces of a model."""

import argparse
from dataclasses import asdict

import fxprune
from fxprune.cli.options import MODEL_HELP, add_model_options, add_output_options, inputs_of, model_of
from fxprune.cli.output import Subparsers, show, steps


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("analyze", help="show the channel spaces of a model")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_model_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Analyze as asked; return the exit code."""
    model = model_of(options.model, options)
    with steps(1, options) as step:
        step("analyzing")
        analysis = fxprune.analyze(model, inputs_of(model, options))
    spaces = [asdict(space) for space in analysis.spaces]
    document = {"model": options.model, "spaces": spaces, "boundaries": dict(analysis.boundaries)}
    return show(options, document, str(analysis))
