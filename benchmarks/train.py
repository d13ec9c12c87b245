r"""Train a network, dense or pruned, and record how accurate it becomes.

    python -m benchmarks.train --model resnet20 --weights resnet20.th --data cifar10:DIR --ratio 0.5 \
        --calibration-images 512 --epochs 5 --output runs/resnet20
    python -m benchmarks.train --model cifar_vgg16 --data cifar10:DIR --lr 0.1 --schedule cosine --epochs 30 \
        --output runs/vgg16
    torchrun --nproc-per-node 2 -m benchmarks.train ...

The masked dense model is trained, its pruned weights held at exactly zero, and rewritten in the end; `--train compiled`
trains the rewritten graph. Validation images are held back from the training images, and they alone decide what is the
best epoch; the test images are looked at in the end.

After each epoch the folder has `checkpoint.pt`, from which `--resume` goes on as if nothing had happened, and
`log.json`. In the end it has `model.pt`, weights for `--weights` (of the best epoch: `best.pt`), and of a pruned
network `plan.json`, and `compiled.pt` for `fxprune.load`.

With several processes, each batch is split between them, and the network that comes out is that of one process but for
rounding, and but for BatchNorm and Dropout: each process normalizes with the statistics of its own share of a batch
(`torch.nn.SyncBatchNorm`, which needs CUDA, is not used), and draws on its own. A run can be resumed by another number
of processes; all of them must see the same folder.

Exit codes: 0 done, 2 an error, 130 (or 143) stopped by SIGINT (or SIGTERM), its state saved.
"""

import argparse
import copy
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from benchmarks._checkpoint import (
    CheckpointError,
    check_settings,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    write_file,
    write_text,
)
from benchmarks._data import Data, open_data
from benchmarks._distributed import Group, joined
from benchmarks._environment import environment
from benchmarks._recipe import SCHEDULES, Recipe
from benchmarks._training import AMP, EVALUATION_BATCH, Interrupted, Trainer, TrainingError
from benchmarks.accuracy import CIFAR_MODELS, build, prune
from fxprune.calibration import FITS
from fxprune.training.schedules import SCHEDULES as SPARSITY_SCHEDULES

PLAN_OPTIONS = (
    "ratio", "macs", "granularity", "scope", "round_to",
    "groups", "form", "method", "criterion", "variety", "snapshots",
)  # fmt: skip
"""Options that go to `fxprune.make_plan`, which has its own defaults for those that are not given."""


@dataclass(frozen=True)
class Networks:
    """What is trained, and what it comes from.

    Attributes:
        dense: the network before pruning.
        trained: what is trained: the dense network, a masked or a rewritten one.
        example: two training images, normalized, `(2, C, H, W)`.
        plan: what was pruned before the training, if anything was.
        sparsifier: holds the pruned weights of a masked network at zero, or prunes while it trains.
    """

    dense: nn.Module
    trained: nn.Module
    example: Tensor
    plan: fxprune.PrunePlan | None = None
    sparsifier: fxprune.Sparsifier | None = None

    @property
    def masked(self) -> bool:
        """Whether what is trained has pruned weights and all the same the dense shapes."""
        return self.sparsifier is not None


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    with stop_signals() as received:
        try:
            with joined(options.device) as group:
                _train(options, group, received)
        except Interrupted as stopped:
            print(f"benchmarks.train: {stopped}", file=sys.stderr)
            return 128 + received[0] if received else 130
        except (fxprune.FxpruneError, OSError, ValueError) as error:
            print(f"benchmarks.train: error: {error}", file=sys.stderr)
            return 2
    return 0


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


def _train(options: argparse.Namespace, group: Group, received: list[int]) -> None:
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    folder: Path = options.output
    checkpoint = folder / "checkpoint.pt"
    settings = settings_of(options, recipe)
    saved = _open_output(folder, options.resume, settings)
    data = open_data(
        options.data, validation=options.validation, seed=options.seed, normalize=CIFAR_MODELS.get(options.model)
    )
    networks = prepare(options, data, group, saved)
    trainer = Trainer(
        networks.trained,
        data,
        recipe,
        seed=options.seed,
        sparsifier=networks.sparsifier,
        teacher=networks.dense if recipe.distill_weight else None,
        amp=options.amp,
        channels_last=options.channels_last,
        test_each_epoch=options.test_each_epoch,
        group=group,
    )
    if saved is not None:
        trainer.load_state_dict(saved["trainer"])
    plan = None if networks.plan is None else networks.plan.to_json()
    log: dict[str, Any] = {
        "environment": environment() | {"processes": group.size, "device": group.device.type},
        "settings": settings,
        "images": {"training": data.train_count, "validation": data.validation_count, "test": data.test_count},
    }

    def save() -> None:
        save_checkpoint(checkpoint, {"settings": settings, "plan": plan, "trainer": trainer.state_dict()})
        write_log(folder, log, trainer)

    trainer.run(save, every=options.checkpoint_every, stopping=lambda: bool(received))
    if group.first:
        log["result"] = finish(folder, networks, trainer)
        write_log(folder, log, trainer)


def prepare(options: argparse.Namespace, data: Data, group: Group, saved: dict[str, Any] | None) -> Networks:
    """Build the network and prune it, or repeat a pruning.

    The first process plans, and refits the weights if it is to; the others, and a run that is resumed, apply its plan:
    their weights come from elsewhere.

    Raises:
        FxpruneError: the network is not known or cannot be pruned as asked for.
        TrainingError: it does not fit the images.
    """
    dense, _ = build(options.model, options.weights, options.seed)
    example = data.plain_batch(data.order(0)[:2])[0]
    _check_fit(dense, example, data, options.model)
    plan, masked = None, None
    if saved is not None:
        plan = _parsed(saved["plan"])
    elif _is_pruned(options) and not options.sparsify:
        if group.first:
            plan, masked = _prune(options, dense, data, example)
        plan = _parsed(group.from_first(None if plan is None else plan.to_json()))
    dense, example = dense.to(group.device), example.to(group.device)
    if options.sparsify:
        trained = copy.deepcopy(dense)
        steps = options.epochs * math.ceil(data.train_count / options.batch)
        given = _plan_options(options) | {"example_inputs": example, "seed": options.seed}
        return Networks(
            dense, trained, example, sparsifier=fxprune.sparsify(trained, options.sparsify, steps=steps, **given)
        )
    if plan is None:
        return Networks(dense, dense, example)
    masked = (masked or fxprune.mask(dense, plan)).to(group.device).eval()
    if options.train == "masked":
        return Networks(dense, masked, example, plan, fxprune.hold(masked, plan))
    compiled = fxprune.rewrite(masked, plan, example)
    fxprune.verify(compiled, masked, example)
    return Networks(dense, compiled, example, plan)


def _prune(
    options: argparse.Namespace, dense: nn.Module, data: Data, example: Tensor
) -> tuple[fxprune.PrunePlan, nn.Module]:
    """The plan, made or read, and the masked network, refitted if it is to be."""
    count = options.calibration_images
    calibration = data.plain_batch(data.order(0)[:count])[0] if count else None
    progress = sys.stderr.isatty()
    if options.plan:
        plan = fxprune.PrunePlan.from_json(options.plan.read_text(encoding="utf-8"))
        masked = fxprune.mask(dense, plan, calibration, progress=progress)
    else:
        pruning = prune(dense, example, calibration, progress, seed=options.seed, **_plan_options(options))
        plan, masked = pruning.plan, pruning.masked
    vars(masked).pop(FITS, None)  # how well the refit did is no longer true of the trained network
    return plan, masked


def _plan_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in PLAN_OPTIONS if getattr(options, name) is not None}


def _is_pruned(options: argparse.Namespace) -> bool:
    return bool(options.plan or _plan_options(options))


def _parsed(text: str | None) -> fxprune.PrunePlan | None:
    return None if text is None else fxprune.PrunePlan.from_json(text)


def finish(folder: Path, networks: Networks, trainer: Trainer) -> dict[str, Any]:
    """Write the networks, and look at the test images: the result, ready for JSON.

    Raises:
        VerificationError: the rewritten network does not compute what the masked one does.
        CheckpointError: a file cannot be written.
    """
    data, model = trainer.data, trainer.model
    final = trainer.epochs[-1]
    last = {
        "epoch": final.epoch,
        "validation_accuracy": final.validation_accuracy,
        "test_accuracy": trainer.accuracy(data.test_batches(EVALUATION_BATCH)),
    }
    result: dict[str, Any] = {"last_epoch": last, "best_validation_epoch": None}
    plan = networks.plan if networks.sparsifier is None else networks.sparsifier.plan
    dense_shapes = plan is None or networks.masked
    if dense_shapes:
        write_file(folder / "model.pt", lambda path: torch.save(_plain(model.state_dict()), path))
    if plan is not None:
        write_text(folder / "plan.json", plan.to_json())
        result |= _rewritten(folder, networks, plan, trainer)
    if trainer.best is not None:
        best, state = trainer.best, _plain(model.state_dict())
        if dense_shapes:
            write_file(folder / "best.pt", lambda path: torch.save(_plain(best.state), path))
        model.load_state_dict(best.state)
        result["best_validation_epoch"] = {
            "epoch": best.epoch,
            "validation_accuracy": best.accuracy,
            "test_accuracy": trainer.accuracy(data.test_batches(EVALUATION_BATCH)),
        }
        model.load_state_dict(state)
    for name, accuracies in (("last epoch", last), ("best validation epoch", result["best_validation_epoch"])):
        if accuracies is not None:
            print(f"test accuracy of the {name} ({accuracies['epoch']}): {accuracies['test_accuracy']:.2%}")
    return result


def _rewritten(folder: Path, networks: Networks, plan: fxprune.PrunePlan, trainer: Trainer) -> dict[str, Any]:
    """Rewrite what was trained as a masked model, and write the graph."""
    compiled, found = trainer.model, {}
    if networks.masked:
        compiled = fxprune.rewrite(trainer.model.eval(), plan, networks.example).eval()
        check = fxprune.verify(compiled, trainer.model, networks.example)
        accuracy = trainer.accuracy(trainer.data.test_batches(EVALUATION_BATCH), compiled)
        found = {"rewritten": {"test_accuracy": accuracy, "max_abs": check.max_abs, "max_rel": check.max_rel}}
        print(f"rewritten, {check}; test accuracy {accuracy:.2%}")
    fxprune.save(compiled, folder / "compiled.pt")
    return found | {"report": fxprune.report(compiled).to_dict()}


def write_log(folder: Path, log: dict[str, Any], trainer: Trainer) -> None:
    """Write `log.json`: all of `log`, and what is known after each epoch."""
    text = json.dumps(log | {"epochs": [asdict(epoch) for epoch in trainer.epochs]}, indent=2) + "\n"
    write_text(folder / "log.json", text)


def settings_of(options: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """What decides the weights that come out; a run can only be resumed with the same. Folders appear by their kind,
    files by name and content.
    """
    chosen = {name: getattr(options, name) for name in PLAN_OPTIONS}
    chosen["snapshots"] = [fingerprint(path) for path in options.snapshots] if options.snapshots else None
    return {
        "model": options.model,
        "weights": fingerprint(options.weights) if options.weights else None,
        "data": options.data.partition(":")[0],
        "validation": options.validation,
        "plan": fingerprint(options.plan) if options.plan else None,
        **chosen,
        "sparsify": options.sparsify,
        "calibration_images": options.calibration_images,
        "train": options.train,
        **asdict(recipe),
        "amp": options.amp,
        "channels_last": options.channels_last,
        "test_each_epoch": options.test_each_epoch,
        "seed": options.seed,
    }


def _open_output(folder: Path, resume: bool, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder; return the checkpoint to go on from."""
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        if not resume:
            raise CheckpointError(f"{folder}: has the checkpoint of a run; go on with --resume, or choose another one")
        saved = load_checkpoint(checkpoint)
        check_settings(checkpoint, saved["settings"], settings)
        return saved
    folder.mkdir(parents=True, exist_ok=True)
    return None


def _check_fit(model: nn.Module, example: Tensor, data: Data, name: str) -> None:
    shape = tuple(example.shape[1:])
    try:
        with torch.inference_mode():
            logits = model.eval()(example)
    except (RuntimeError, ValueError, TypeError) as error:
        raise TrainingError(f"{name}: cannot run on images of shape {shape}: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < data.classes:
        found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise TrainingError(f"{name}: returns {found} for 2 images; it must be logits (2, {data.classes}) or wider")


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU, laid out as any other model's."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train", description=__doc__.partition("\n\n")[0].lstrip("r")
    )
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(CIFAR_MODELS)}, or a name for `fxprune compile`")
    add("--weights", type=Path, help="state dict of the model (default: random)")
    add("--data", required=True, metavar="SOURCE", help="cifar10:DIR, digits, folder:DIR or folder:DIR?size=PIXELS")
    add("--output", type=Path, required=True, metavar="DIR", help="where log, checkpoint and networks go")
    add("--resume", action="store_true", help="go on from DIR/checkpoint.pt if it is there")
    add("--checkpoint-every", type=_count, metavar="STEPS", help="save within epochs too")
    add("--validation", type=int, default=5000, metavar="N", help="training images to hold back (default: %(default)s)")
    add("--test-each-epoch", action="store_true", help="record the test accuracy of every epoch; it chooses nothing")
    add("--seed", type=int, default=0, help="of weights, plan, order and augmentation (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=_count, help="of torch (default: its own choice)")
    _add_pruning(parser.add_argument_group("pruning (default: none)"))
    _add_recipe(parser.add_argument_group("recipe (default: the fine-tuning of TMI-GKP)"))
    options = parser.parse_args(arguments)
    options.distill_weight, options.distill_temperature = options.distill
    refitted = bool(options.calibration_images)
    if options.plan and (_plan_options(options) or options.sparsify):
        parser.error("--plan is a plan already; leave the other options of pruning out")
    if not _is_pruned(options) and (refitted or options.sparsify or options.train == "compiled"):
        parser.error(
            "--calibration-images, --sparsify and --train compiled are for a pruned network; "
            "add --ratio, --macs or --plan"
        )
    if options.sparsify and (refitted or options.train == "compiled"):
        parser.error("--sparsify prunes while the dense form trains; leave --calibration-images and --train out")
    return options


def _add_pruning(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--plan", type=Path, metavar="FILE", help="a plan as JSON, instead of the others")
    size = group.add_mutually_exclusive_group()
    size.add_argument("--ratio", type=float, help="share to prune")
    size.add_argument("--macs", type=float, metavar="SHARE", help="share of MACs to keep")
    add("--granularity", choices=("kernel", "filter"), help="what is removed (default: that of fxprune)")
    add("--scope", choices=("local", "global"), help="whether each layer loses the same share of its filters")
    add("--round-to", type=_count, metavar="N", help="keep a multiple of N filters")
    add("--groups", type=lambda text: text if text == "auto" else int(text))
    add("--form", choices=("auto", "partition", "overlap"))
    add("--method", help="how kernels are chosen")
    add("--criterion", help="what makes a kernel or a filter important")
    add("--variety", help="make the criterion keep rare ones")
    add("--snapshots", nargs="+", type=Path, metavar="FILE", help="earlier states of the training run")
    add("--calibration-images", type=_count, metavar="N", help="training images to refit the kept weights with")
    add("--sparsify", choices=SPARSITY_SCHEDULES, help="prune while training, by this schedule (default: before it)")
    add("--train", choices=("masked", "compiled"), default="masked", help="in which form (default: %(default)s)")


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=int, required=True)
    add("--lr", type=float, default=Recipe.lr, help="largest learning rate (default: %(default)s)")
    add("--batch", type=int, default=Recipe.batch, help="images of one step, over all processes (default: %(default)s)")
    add("--momentum", type=float, default=Recipe.momentum, help="default: %(default)s")
    add("--weight-decay", type=float, default=Recipe.weight_decay, help="default: %(default)s")
    add("--nesterov", action="store_true")
    add("--schedule", choices=SCHEDULES, default=Recipe.schedule, help="default: %(default)s")
    add("--warmup", type=int, default=Recipe.warmup, metavar="EPOCHS", help="default: %(default)s")
    add("--label-smoothing", type=float, default=Recipe.label_smoothing, help="default: %(default)s")
    none = (Recipe.distill_weight, Recipe.distill_temperature)
    add(
        "--distill", type=_distillation, default=none, metavar="WEIGHT:TEMPERATURE",
        help="learn from the dense network too, such as 0.5:4",
    )  # fmt: skip
    add("--amp", choices=AMP, help="compute forward in this type (default: float32)")
    add("--channels-last", action="store_true", help="lay images and weights out with the channels innermost")


def _distillation(text: str) -> tuple[float, float]:
    weight, _, temperature = text.partition(":")
    try:
        return float(weight), float(temperature)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be WEIGHT:TEMPERATURE, such as 0.5:4") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; give a positive integer")
    return int(text)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
