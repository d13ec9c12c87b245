"""`fxprune eval`: how good is a saved file, or a model? Agreement with the dense network, and accuracy with labels."""

from __future__ import annotations

import argparse
from pathlib import Path

import fxprune
from fxprune.cli.data import add_data_options, read_pictures
from fxprune.cli.options import (
    FILE_HELP,
    MODEL_HELP,
    add_model_options,
    add_output_options,
    has_random_weights,
    model_of,
    take_size,
)
from fxprune.cli.output import Subparsers, show, steps, warn
from fxprune.errors import FxpruneError

EXAMPLES = """\
examples:
  fxprune eval resnet50.pt resnet50 --weights resnet50.pth --data photos/
  fxprune eval resnet18 --pretrained --data photos/ --labels labels.csv
"""
FLATTERS = (
    "note: of pictures that it was calibrated with this says more good than is true; "
    "`fxprune compile` tells how it is on those that it held back"
)
"""Of a file: nobody wrote down on which pictures it was fitted."""
_ORIGIN = "give the weights that it was compiled from: --weights FILE or --pretrained"


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "eval",
        help="look at a saved file or a model on pictures: agreement, accuracy",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="FILE|MODEL", help=f"{FILE_HELP}, or {MODEL_HELP}")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the model that FILE was made from")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="a folder of pictures, at any depth")
    add_data_options(parser)
    add_model_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate as asked; return the exit code.

    Raises:
        FxpruneError: there is nothing to compare with, such as random weights.
    """
    from fxprune.calibration.pictures import find_pictures
    from fxprune.comparison.evaluation import evaluate

    if options.model is None and Path(options.source).is_file():
        raise FxpruneError(f"{options.source}: is a file; name its model too: fxprune eval {options.source} MODEL")
    if not options.data.is_dir():
        raise FxpruneError(f"{options.data}: is no folder of pictures")
    file = options.source if options.model else None
    options.model = options.model or options.source
    dense = model_of(options.model, options)
    random = f"{options.model} has random weights" if has_random_weights(options) else ""
    if random and file is None:
        raise FxpruneError(f"{random}, so there is nothing to measure; give --weights FILE or --pretrained")
    gallery = find_pictures(options.data)
    with steps(3, options) as step:
        step("loading")
        network = dense if file is None else fxprune.load(file, dense).eval()
        step("reading")
        take_size(options, network, dense)
        gallery, _ = gallery.drawn(min(len(gallery), options.pictures), options.seed)
        inputs, labels, source, how = read_pictures(gallery, dense, options)
        if labels is None and file is None:
            raise FxpruneError(
                f"{options.data}: the pictures have no labels, so there is nothing to measure; give --labels"
            )
        if random:
            compared = f"{random}, and {file} cannot be compared with it; {_ORIGIN}"
            if labels is None:
                raise FxpruneError(compared)
            warn(compared)
        step("looking")
        against = None if random or file is None else dense
        which = f"pictures of {options.data}"
        found = evaluate(network, inputs, labels, against, held_out=False, source=source, which=which)
    lines = [str(found), f"read: {how}", *([] if file is None else [FLATTERS])]
    return show(options, found.to_dict() | {"pictures": how}, "\n".join(lines))
