"""The training loop: a run that can be stopped after any step and goes on as if it had not been.

What is drawn at random is a function of the seed, the step and the process, and the learning rate one of the step, so
weights, momentum and counters are the whole state of a run.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxprune.errors import FxpruneError
from fxprune.training.data.sources import Data
from fxprune.training.processes import Group
from fxprune.training.recipe import Recipe
from fxprune.training.sparsification import Sparsifier

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types that forward may compute in; weights, losses and evaluation are float32."""

Placed = TypeVar("Placed", Tensor, nn.Module)

EVALUATION_BATCH = 250
"""Images at a time where nothing is learned; it changes no result."""


class TrainingError(FxpruneError):
    """The training cannot go on."""


def check_device(device: str) -> None:
    """See that this machine has such a device, before anything is begun.

    Raises:
        TrainingError: it has none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch sees no CUDA device on this machine; use --device cpu")


class Interrupted(FxpruneError):
    """The training was asked to stop, and has saved its state."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: epochs that are done.
        step: steps of the next one that are done.
        loss: summed over the images of these steps.
        images: how many these were.
        seconds: spent in these steps.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    images: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch; number 0 is the network before training.

    Attributes:
        epoch: its number.
        lr: learning rate of its last step.
        train_loss: mean over its images, as they were met.
        validation_accuracy, test_accuracy: top-1 in [0, 1]; None where nobody looked.
        seconds: of its steps.
    """

    epoch: int
    lr: float | None = None
    train_loss: float | None = None
    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        words = [f"epoch {self.epoch}"]
        if self.lr is not None and self.train_loss is not None:
            words.append(f"lr {self.lr:.2g}, loss {self.train_loss:.4f}, {self.seconds:.0f} s")
        for part, accuracy in (("validation", self.validation_accuracy), ("test", self.test_accuracy)):
            if accuracy is not None:
                words.append(f"{part} {accuracy:.2%}")
        return ", ".join(words)


@dataclass(frozen=True)
class Best:
    """The epoch with the best validation accuracy, the first of equal ones, among those where all was pruned.

    Attributes:
        epoch: its number, from 1.
        accuracy: on the validation images.
        state: state dict after it, on the CPU.
    """

    epoch: int
    accuracy: float
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Placement:
    """Where and in what form a network computes.

    Attributes:
        group: the processes that share each batch, and their device. Process 0 evaluates.
        amp: a name in `AMP` to compute in, or None for float32.
        channels_last: lay weights and images out with the channels innermost.
    """

    group: Group = field(default_factory=Group)
    amp: str | None = None
    channels_last: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that forward computes in; None for float32."""
        return None if self.amp is None else AMP[self.amp]

    def __call__(self, what: Placed) -> Placed:
        """A tensor or a module, moved and laid out."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return what.to(self.group.device).to(memory_format=layout)


class Trainer:
    """Trains a model with SGD on labelled images.

    Args:
        model: returns logits `(N, classes)`; it is trained in place, where `placement` puts it.
        data: the images.
        recipe: how.
        seed: of what modules draw, as dropout does.
        sparsifier: holds pruned weights of `model` at zero, and perhaps prunes more; it has no optimizer of its own.
        teacher: a network whose logits are learned too, see `Recipe.loss`.
        placement: where and in what form it computes; None is float32 on the CPU, in this process alone.
        test_each_epoch: record the test accuracy after each epoch; it decides nothing.

    Attributes:
        progress: how far the run is.
        epochs: what is known after each epoch.
        best: the best epoch so far.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        *,
        seed: int = 0,
        sparsifier: Sparsifier | None = None,
        teacher: nn.Module | None = None,
        placement: Placement | None = None,
        test_each_epoch: bool = False,
    ) -> None:
        self.place = placement or Placement()
        self.group = self.place.group
        self.model = self.place(model)
        self.teacher = None if teacher is None else self.place(teacher).eval()
        self.data, self.recipe, self.seed, self.sparsifier = data, recipe, seed, sparsifier
        self.test_each_epoch = test_each_epoch
        # Gradients of half precision need scaling, or small ones vanish; those of bfloat16 have the range of float32.
        self.scaler = torch.amp.GradScaler(self.group.device.type, enabled=self.place.amp == "fp16")
        self.optimizer = recipe.optimizer(self.model)
        self.steps = math.ceil(data.train_count / recipe.batch)
        self.progress = Progress()
        self.epochs: list[Epoch] = []
        self.best: Best | None = None

    def run(
        self,
        save: Callable[[], None],
        *,
        every: int | None = None,
        stopping: Callable[[], bool] = lambda: False,
        progress: bool = False,
    ) -> None:
        """Train until all epochs are done.

        Args:
            save: writes `state_dict()` and `epochs`; called on process 0 before the first step, after each epoch, and
                before `Interrupted` is raised.
            every: also save after so many steps of an epoch.
            stopping: asked after each step, on every process; one that says True stops them all.
            progress: show a bar on stderr, on process 0.

        Raises:
            Interrupted: a process was asked to stop.
            TrainingError: the loss is not finite. What was saved before stays.
            DataError: an image is damaged.
        """
        parallel = self.group.parallel(self.model)
        if not self.epochs:
            self._record(Epoch(0))
            self._save(save)
        while self.progress.epoch < self.recipe.epochs:
            self._train_epoch(parallel, save, every, stopping, progress and self.group.first)

    def accuracy(self, batches: Iterable[tuple[Tensor, Tensor]], model: nn.Module | None = None) -> float | None:
        """Top-1 accuracy in [0, 1], in float32, of the model in training or of another; None without images."""
        model = (model or self.model).eval()
        correct = count = 0
        with torch.inference_mode():
            for images, labels in batches:
                logits = model(self.place(images))
                correct += int((logits.argmax(1).cpu() == labels).sum())
                count += len(labels)
        return correct / count if count else None

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on: tensors, numbers and strings in dicts and lists."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict(),
            "progress": asdict(self.progress),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": None if self.best is None else dict(vars(self.best)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another trainer of the same model, data and recipe stopped."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        self.progress = Progress(**state["progress"])
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.best = None if state["best"] is None else Best(**state["best"])

    def _train_epoch(
        self,
        parallel: nn.Module,
        save: Callable[[], None],
        every: int | None,
        stopping: Callable[[], bool],
        shown: bool,
    ) -> None:
        progress = self.progress
        batches = self.data.order(progress.epoch).split(self.recipe.batch)  # type: ignore[no-untyped-call]
        parallel.train()
        with tqdm(
            total=self.steps, initial=progress.step, desc=f"epoch {progress.epoch + 1}", leave=False, disable=not shown
        ) as bar:
            while progress.step < self.steps:
                began = time.perf_counter()
                asked = self._step(parallel, batches[progress.step], stopping())
                progress.step += 1
                progress.seconds += time.perf_counter() - began
                bar.set_postfix(loss=f"{progress.loss / progress.images:.4f}", refresh=False)
                bar.update()
                if asked:
                    self._save(save)
                    raise Interrupted(
                        f"stopped after step {progress.step} of {self.steps} in epoch {progress.epoch + 1}; "
                        "its state is saved, --resume goes on"
                    )
                if every and progress.step % every == 0 and progress.step < self.steps:
                    self._save(save)
        done = progress.epoch + 1
        self.progress = Progress(epoch=done)
        rate = self.recipe.learning_rate(done * self.steps - 1, self.steps)
        self._record(Epoch(done, rate, progress.loss / progress.images, seconds=progress.seconds))
        self._save(save)

    def _step(self, parallel: nn.Module, positions: Tensor, stop: bool) -> bool:
        """Learn from one batch; return whether a process was asked to stop."""
        epoch = self.progress.epoch
        step = epoch * self.steps + self.progress.step
        torch.manual_seed(_seed(self.seed, step, self.group.rank))
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.recipe.learning_rate(step, self.steps)
        mine, counts = self.group.share(positions)
        images, labels = self.data.training_batch(mine, epoch)
        images, labels = self.place(images), labels.to(self.group.device)
        with torch.autocast(self.group.device.type, self.place.dtype, enabled=self.place.dtype is not None):
            logits = parallel(images)
            with torch.no_grad():
                taught = None if self.teacher is None else self.teacher(images)
        loss = self.recipe.loss(logits, labels, taught) * counts
        total, asked = self.group.sum(loss, stop)
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is {total} at step {self.progress.step + 1} of epoch {epoch + 1}; lower --lr, add --warmup, "
                "or leave --amp out, with another --output"
            )
        self.optimizer.zero_grad()
        # Backward averages over the processes; the parts of a batch may differ in size, its images count the same.
        self.scaler.scale(loss * (self.group.size / len(positions))).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.sparsifier is not None:
            self.sparsifier.step()
        self.progress.loss += total
        self.progress.images += len(positions)
        return asked > 0

    def _record(self, epoch: Epoch) -> None:
        """Evaluate and remember the network as it is after `epoch`."""
        if not self.group.first:
            self.epochs.append(epoch)
            return
        validation = self.accuracy(self.data.validation_batches(EVALUATION_BATCH))
        test = self.accuracy(self.data.test_batches(EVALUATION_BATCH)) if self.test_each_epoch else None
        known = Epoch(**asdict(epoch) | {"validation_accuracy": validation, "test_accuracy": test})
        self.epochs.append(known)
        pruned = self.sparsifier is None or self.sparsifier.finished
        better = self.best is None or (validation is not None and validation > self.best.accuracy)
        if epoch.epoch and validation is not None and pruned and better:
            state = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
            self.best = Best(epoch.epoch, validation, state)
        print(known, flush=True)

    def _save(self, save: Callable[[], None]) -> None:
        if self.group.first:
            save()


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
