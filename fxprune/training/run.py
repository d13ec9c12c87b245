"""A training run, as `fxprune train` does it: from a model and images to trained networks and a log.

The masked dense model is trained, its pruned weights held at exactly zero, and rewritten in the end; or the rewritten
graph is. Validation images are held back from the training images, and they alone decide what is the best epoch; the
test images are looked at in the end.

After each epoch the folder has `checkpoint.pt`, from which a resumed run goes on as if nothing had happened, and
`log.json`. In the end it has `model.pt`, a state dict (of the best epoch: `best.pt`), and of a pruned network
`plan.json`, and `compiled.pt` for `fxprune.load`; and `epoch_N.pt` of the epochs that are to be kept.
"""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxprune.api import make_plan, report
from fxprune.calibration import FITS
from fxprune.calibration.agreement import AGREEMENT
from fxprune.environment import environment
from fxprune.exact.rewriting import rewrite
from fxprune.exact.storage import save
from fxprune.exact.verification import verify
from fxprune.models import load_model
from fxprune.planning.lossy import mask
from fxprune.plans import PrunePlan
from fxprune.training.checkpoints import (
    CheckpointError,
    check_settings,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    write_file,
    write_text,
)
from fxprune.training.data.pictures import NORMALIZATIONS
from fxprune.training.data.sources import Data, open_data
from fxprune.training.loop import EVALUATION_BATCH, Placement, Trainer, TrainingError, check_device
from fxprune.training.processes import Group, joined
from fxprune.training.recipe import Recipe
from fxprune.training.sparsification import Sparsifier, hold, sparsify
from fxprune.vocabulary import PruningSchedule

PLAN_OPTIONS = (
    "ratio", "macs", "granularity", "scope", "round_to",
    "groups", "form", "method", "criterion", "variety", "snapshots",
)  # fmt: skip
"""Options that go to `make_plan`, which has its own defaults for those that are not given."""


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What of a network is pruned, and when; nothing by default.

    Attributes:
        plan: a file with a plan, instead of the others.
        options: of `make_plan`, some of `PLAN_OPTIONS`; snapshots are paths.
        calibration_images: training images to refit the kept weights with.
        sparsify: prune while training, by this schedule, see `fxprune.sparsify`.
        train: in which form, the masked dense one or the rewritten graph.

    Raises:
        TrainingError: some of them do not go together.
    """

    plan: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration_images: int | None = None
    sparsify: PruningSchedule | None = None
    train: Literal["masked", "compiled"] = "masked"

    def __post_init__(self) -> None:
        """Check what goes together."""
        refitted, compiled = bool(self.calibration_images), self.train == "compiled"
        if self.plan and (self.options or self.sparsify):
            raise TrainingError("--plan is a plan already; leave the other options of pruning out")
        if not self.is_wanted and (refitted or self.sparsify or compiled):
            raise TrainingError(
                "--calibration-images, --sparsify and --train compiled are for a pruned network; "
                "add --ratio, --macs or --plan"
            )
        if self.sparsify and (refitted or compiled):
            raise TrainingError(
                "--sparsify prunes while the dense form trains; leave --calibration-images and --train out"
            )

    @property
    def is_wanted(self) -> bool:
        """Whether anything is pruned."""
        return bool(self.plan or self.options)

    def settings(self) -> dict[str, Any]:
        """What decides the weights, files by name and content."""
        chosen = {name: self.options.get(name) for name in PLAN_OPTIONS}
        if chosen["snapshots"]:
            chosen["snapshots"] = [fingerprint(path) for path in chosen["snapshots"]]
        return {
            "plan": fingerprint(self.plan) if self.plan else None,
            **chosen,
            "sparsify": self.sparsify,
            "calibration_images": self.calibration_images,
            "train": self.train,
        }


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What a run is asked for.

    Attributes:
        model: a name for `load_model`.
        data: images for `open_data`.
        output: the folder for log, checkpoint and networks; made if absent.
        recipe: how to train.
        weights: state dict of the model; random without.
        pruning: what to prune.
        validation: training images to hold back, by which the best epoch is chosen.
        seed: of weights, plan, order and augmentation, from 0.
        device: `"cpu"` or `"cuda"`.
        amp, channels_last: see `Placement`.
        test_each_epoch: record the test accuracy of every epoch; it chooses nothing.
        checkpoint_every: save after so many steps of an epoch too.
        resume: go on from the checkpoint of the folder, if it is there.
        keep_epochs: after these the weights are written to `epoch_N.pt` too, as ticket scores want them; see
            `snapshot_file`.
        progress: show bars on stderr.
    """

    model: str
    data: str
    output: Path
    recipe: Recipe
    weights: Path | None = None
    pruning: Pruning = field(default_factory=Pruning)
    validation: int = 5000
    seed: int = 0
    device: str = "cpu"
    amp: str | None = None
    channels_last: bool = False
    test_each_epoch: bool = False
    checkpoint_every: int | None = None
    resume: bool = False
    keep_epochs: Sequence[int] = ()
    progress: bool = False

    def settings(self) -> dict[str, Any]:
        """What decides the weights that come out; a run can only be resumed with the same. Folders appear by their
        kind, files by name and content.
        """
        return {
            "model": self.model,
            "weights": fingerprint(self.weights) if self.weights else None,
            "data": self.data.partition(":")[0],
            "validation": self.validation,
            **self.pruning.settings(),
            **asdict(self.recipe),
            "amp": self.amp,
            "channels_last": self.channels_last,
            "test_each_epoch": self.test_each_epoch,
            "seed": self.seed,
        }


def snapshot_file(folder: Path, epoch: int) -> Path:
    """Where a run puts its weights after an epoch that it keeps."""
    return folder / f"epoch_{epoch}.pt"


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
    plan: PrunePlan | None = None
    sparsifier: Sparsifier | None = None

    @property
    def masked(self) -> bool:
        """Whether what is trained has pruned weights and all the same the dense shapes."""
        return self.sparsifier is not None


def train(request: TrainingRequest, stopping: Callable[[], bool] = lambda: False) -> None:
    """Train from the beginning, or from a checkpoint, to the end.

    Args:
        request: what is asked for.
        stopping: asked after each step; once it says True the run saves its state and ends.

    Raises:
        Interrupted: it was asked to stop.
        FxpruneError: the network, the images and the settings do not go together, the loss is not finite, an image is
            damaged, a file cannot be written, or another process has ended.
        OSError: a file cannot be read.
    """
    check_device(request.device)
    with joined(request.device) as group:
        _train(request, group, stopping)


def _train(request: TrainingRequest, group: Group, stopping: Callable[[], bool]) -> None:
    folder, settings = request.output, request.settings()
    saved = _open_output(folder, request.resume, settings)
    data = open_data(
        request.data, validation=request.validation, seed=request.seed, normalize=NORMALIZATIONS.get(request.model)
    )
    networks = prepare(request, data, group, saved)
    trainer = Trainer(
        networks.trained,
        data,
        request.recipe,
        seed=request.seed,
        sparsifier=networks.sparsifier,
        teacher=networks.dense if request.recipe.distill_weight else None,
        placement=Placement(group, request.amp, request.channels_last),
        test_each_epoch=request.test_each_epoch,
    )
    if saved is not None:
        trainer.load_state_dict(saved["trainer"])
    plan = None if networks.plan is None else networks.plan.to_json()
    log: dict[str, Any] = {
        "environment": environment() | {"processes": group.size, "device": group.device.type},
        "settings": settings,
        "images": {"training": data.train_count, "validation": data.validation_count, "test": data.test_count},
    }

    def keep() -> None:
        epoch = trainer.progress.epoch
        if epoch in request.keep_epochs and not trainer.progress.step:
            state = _plain(trainer.model.state_dict())
            write_file(snapshot_file(folder, epoch), lambda path: torch.save(state, path))
        content = {"settings": settings, "plan": plan, "trainer": trainer.state_dict()}
        save_checkpoint(folder / "checkpoint.pt", content)
        _write_log(folder, log, trainer)

    trainer.run(keep, every=request.checkpoint_every, stopping=stopping, progress=request.progress)
    if group.first:
        log["result"] = finish(folder, networks, trainer)
        _write_log(folder, log, trainer)


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


def prepare(request: TrainingRequest, data: Data, group: Group, saved: dict[str, Any] | None) -> Networks:
    """Build the network and prune it, or repeat a pruning.

    The first process plans, and refits the weights if it is to; the others, and a run that is resumed, apply its plan:
    their weights come from elsewhere.

    Raises:
        FxpruneError: the network is not known or cannot be pruned as asked for.
        TrainingError: it does not fit the images.
    """
    pruning = request.pruning
    dense = load_model(request.model, request.weights, request.seed)
    example = data.plain_batch(data.order(0)[:2])[0]
    check_fit(dense, example, data.classes, request.model)
    plan, masked = None, None
    if saved is not None:
        plan = _parsed(saved["plan"])
    elif pruning.is_wanted and not pruning.sparsify:
        if group.first:
            plan, masked = _prune(request, dense, data, example)
        plan = _parsed(group.from_first(None if plan is None else plan.to_json()))
    dense, example = dense.to(group.device), example.to(group.device)
    if pruning.sparsify:
        trained = copy.deepcopy(dense)
        steps = request.recipe.epochs * math.ceil(data.train_count / request.recipe.batch)
        given = {**pruning.options, "example_inputs": example, "seed": request.seed}
        return Networks(dense, trained, example, sparsifier=sparsify(trained, pruning.sparsify, steps=steps, **given))
    if plan is None:
        return Networks(dense, dense, example)
    masked = (masked or mask(dense, plan)).to(group.device).eval()
    if pruning.train == "masked":
        return Networks(dense, masked, example, plan, hold(masked, plan))
    compiled = rewrite(masked, plan, example)
    verify(compiled, masked, example)
    return Networks(dense, compiled, example, plan)


def check_fit(model: nn.Module, example: Tensor, classes: int, name: str) -> None:
    """See that a network takes images like the two of `example`, `(2, C, H, W)`, and tells so many classes apart.

    Raises:
        TrainingError: it does not; the message calls it `name`.
    """
    shape = tuple(example.shape[1:])
    try:
        with torch.inference_mode():
            logits = model.eval()(example)
    except (RuntimeError, ValueError, TypeError) as error:
        raise TrainingError(f"{name}: cannot run on images of shape {shape}: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < classes:
        found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise TrainingError(f"{name}: returns {found} for 2 images; it must be logits (2, {classes}) or wider")


def _prune(request: TrainingRequest, dense: nn.Module, data: Data, example: Tensor) -> tuple[PrunePlan, nn.Module]:
    """The plan, made or read, and the masked network, refitted if it is to be."""
    pruning, count = request.pruning, request.pruning.calibration_images
    calibration = data.plain_batch(data.order(0)[:count])[0] if count else None
    if pruning.plan:
        plan = PrunePlan.from_json(pruning.plan.read_text(encoding="utf-8", errors="replace"))
    else:
        plan = make_plan(
            dense,
            example_inputs=example,
            calibration=calibration,
            progress=request.progress,
            seed=request.seed,
            **pruning.options,
        )
    masked = mask(dense, plan, calibration, progress=request.progress).eval()
    for told in (FITS, AGREEMENT):  # how well the refit did is no longer true of the trained network
        vars(masked).pop(told, None)
    return plan, masked


def _parsed(text: str | None) -> PrunePlan | None:
    return None if text is None else PrunePlan.from_json(text)


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


def _rewritten(folder: Path, networks: Networks, plan: PrunePlan, trainer: Trainer) -> dict[str, Any]:
    """Rewrite what was trained as a masked model, and write the graph."""
    compiled, found = trainer.model, {}
    if networks.masked:
        compiled = rewrite(trainer.model.eval(), plan, networks.example).eval()
        check = verify(compiled, trainer.model, networks.example)
        accuracy = trainer.accuracy(trainer.data.test_batches(EVALUATION_BATCH), compiled)
        found = {"rewritten": {"test_accuracy": accuracy, "max_abs": check.max_abs, "max_rel": check.max_rel}}
        print(f"rewritten, {check}; test accuracy {accuracy:.2%}")
    save(compiled, folder / "compiled.pt")
    return found | {"report": report(compiled).to_dict()}


def _write_log(folder: Path, log: dict[str, Any], trainer: Trainer) -> None:
    """Write `log.json`: all of `log`, and what is known after each epoch."""
    text = json.dumps(log | {"epochs": [asdict(epoch) for epoch in trainer.epochs]}, indent=2) + "\n"
    write_text(folder / "log.json", text)


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU, laid out as any other model's."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
