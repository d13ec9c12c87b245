"""`fxprune report`: what became of each convolution, of a file or of a model that is compiled for it."""

import argparse
from pathlib import Path

import fxprune
from fxprune.cli.data import add_calibration, inputs_for
from fxprune.cli.options import (
    FILE_HELP,
    MODEL_HELP,
    add_amounts,
    add_choices,
    add_gathers,
    add_model_options,
    add_output_options,
    inputs_of,
    model_of,
    pruning_of,
)
from fxprune.cli.output import Subparsers, show, steps
from fxprune.errors import FxpruneError
from fxprune.tables import terminal_width


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("report", help="show what became of each convolution")
    parser.add_argument("source", metavar="FILE|MODEL", help=f"{FILE_HELP}, or {MODEL_HELP}")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the model that FILE was made from")
    add_model_options(parser)
    add_amounts(parser)
    add_calibration(parser)
    add_choices(parser)
    parser.add_argument("--markdown", action="store_true", help="for a README or an issue")
    add_gathers(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Report as asked; return the exit code."""
    if options.model is None and Path(options.source).is_file():
        raise FxpruneError(f"{options.source}: is a file; name its model too: fxprune report {options.source} MODEL")
    model = model_of(options.model or options.source, options)
    with steps(1, options) as step:
        if options.model:
            step("loading")
            pruned = fxprune.load(options.source, model)
        else:
            step("compiling")
            options.model = options.source
            given = inputs_for(model, options)
            calibration = None if given is None else given.calibration
            inputs = inputs_of(model, options, calibration)
            # Not fxprune.compile: a plan for a device can be reported where there is none.
            plan = fxprune.make_plan(model, example_inputs=inputs, calibration=calibration, **pruning_of(options))
            pruned = fxprune.rewrite(fxprune.mask(model, plan, calibration), plan, inputs)
    report = fxprune.report(pruned)
    if options.markdown:
        return show(options, report.to_dict(), report.to_markdown())
    return show(options, report.to_dict(), report.describe(gathers=options.gathers, width=terminal_width()))
