"""`fxprune verify`: does a file still compute what the masked model does?"""

import argparse
from dataclasses import asdict
from pathlib import Path

import fxprune
from fxprune.cli.options import (
    FILE_HELP,
    MODEL_HELP,
    add_model_options,
    add_output_options,
    calibration_of,
    inputs_of,
    model_of,
)
from fxprune.cli.output import Subparsers, show, shows_progress, steps, verdict
from fxprune.errors import VerificationError


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("verify", help="check a saved file against the masked model it came from")
    parser.add_argument("file", metavar="FILE", type=Path, help=FILE_HELP)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--calibration", type=Path, metavar="DATA", help="the data that FILE was compiled with, if it was with any"
    )
    add_model_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify as asked; return the exit code."""
    from fxprune.exact.record import record_of

    model = model_of(options.model, options)
    calibration = calibration_of(options)
    with steps(3, options) as step:
        step("loading")
        pruned = fxprune.load(options.file, model)
        step("masking")
        plan = record_of(pruned).plan
        masked = fxprune.mask(model, plan, calibration, bake=bool(plan.baked), progress=shows_progress(options))
        step("checking")
        try:
            check = fxprune.verify(pruned, masked, inputs_of(model, options, calibration))
        except VerificationError as error:
            if calibration is not None:
                raise
            hint = "if it was compiled with --calibration, give the same data"
            raise VerificationError(f"{error}; {hint}") from error
    return show(options, asdict(check), verdict(check))
