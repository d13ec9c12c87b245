"""`fxprune compare`: accuracy against MACs and measured time, of several pruners on one network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fxprune.cli import values
from fxprune.cli.options import DATA_HELP, MODEL_HELP, add_training_options, device_of, refuse, training_of
from fxprune.cli.output import Subparsers
from fxprune.vocabulary import ComparedMethod

if TYPE_CHECKING:
    from fxprune.comparison.experiments import DenseTraining, Experiment
    from fxprune.comparison.requests import ComparisonRequest
    from fxprune.training.recipe import Recipe

DESCRIPTION = """\
Which pruning is worth it? Accuracy against MACs and against measured time, of several pruners on one network.

All methods begin with the same weights and are fine-tuned by the same recipe for as many epochs; a seed draws the
images to calibrate with, those to train with, and their batches, alike for every method. What counts is the network
after the last epoch. Test images are looked at before and after fine-tuning and choose nothing; to choose a recipe,
`--evaluate validation` looks at images that are held back from the training images.

`--recipe` takes all of this from a file, the experiment of a paper: `--recipes` lists those that come along, and what
else is given replaces what is in it. The dense network is trained first, into DIR/dense, unless `--weights` has it;
its images are looked for in the folder `data`. Published figures stand beside the measured ones.

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
  fxprune compare --recipe tmi-gkp-resnet56 --data cifar10:DIR
  fxprune compare --recipe tmi-gkp-resnet20 --data cifar10:DIR --dense-epochs 2 --epochs 1 --train-images 5000 \\
      --output runs/short
  fxprune compare --recipes

exit codes: 0 done, 1 a method failed, 2 an error, 130 stopped
"""
USUAL_FOLDER = "data"
"""Where the images of a recipe are looked for."""
FOLDERS = ("cifar10", "cifar100", "caltech101", "folder")
"""The sources that are in a folder."""


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="prune a model by several methods, fine-tune all alike, compare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add_options(parser)
    parser.set_defaults(run=run, error=parser.error, speaker="fxprune")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be compared on a model."""
    add = parser.add_argument
    add("--recipe", metavar="NAME|FILE.toml", help="the experiment of a paper, or one of your own")
    add("--recipes", action="store_true", help="list the recipes, and do nothing else")
    add("--weights", type=Path, help="state dict of the model (default: that of --dense-epochs, else random)")
    add("--dense-epochs", type=values.count, metavar="N", help="train the dense network first, so many epochs")
    add("--data", metavar="SOURCE", help=DATA_HELP)
    add("--download", action="store_true", help="fetch CIFAR-10, CIFAR-100 or Caltech-101 into DIR first")
    add("--output", type=Path, metavar="DIR", help="where runs, record and pictures go (of a recipe: runs/NAME)")
    add(
        "--methods",
        metavar="M,M,...",
        help=f"some of {values.either(ComparedMethod)} (default: all)",
    )
    add(
        "--shares",
        type=values.list_of(values.fraction("share of MACs", "0.57,0.4")),
        help="of MACs that remain (default: 0.57,0.4)",
    )
    add("--seeds", type=values.seeds, metavar="S,S,...", help="default: 0,1,2")
    add("--plan-seed", type=int, metavar="S", help="plan once, with this seed (default: each seed plans anew)")
    add(
        "--train-images",
        type=values.count,
        metavar="N",
        help="fine-tune with so many, drawn by the seed (default: all)",
    )
    add("--calibration-images", type=values.count, metavar="N", help="default: 1024")
    add("--snapshots", nargs="+", type=Path, default=[], metavar="FILE", help="earlier states of the training, for TMI")
    add("--validation", type=int, metavar="N", help="training images held back (default: 5000, of the digits 200)")
    add("--evaluate", choices=("test", "validation"), help="on what images (default: test)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--threads", type=values.count, help="of torch (default: its own choice)")
    group = parser.add_argument_group("latency")
    group.add_argument("--latency-only", action="store_true", help="time what is done, in place of doing more")
    batches = values.list_of(values.count)
    group.add_argument("--batches", type=batches, default=[1, 32], metavar="N,N,...", help="default: 1,32")
    group.add_argument("--rounds", type=values.count, default=15, help="turns of each network (default: %(default)s)")
    add_training_options(parser, epochs_needed=False)


def run(options: argparse.Namespace) -> int:
    """Do what is not done yet, and write what is known; return the exit code."""
    from fxprune.comparison.experiments import read_recipe, recipe_names
    from fxprune.files import check_folder

    if options.recipes:
        width = max(map(len, recipe_names()))
        print("\n".join(f"{name:<{width}}  {read_recipe(name).title}" for name in recipe_names()))
        return 0
    experiment = None if options.recipe is None else read_recipe(options.recipe)
    if experiment is None and None in (options.model, options.data, options.output, options.epochs):
        options.error("a model, --data, --output and --epochs are needed, or --recipe; `--recipes` lists the recipes")
    output: Path = options.output or Path("runs") / options.recipe.removesuffix(".toml")
    check_folder(output)
    if experiment is not None and options.data is None:
        check_usual_folder(experiment, options.download)
    import torch

    from fxprune.comparison.accuracy import compare, time_done
    from fxprune.training.data.sources import fetch

    def complain(about: str) -> None:
        print(f"{options.speaker}: {about}", file=sys.stderr)

    request, progress = request_of(options, experiment, output, complain), sys.stderr.isatty()
    if options.download:
        fetch(request.data)
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


def request_of(
    options: argparse.Namespace,
    experiment: Experiment | None,
    output: Path,
    complain: Callable[[str], object],
) -> ComparisonRequest:
    """What the options ask for, and where they are silent the recipe; ends with a message where they do not go
    together.

    Raises:
        RecipeError: a value is out of its range.
    """
    from fxprune.comparison.experiments import SETTINGS
    from fxprune.comparison.extras import ComparisonError
    from fxprune.comparison.requests import ComparisonRequest, choose_methods, possible_methods
    from fxprune.training.data.sources import usual_validation

    recipe = training_of(options, None if experiment is None else experiment.fine_tuning)
    asked = {} if experiment is None else experiment.settings | {"data": data_of(experiment)}
    asked |= {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    asked.setdefault("validation", usual_validation(asked["data"]))
    asked["weights"] = None if asked.get("weights") is None else Path(asked["weights"])
    try:
        dense = dense_of(options, experiment, recipe)
        snapshots = bool(options.snapshots) or (dense is not None and dense.snapshots is not None)
        if experiment is not None and options.methods is None:
            asked["methods"] = possible_methods(experiment.methods, snapshots)
            left_out = [name for name in experiment.methods if name not in asked["methods"]]
            if left_out:
                complain(f"left out, for want of --snapshots or of a package: {', '.join(left_out)}")
        else:
            asked["methods"] = choose_methods(options.methods or "all", snapshots)
        return ComparisonRequest(
            **asked,
            output=output,
            recipe=recipe,
            dense=dense,
            experiment=experiment,
            snapshots=options.snapshots,
            device=device_of(options),
            amp=options.amp,
            channels_last=options.channels_last,
        )
    except ComparisonError as error:
        refuse(options, error)


def data_of(experiment: Experiment) -> str:
    """The images of a recipe, in the folder where they are looked for if nobody says it."""
    return f"{experiment.data}:{USUAL_FOLDER}" if experiment.data in FOLDERS else experiment.data


def check_usual_folder(experiment: Experiment, download: bool) -> None:
    """See that it is there, if it is wanted.

    Raises:
        ComparisonError: it is not.
    """
    from fxprune.comparison.extras import ComparisonError

    if experiment.data in FOLDERS and not download and not Path(USUAL_FOLDER).is_dir():
        raise ComparisonError(
            f"the images of {experiment.name} are looked for in the folder {USUAL_FOLDER!r}, which is absent; "
            f"--data {experiment.data}:DIR says where they are"
            + ("" if experiment.data == "folder" else ", and --download fetches them")
        )


def dense_of(options: argparse.Namespace, experiment: Experiment | None, tuning: Recipe) -> DenseTraining | None:
    """How the dense network is trained first; None if it is given.

    Raises:
        ComparisonError: it is both given and to be trained.
    """
    from fxprune.comparison.experiments import DENSE_RATE, DenseTraining
    from fxprune.comparison.extras import ComparisonError

    epochs: int | None = options.dense_epochs
    if options.weights is not None:
        if epochs is not None:
            raise ComparisonError("--weights has the dense network already; leave --dense-epochs out")
        return None
    usual = None if experiment is None else experiment.dense
    if usual is not None:
        return usual if epochs is None else usual.lasting(epochs)
    if epochs is None:
        return None
    return DenseTraining(recipe=replace(tuning, epochs=epochs, lr=DENSE_RATE, warmup=0, distill_weight=0.0))
