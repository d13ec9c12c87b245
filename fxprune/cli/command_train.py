"""`fxprune train`: train a network, dense or pruned, and record how accurate it becomes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fxprune.cli import values
from fxprune.cli.options import DATA_HELP, MODEL_HELP, add_training_options, device_of, refuse, training_of
from fxprune.cli.output import Subparsers
from fxprune.vocabulary import FormChoice, Granularity, PruningSchedule, Scope

if TYPE_CHECKING:
    from fxprune.training.run import TrainingRequest

DESCRIPTION = """\
Train a network, dense or pruned, and record how accurate it becomes.

The masked dense model is trained, its pruned weights held at exactly zero, and rewritten in the end; `--train compiled`
trains the rewritten graph. Validation images are held back from the training images, and they alone decide what is the
best epoch; the test images are looked at in the end.

After each epoch DIR has `checkpoint.pt`, from which `--resume` goes on as if nothing had happened, and `log.json`. In
the end it has `model.pt`, weights for `--weights` (of the best epoch: `best.pt`), and of a pruned network `plan.json`,
and `compiled.pt` for `fxprune.load`.
"""
EXAMPLES = """\
examples:
  fxprune train digits_resnet --data digits --epochs 8 --lr 0.1 --output runs/digits
  fxprune train resnet20 --weights resnet20.th --data cifar10:DIR --ratio 0.5 --calibration-images 512 --epochs 5 \\
      --output runs/refitted
  fxprune train resnet18 --weights resnet18.pth --data folder:DIR --macs 0.5 --epochs 10 --amp bf16 --output runs/photos
  torchrun --nproc-per-node 2 -m fxprune train ...

exit codes: 0 done, 2 an error, 130 (or 143) stopped by SIGINT (or SIGTERM), its state saved
"""


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train a model, dense or pruned",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_options(parser)
    parser.set_defaults(run=run, error=parser.error, speaker="fxprune")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be asked of the training of a model."""
    add = parser.add_argument
    add("--weights", type=Path, help="state dict of the model (default: random)")
    add("--data", required=True, metavar="SOURCE", help=DATA_HELP)
    add("--download", action="store_true", help="fetch CIFAR-10, CIFAR-100 or Caltech-101 into DIR first")
    add("--output", type=Path, required=True, metavar="DIR", help="where log, checkpoint and networks go")
    add("--resume", action="store_true", help="go on from DIR/checkpoint.pt if it is there")
    add("--checkpoint-every", type=values.count, metavar="STEPS", help="save within epochs too")
    add("--validation", type=int, metavar="N", help="training images to hold back (default: 5000, of the digits 200)")
    add(
        "--keep-epochs",
        type=values.span,
        default=range(0),
        metavar="FIRST-LAST",
        help="write the weights after these epochs as DIR/epoch_N.pt, for --snapshots",
    )
    add("--test-each-epoch", action="store_true", help="record the test accuracy of every epoch; it chooses nothing")
    add("--seed", type=int, default=0, help="of weights, plan, order and augmentation (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--threads", type=values.count, help="of torch (default: its own choice)")
    _add_pruning(parser.add_argument_group("pruning (default: none)"))
    add_training_options(parser)


def _add_pruning(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--plan", type=Path, metavar="FILE", help="a plan as JSON, instead of the others")
    size = group.add_mutually_exclusive_group()
    size.add_argument("--ratio", type=float, help="share to prune")
    size.add_argument("--macs", type=float, metavar="SHARE", help="share of MACs to keep")
    add("--granularity", choices=get_args(Granularity), help="what is removed (default: that of fxprune)")
    add("--scope", choices=get_args(Scope), help="whether each layer loses the same share of its filters")
    add("--round-to", type=values.count, metavar="N", help="keep a multiple of N filters")
    add("--groups", type=values.groups)
    add("--form", choices=get_args(FormChoice))
    add("--method", help="how kernels are chosen")
    add("--criterion", help="what makes a kernel or a filter important")
    add("--variety", help="make the criterion keep rare ones")
    add("--snapshots", nargs="+", type=Path, metavar="FILE", help="earlier states of the training run")
    add("--calibration-images", type=values.count, metavar="N", help="training images to refit the kept weights with")
    add(
        "--sparsify",
        choices=get_args(PruningSchedule),
        help="prune while training, by this (default: before it)",
    )
    add("--train", choices=("masked", "compiled"), default="masked", help="in which form (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Train; return the exit code."""
    from fxprune.files import check_folder

    check_folder(options.output)
    import torch

    from fxprune.training.data.sources import fetch
    from fxprune.training.loop import Interrupted
    from fxprune.training.run import train

    request = request_of(options)
    if options.download:
        fetch(options.data)
    if options.threads:
        torch.set_num_threads(options.threads)
    with stop_signals() as received:
        try:
            train(request, stopping=lambda: bool(received))
        except Interrupted as stopped:
            print(f"{options.speaker}: {stopped}", file=sys.stderr)
            return 128 + received[0] if received else 130
    return 0


def request_of(options: argparse.Namespace) -> TrainingRequest:
    """What the options ask for; ends with a message where they do not go together.

    Raises:
        RecipeError: a value is out of its range.
    """
    from fxprune.training.data.sources import usual_validation
    from fxprune.training.loop import TrainingError
    from fxprune.training.run import PLAN_OPTIONS, Pruning, TrainingRequest

    given: dict[str, Any] = {name: value for name in PLAN_OPTIONS if (value := getattr(options, name)) is not None}
    try:
        pruning = Pruning(
            plan=options.plan,
            options=given,
            calibration_images=options.calibration_images,
            sparsify=options.sparsify,
            train=options.train,
        )
    except TrainingError as error:
        refuse(options, error)
    return TrainingRequest(
        model=options.model,
        data=options.data,
        output=options.output,
        recipe=training_of(options),
        weights=options.weights,
        pruning=pruning,
        validation=usual_validation(options.data) if options.validation is None else options.validation,
        seed=options.seed,
        device=device_of(options),
        amp=options.amp,
        channels_last=options.channels_last,
        test_each_epoch=options.test_each_epoch,
        checkpoint_every=options.checkpoint_every,
        resume=options.resume,
        keep_epochs=options.keep_epochs,
        progress=sys.stderr.isatty(),
    )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of ending. A second one ends the process as usual."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
