"""`fxprune sweep`: one network at several budgets; the smallest that loses no more than is allowed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from fxprune.cli import values
from fxprune.cli.data import DATA_HELP, add_data_options, inputs_for
from fxprune.cli.options import MODEL_HELP, add_model_options, add_output_options, model_of, warn_of_random_weights
from fxprune.cli.output import Subparsers, show, shows_progress
from fxprune.errors import CalibrationError
from fxprune.vocabulary import BenchRuntime, Granularity

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
EXAMPLES = """\
examples:
  fxprune sweep resnet18 --pretrained --calibration photos/
  fxprune sweep resnet18 --weights w.pth --calibration photos/ --macs 0.9,0.7,0.5 --runtime eager,accelerate \\
      --lose 1 --output sweep.json --plot sweep.png
"""


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "sweep",
        help="prune a model to several budgets: accuracy against MACs and time",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add("--calibration", type=Path, required=True, metavar="DATA", help=DATA_HELP)
    shares = values.list_of(values.fraction("share of MACs", "0.9,0.7,0.5"))
    usual = ",".join(map(str, BUDGETS))
    add("--macs", type=shares, default=list(BUDGETS), metavar="S,S,...", help=f"shares to keep (default: {usual})")
    add("--granularity", choices=get_args(Granularity), default="kernel", help="what goes (default: %(default)s)")
    add("--lose", type=float, default=1.0, metavar="POINTS", help="of accuracy at most, in percent (default: 1)")
    runtimes = values.some_of("runtime", get_args(BenchRuntime))
    add("--runtime", type=runtimes, default=["eager"], help=f"some of {values.either(BenchRuntime)} (default: eager)")
    add("--batch", type=values.count, default=1, help="pictures in a timed call (default: %(default)s)")
    add("--threads", type=values.count, help="of torch (default: its own choice)")
    add("--output", type=Path, metavar="FILE", help="write a JSON record")
    add("--plot", type=Path, metavar="FILE", help="draw accuracy against MACs and time, .png or .svg")
    add_data_options(parser)
    add_model_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run, error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Sweep as asked; return the exit code.

    Raises:
        CalibrationError: there are no pictures to look at the results with.
    """
    import torch

    from fxprune.comparison.extras import require
    from fxprune.comparison.plots import FORMATS
    from fxprune.comparison.sweep import SweepInputs, draw_sweep, sweep
    from fxprune.files import check_writable, write_json

    for path in (options.output, options.plot):
        if path is not None:
            check_writable(path)
    if options.plot is not None:
        if options.plot.suffix not in FORMATS:
            options.error(f"--plot {options.plot}: must end in {' or '.join(FORMATS)}")
        require("matplotlib")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = model_of(options.model, options)
    warn_of_random_weights(options)
    given = inputs_for(model, options)
    assert given is not None
    if given.held_out is None:
        quarter = len(given.calibration) // 4
        if quarter < 1:
            raise CalibrationError(f"{options.calibration}: too few inputs to hold some back; give 4 at least")
        inputs = SweepInputs(given.calibration[quarter:], given.calibration[:quarter])
    else:
        inputs = SweepInputs(given.calibration, given.held_out, given.labels, given.source)
    found = sweep(
        options.model,
        model,
        inputs,
        options.macs,
        options={"granularity": options.granularity, "seed": options.seed},
        runtimes=options.runtime,
        allowed=options.lose,
        batch=options.batch,
        progress=shows_progress(options),
    )
    if options.output is not None:
        write_json(options.output, found.to_dict())
    if options.plot is not None:
        draw_sweep(found, options.plot)
    return show(options, found.to_dict(), f"{found}\n{given.told}")
