"""`fxprune verify`: does a file still compute what the masked model does?"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import fxprune
from fxprune.cli.data import add_calibration, inputs_for
from fxprune.cli.options import (
    FILE_HELP,
    MODEL_HELP,
    add_model_options,
    add_output_options,
    inputs_of,
    model_of,
    take_size,
)
from fxprune.cli.output import Subparsers, show, shows_progress, steps, verdict
from fxprune.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fxprune.vocabulary import Output


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("verify", help="check a saved file against the masked model it came from")
    parser.add_argument("file", metavar="FILE", type=Path, help=FILE_HELP)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_calibration(parser, "; here the same as FILE was compiled with")
    add_model_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify as asked; return the exit code."""
    from fxprune.exact.record import record_of

    model = model_of(options.model, options)
    pruned = fxprune.load(options.file, model)
    take_size(options, pruned, model)
    given = inputs_for(model, options)
    calibration = None if given is None else given.calibration
    with steps(2, options) as step:
        step("masking")
        plan = record_of(pruned).plan
        masked = fxprune.mask(model, plan, calibration, bake=bool(plan.baked), progress=shows_progress(options))
        step("checking")
        inputs = inputs_of(model, options, calibration)
        try:
            check = fxprune.verify(pruned, masked, inputs)
        except VerificationError as error:
            raise VerificationError(_explained(error, pruned, masked, plan, inputs, options)) from error
    return show(options, asdict(check), verdict(check))


def _explained(
    error: VerificationError,
    pruned: nn.Module,
    masked: nn.Module,
    plan: fxprune.PrunePlan,
    inputs: tuple[Tensor],
    options: argparse.Namespace,
) -> str:
    """Why a file differs from the masked model: most often, because they come from other weights or other data. They do
    if the masked model, rewritten now, computes what it should.
    """
    from torch import fx

    output: Output = "graph" if isinstance(pruned, fx.GraphModule) else "module"
    try:
        fxprune.verify(fxprune.rewrite(masked, plan, inputs, output=output), masked, inputs)
    except VerificationError:
        return str(error)
    hints = []
    if options.weights is None:
        hints.append("MODEL has random weights here, so give those that FILE was compiled from with --weights")
    if options.calibration is None:
        hints.append("if it was compiled with --calibration, give the same data")
    hint = "; ".join(hints) or "give the --weights, --calibration, --pictures and --seed that it was compiled with"
    return (
        f"{options.file} holds other weights than {options.model} masked by the same plan: {hint}. What was "
        "recovered or trained after that has weights of its own, and nothing to compare with. The rewriting itself is "
        "right: that plan, applied to MODEL now, is exact"
    )
