"""`fxprune compare`: accuracy against MACs and measured time, of several pruners on one network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fxprune.cli import values
from fxprune.cli.options import DATA_HELP, MODEL_HELP, add_recipe_options, device_of, recipe_of, refuse
from fxprune.cli.output import Subparsers
from fxprune.vocabulary import ComparedMethod

if TYPE_CHECKING:
    from fxprune.comparison.requests import ComparisonRequest

DESCRIPTION = """\
Which pruning is worth it? Accuracy against MACs and against measured time, of several pruners on one network.

All methods begin with the same weights and are fine-tuned by the same recipe for as many epochs; a seed draws the
images to calibrate with, those to train with, and their batches, alike for every method. What counts is the network
after the last epoch. Test images are looked at before and after fine-tuning and choose nothing; to choose a recipe,
`--evaluate validation` looks at images that are held back from the training images.

A run that is done is a file in DIR/runs; the same command goes on where it was stopped, and other methods, shares and
seeds can be added. `--latency-only` times one network of each method and share that is done, all in one race: on a
machine that does nothing else. Each time DIR gets `comparison.json`, `comparison.md`, `comparison.png` and
`comparison.svg`.
"""
EXAMPLES = """\
examples:
  fxprune compare digits_resnet --weights runs/digits/model.pt --data digits --epochs 2 \\
      --calibration-images 256 --methods dense,fxprune,filters-refit --output runs/digits-compared
  fxprune compare resnet56 --weights resnet56.th --data cifar10:DIR --shares 0.57,0.4 --epochs 1 --output runs/resnet56
  fxprune compare ... --latency-only

exit codes: 0 done, 1 a method failed, 2 an error, 130 stopped
"""


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="prune a model by several methods, fine-tune all alike, compare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_options(parser)
    parser.set_defaults(run=run, error=parser.error, speaker="fxprune")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be compared on a model."""
    add = parser.add_argument
    add("--weights", type=Path, help="state dict of the model (default: random)")
    add("--data", required=True, metavar="SOURCE", help=DATA_HELP)
    add("--download", action="store_true", help="fetch CIFAR-10, CIFAR-100 or Caltech-101 into DIR first")
    add("--output", type=Path, required=True, metavar="DIR", help="where runs, record and pictures go")
    add(
        "--methods",
        default="all",
        metavar="M,M,...",
        help=f"some of {values.either(ComparedMethod)} (default: all)",
    )
    add(
        "--shares",
        type=values.list_of(values.fraction("share of MACs", "0.57,0.4")),
        default=[0.57, 0.4],
        help="of MACs that remain (default: 0.57,0.4)",
    )
    add("--seeds", type=values.seeds, default=[0, 1, 2], metavar="S,S,...", help="default: 0,1,2")
    add("--plan-seed", type=int, metavar="S", help="plan once, with this seed (default: each seed plans anew)")
    add(
        "--train-images",
        type=values.count,
        metavar="N",
        help="fine-tune with so many, drawn by the seed (default: all)",
    )
    add("--calibration-images", type=values.count, default=1024, metavar="N", help="default: %(default)s")
    add("--snapshots", nargs="+", type=Path, default=[], metavar="FILE", help="earlier states of the training, for TMI")
    add("--validation", type=int, metavar="N", help="training images held back (default: 5000, of the digits 200)")
    add("--evaluate", choices=("test", "validation"), default="test", help="on what images (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--threads", type=values.count, help="of torch (default: its own choice)")
    group = parser.add_argument_group("latency")
    group.add_argument("--latency-only", action="store_true", help="time what is done, in place of doing more")
    batches = values.list_of(values.count)
    group.add_argument("--batches", type=batches, default=[1, 32], metavar="N,N,...", help="default: 1,32")
    group.add_argument("--rounds", type=values.count, default=15, help="turns of each network (default: %(default)s)")
    add_recipe_options(parser)


def run(options: argparse.Namespace) -> int:
    """Do what is not done yet, and write what is known; return the exit code."""
    from fxprune.files import check_folder

    check_folder(options.output)
    import torch

    from fxprune.comparison.accuracy import compare, time_done
    from fxprune.training.data.sources import fetch

    def complain(about: str) -> None:
        print(f"{options.speaker}: {about}", file=sys.stderr)

    request, progress = request_of(options), sys.stderr.isatty()
    if options.download:
        fetch(options.data)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.latency_only:
            time_done(request, complain, options.batches, options.rounds, progress)
            return 0
        return int(bool(compare(request, complain, progress)))
    except KeyboardInterrupt:
        complain("stopped; the same command goes on with the run that it was in")
        return 130


def request_of(options: argparse.Namespace) -> ComparisonRequest:
    """What the options ask for; ends with a message where they do not go together.

    Raises:
        RecipeError: a value is out of its range.
    """
    from fxprune.comparison.extras import ComparisonError
    from fxprune.comparison.requests import ComparisonRequest, choose_methods
    from fxprune.training.data.sources import usual_validation

    recipe = recipe_of(options)
    try:
        return ComparisonRequest(
            model=options.model,
            data=options.data,
            output=options.output,
            recipe=recipe,
            weights=options.weights,
            methods=choose_methods(options.methods, bool(options.snapshots)),
            shares=options.shares,
            seeds=options.seeds,
            plan_seed=options.plan_seed,
            train_images=options.train_images,
            calibration_images=options.calibration_images,
            snapshots=options.snapshots,
            validation=usual_validation(options.data) if options.validation is None else options.validation,
            evaluate=options.evaluate,
            device=device_of(options),
            amp=options.amp,
            channels_last=options.channels_last,
        )
    except ComparisonError as error:
        refuse(options, error)
