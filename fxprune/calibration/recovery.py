"""Recovery: after the refit in closed form, gradient steps on the calibration images, without labels.

Every block of the pruned network is to give what it gave in the dense one (`fxprune.calibration.blocks`): the loss is
the squared error of what the blocks give, relative to its variance, averaged over the blocks. Romero et al., FitNets
(ICLR 2015), train a small network by the features of a large one; here both have the same structure, so that nothing
has to be mapped.

- *Statistics stay.* Both networks run in evaluation mode; BatchNorm normalizes by what the dense network saw.
- *Steps are relative.* Adam (Kingma & Ba, ICLR 2015) in units of what steps change
  (`fxprune.calibration.relative_steps`), of a size that is tried on the first minibatch. There is no learning rate to
  tune: usual ones ruin a refitted network.
- *A part of the images judges.* A tenth is held out; the weights with the least loss on it are kept, and those of
  before where none had less.
"""

import hashlib
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx
from tqdm import tqdm

from fxprune.calibration.augmentation import Augment, augmented, check_augment
from fxprune.calibration.batches import Batch
from fxprune.calibration.blocks import block_ends, up_to
from fxprune.calibration.drawing import Drawing
from fxprune.calibration.relative_steps import schedule, weights_of
from fxprune.calibration.skipping import without_branches
from fxprune.errors import CalibrationError, PlanError, StorageError, near_matches
from fxprune.files import write_whole
from fxprune.graph.containers import convert_tensors
from fxprune.graph.contexts import contexts_restored
from fxprune.graph.tracing import Trace

logger = logging.getLogger("fxprune")

STEPS = 1500
SECONDS = 180.0
"""How long it takes unless it is said: so many steps, or so many seconds where the steps would take longer."""
BATCH, FEW, EPOCH = 32, 8, 14
"""Images of a step: so many, or where images are few, fewer but at least so many, that all of them are seen in no less
than so many steps."""
STRETCH = 3.0
"""The largest step, relative to the first one that would lower the loss most, which is found by trying: by how deep the
network is and by what is left to repair, it differs by a factor of a hundred."""
TRIED: tuple[float, ...] = tuple(0.064 / 2**i for i in range(14))
"""Shares of the weights of a filter that are tried, from the largest."""
LOOKS = 20
"""How often the held-out images are looked at, and the state is saved."""
DIVERGED = 1.1
"""If the held-out loss is more than so many times what it was at the start, the steps are too large for the noise of
their gradients: it begins again from the best weights, with half the step."""
VERSION = 1

RECOVERED = "fxprune_recovered"
"""Attribute of a recovered model under which it is kept what recovery did, see `Recovered`."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How long to recover and with what: the arguments of `fxprune.recover` of the same names, which explains them.

    Raises:
        PlanError: a value is not legal.
    """

    seconds: float | None = None
    steps: int | None = None
    augment: Augment | None = None
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        seconds, steps = self.seconds, self.steps
        if seconds is not None and not (
            isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf
        ):
            raise PlanError(f"seconds is {seconds!r}; it must be a positive number, such as 60")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise PlanError(f"steps is {steps!r}; it must be a number of steps, 1 or more")
        if self.checkpoint is not None and not isinstance(self.checkpoint, str | Path):
            raise PlanError(f"checkpoint is a {type(self.checkpoint).__name__}; it must be the path of a file")
        check_augment(self.augment)

    @classmethod
    def of(cls, asked: object) -> "Recovery | None":
        """What `recover=` of `fxprune.compile` asks for: False or None nothing, True the usual time, a number so many
        seconds, a mapping the fields of this class.

        Raises:
            PlanError: it is something else.
        """
        if asked is None or asked is False:
            return None
        if asked is True:
            return cls()
        if isinstance(asked, cls):
            return asked
        if isinstance(asked, int | float):
            return cls(seconds=asked)
        names = [field.name for field in fields(cls)]
        if not isinstance(asked, Mapping):
            raise PlanError(
                f"recover is {asked!r}; it must be True, a number of seconds, or a mapping of "
                f"{', '.join(names)}, such as {{'steps': 200}}"
            )
        for name in asked:
            if name not in names:
                close = near_matches(str(name), names)
                raise PlanError(f"recover names {name!r}{close}; it may name {', '.join(names)}")
        return cls(**asked)

    def tenth(self) -> "Recovery":
        """A tenth of it, to compare plans by."""
        steps, seconds = self.limits
        return replace(
            self,
            steps=None if math.isinf(steps) else math.ceil(steps / 10),
            seconds=None if math.isinf(seconds) else seconds / 10,
            checkpoint=None,
        )

    @property
    def limits(self) -> tuple[float, float]:
        """Steps and seconds; it ends with what comes first. Infinite is what was left out beside the other."""
        if self.seconds is None and self.steps is None:
            return STEPS, SECONDS
        return (
            math.inf if self.steps is None else self.steps,
            math.inf if self.seconds is None else self.seconds,
        )


@dataclass(frozen=True)
class Recovered:
    """What recovery did.

    Attributes:
        steps: how many were made.
        seconds: that they took.
        before, after: loss on the held-out images, relative to the variance of what the blocks give.
        best: the step after which the weights were best; 0: nothing improved, and nothing was changed.
        blocks: nodes by which the networks were compared.
    """

    steps: int
    seconds: float
    before: float
    after: float
    best: int
    blocks: tuple[str, ...]


def recover(
    dense: Trace,
    pruned: Trace,
    batches: Sequence[Batch],
    kept: Mapping[int, Tensor],
    recovery: Recovery,
    *,
    branches: Collection[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> Recovered:
    """Train the weights of a pruned network, in place, until its blocks give what those of the dense one give.

    Args:
        dense: the reference, of the same structure.
        pruned: the network, in evaluation mode. Its convolutions, linear layers and normalizations are trained.
        batches: arguments of forward.
        kept: `id` of a parameter to the entries that may move, bool of its shape; a parameter that is absent may move
            as a whole.
        recovery: how long, and with what.
        branches: that went from `pruned`, by their last layers, whose weights are zero. They are not computed.
        seed: of the images that are held out, of their order, and of `augment`.
        progress: show a bar on stderr.

    Raises:
        CalibrationError: the networks differ in structure, the data do not fit them or hold one image, nothing can be
            trained, or the checkpoint is of another run.
    """
    run = _Run(dense, pruned, batches, kept, recovery, branches, seed)
    with contexts_restored(), torch.enable_grad():
        run.resume()
        run.go(progress)
    return run.finish()


def drawn_from(batches: Sequence[Batch], seed: int) -> Drawing:
    """What a recovery learns from, and what it holds out.

    Raises:
        CalibrationError: there is one image.
    """
    return Drawing(batches, seed, BATCH, FEW, EPOCH)


class _Run:
    """The state of a recovery: weights, averages of their gradients, and the best weights so far."""

    def __init__(
        self,
        dense: Trace,
        pruned: Trace,
        batches: Sequence[Batch],
        kept: Mapping[int, Tensor],
        recovery: Recovery,
        branches: Collection[str],
        seed: int,
    ) -> None:
        names = [[node.name for node in side.module.graph.nodes] for side in (dense, pruned)]
        if names[0] != names[1]:
            raise CalibrationError("the two networks differ in structure; pass a model and what `mask` made of it")
        self.blocks = tuple(node.name for node in block_ends(dense.module, dense.values))
        if not self.blocks:
            raise CalibrationError("the network returns nothing that its weights take part in; leave recover out")
        networks = dense.module, without_branches(pruned, branches)
        self.teacher, self.student = (up_to(network, self.blocks).eval() for network in networks)
        self.recovery, self.seed = recovery, seed
        self.steps, self.seconds = recovery.limits
        self.drawing = drawn_from(batches, seed)
        self.device = next((p.device for p in self.student.parameters()), torch.device("cpu"))
        self.asked = {parameter: parameter.requires_grad for parameter in self.student.parameters()}
        batch = self._placed(self.drawing.minibatch(0))
        self.weights = weights_of(self.student, kept, lambda: self._outputs(self.student, batch))
        if not self.weights:
            raise CalibrationError("no convolution, linear layer or normalization of the network has weights to train")
        for name, weight in self.weights.items():
            if weight.value.dtype not in (torch.float32, torch.float64):
                raise CalibrationError(
                    f"{name} is {str(weight.value.dtype).removeprefix('torch.')}, which cannot hold the small steps of "
                    "a recovery; recover the model in float32, and convert the result"
                )
        trained = {id(weight.value) for weight in self.weights.values()}
        for parameter in self.asked:
            parameter.requires_grad_(id(parameter) in trained)
        self.step, self.elapsed, self.looks, self.rate = 0, 0.0, 0, 0.0
        self.scales: list[Tensor] = []
        self.before = self.best_loss = math.inf
        self.run = "" if recovery.checkpoint is None else self._fingerprint()
        self.best_step, self.best = 0, {name: weight.value.detach().clone() for name, weight in self.weights.items()}

    def _fingerprint(self) -> str:
        """What a checkpoint must agree in: both networks, the images, and the settings."""
        digest = hashlib.sha256()
        augment = self.recovery.augment  # of a function, the name is all that can be compared
        if callable(augment):
            augment = getattr(augment, "__qualname__", type(augment).__qualname__)
        digest.update(repr((self.recovery.limits, augment, self.seed, self.blocks)).encode())
        tensors = [*self.teacher.state_dict().values(), *self.student.state_dict().values()]
        tensors += [weight.unit for weight in self.weights.values()]
        for tensor in [*tensors, *self.drawing.tensors()]:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def done(self) -> float:
        """The share of the run that is over, in `[0, 1]`."""
        return min(1.0, max(self.step / self.steps, self.elapsed / self.seconds))

    def go(self, progress: bool) -> None:
        """Make steps until the time is over."""
        in_steps = self.steps < math.inf
        limit = f"{self.steps:.0f} steps" if in_steps else ""
        limit += f"{', ' if in_steps else ''}at most {self.seconds:.0f} s" if self.seconds < math.inf else ""
        logger.info("recovery: %s, %d images to learn from, %d held out", limit, self.drawing.drawn, self.drawing.held)
        total, unit = (self.steps, "step") if in_steps else (round(self.seconds), "s")
        bar = tqdm(total=total, unit=unit, desc=f"recovering ({limit})", disable=not progress)
        began = time.perf_counter() - self.elapsed
        with bar:
            if not self.scales:
                self.scales = self._scales()
                self.before = self.best_loss = self._held_out_loss()
                if not math.isfinite(self.before):
                    raise CalibrationError(
                        "on the calibration data the blocks give NaN or infinity; check the data and the model"
                    )
                self.rate = STRETCH * self._best_first_step()
            while self.done < 1:
                self._make_step()
                self.elapsed = time.perf_counter() - began
                if self.done >= (self.looks + 1) / LOOKS:
                    self._look()
                    self.elapsed = time.perf_counter() - began
                    self.save()
                bar.set_postfix(held_out=f"{self.before:.4f} -> {self.best_loss:.4f}", refresh=False)
                bar.update((self.step if in_steps else min(total, round(self.elapsed))) - bar.n)

    def finish(self) -> Recovered:
        """Give the network the best weights."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.value.copy_(self.best[name])
                weight.value.grad = None
        for parameter, asked in self.asked.items():
            parameter.requires_grad_(asked)
        done = Recovered(self.step, self.elapsed, self.before, self.best_loss, self.best_step, self.blocks)
        if self.best_step:
            logger.info(
                "recovery: loss on held-out images %.4f -> %.4f, in %d steps", self.before, self.best_loss, self.step
            )
        else:
            logger.warning(
                "recovery: no step of %d lowered the loss on the held-out images; the weights are those of before",
                self.step,
            )
        return done

    # --- one step -----------------------------------------------------------------------------------------------------

    def _make_step(self) -> None:
        given = self.drawing.minibatch(self.step)
        batch = self._placed(augmented(given, self.recovery.augment, _seed(self.seed, self.step)))
        loss = self._loss(batch)
        for weight in self.weights.values():
            weight.value.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        rate = self.rate * schedule(max((self.step + 0.5) / self.steps, self.elapsed / self.seconds))
        self.step += 1
        for weight in self.weights.values():
            weight.move(rate)

    def _best_first_step(self) -> float:
        """The share of the weights by which the first step would lower the loss of its own minibatch most. On another
        one it would be far too small: what is noise in one gradient goes out in the average of many.
        """
        batch = self._placed(self.drawing.minibatch(0))
        loss = self._loss(batch)
        if not loss.requires_grad:
            raise CalibrationError(
                "no gradient reaches the weights, because forward computes under torch.no_grad; leave recover out"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        start = float(loss.detach())
        best, least = TRIED[-1], start
        for share in TRIED:
            for weight in self.weights.values():
                weight.move(share)
            with torch.no_grad():
                reached = float(self._loss(batch))
            for name, weight in self.weights.items():
                weight.restart(self.best[name])
            if reached < least:
                best, least = share, reached
            elif least < start:
                break
        return best

    def _loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = self._outputs(self.teacher, batch)
        given = self._outputs(self.student, batch)
        errors = [
            ((_precise(ours) - _precise(theirs)).square() * scale).mean()
            for ours, theirs, scale in zip(given, wanted, self.scales, strict=True)
        ]
        return torch.stack(errors).mean()

    def _outputs(self, network: fx.GraphModule, batch: Batch) -> tuple[Tensor, ...]:
        torch.clear_autocast_cache()  # it holds weights of before the last step, without their gradients
        try:  # each network has its own copy of the batch: it may write into it
            outputs: tuple[Tensor, ...] = network(*convert_tensors(batch, Tensor.clone))
        except Exception as error:  # any operator of any model
            raise CalibrationError(f"a calibration batch does not fit the model: {error}") from error
        return outputs

    def _placed(self, batch: Batch) -> Batch:
        return convert_tensors(batch, lambda tensor: tensor.to(self.device))

    # --- the held-out images ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _scales(self) -> list[Tensor]:
        """By what the squared errors of each block are multiplied, so that their mean is relative to the variance of
        what the dense network gives: `(1, C, 1, 1)`. Channels that are removed count for nothing.
        """
        batch = self._placed(self.drawing.minibatch(0))
        scales = []
        for ours, theirs in zip(self._outputs(self.student, batch), self._outputs(self.teacher, batch), strict=True):
            others = [axis for axis in range(ours.dim()) if axis != 1]
            stays = (
                (ours != 0).any(dim=others, keepdim=True) if ours.dim() > 1 else torch.ones_like(ours, dtype=torch.bool)
            )
            variance = _precise(theirs.masked_select(stays)).var().clamp(min=torch.finfo(torch.float32).tiny)
            scales.append(stays / (variance * _precise(stays).mean()) if stays.any() else _precise(stays))
        return scales

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        losses = [(float(self._loss(self._placed(batch))), count) for batch, count in self.drawing.held_out()]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)

    def _look(self) -> None:
        self.looks = math.floor(self.done * LOOKS + 1e-9)
        loss = self._held_out_loss()
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.best = {name: weight.value.detach().clone() for name, weight in self.weights.items()}
        elif not loss < DIVERGED * self.before:  # or NaN
            self.rate /= 2
            for name, weight in self.weights.items():
                weight.restart(self.best[name])

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state into the checkpoint, if there is to be one.

        Raises:
            StorageError: it cannot be written.
        """
        if self.recovery.checkpoint is None:
            return
        path = Path(self.recovery.checkpoint)
        state = {name: getattr(self, name) for name in _STATE}
        state |= {"format": FORMAT, "version": VERSION, "run": self.run}
        state["weights"] = {name: weight.state_dict() for name, weight in self.weights.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda partial: torch.save(state, partial))
        except (OSError, RuntimeError) as error:
            raise StorageError(
                f"{path}: cannot be written: {error}; make room, or choose another checkpoint"
            ) from error

    def resume(self) -> None:
        """Go on where the checkpoint stopped, if there is one.

        Raises:
            StorageError: it cannot be read, or is of another run.
        """
        if self.recovery.checkpoint is None or not (path := Path(self.recovery.checkpoint)).exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # the unpickler runs on foreign bytes: UnpicklingError, RuntimeError, EOFError, ...
            raise StorageError(f"{path}: no checkpoint of a recovery; {_START_AGAIN}") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
            raise StorageError(f"{path}: no checkpoint of a recovery of this version; {_START_AGAIN}")
        if state["run"] != self.run:
            raise StorageError(f"{path}: of a recovery of other weights, with other images or settings; {_START_AGAIN}")
        for name in _STATE:
            setattr(self, name, state[name])
        for name, weight in self.weights.items():
            weight.load_state_dict(state["weights"][name])


def _precise(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


_STATE = ("step", "elapsed", "looks", "rate", "scales", "before", "best_loss", "best_step", "best")
FORMAT = "fxprune-recovery"
_START_AGAIN = "remove the file, or choose another checkpoint"
