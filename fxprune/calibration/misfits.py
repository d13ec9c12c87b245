"""What is wrong with calibration batches that a model does not take, in words, with the way out: what would make them
fit is tried.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from fxprune.calibration.batches import Batch, rows_of
from fxprune.errors import CalibrationError
from fxprune.graph.containers import tensors_in
from fxprune.graph.convolutions import convolutions
from fxprune.graph.copying import copied

Call = Callable[[nn.Module, Batch], object]
"""Calls a model with a batch."""
MOST_FAULTS = 2
"""That one batch is thought to have."""


def check_batches(model: nn.Module, fitting: Sequence[Batch], batches: Sequence[Batch], call: Call) -> None:
    """See that a model takes its calibration batches. Only those of another kind than what it is known to take are
    tried, on a copy of the model.

    Args:
        model: of the user.
        fitting: arguments that it takes.
        batches: the calibration data.
        call: see `Call`.

    Raises:
        CalibrationError: it does not take a batch, or takes it as one sample.
    """
    known = {_kind(batch) for batch in fitting}
    for number, batch in enumerate(batches):
        if (kind := _kind(batch)) in known:
            continue
        known.add(kind)
        trial = _Trial(model, call)
        failure = trial.failure(batch)
        if failure or trial.is_single(batch):
            raise CalibrationError(f"calibration batch {number} does not fit the model: {trial.hint(batch) or failure}")


def misfit(model: nn.Module, batch: Batch, call: Call) -> str:
    """What is wrong with a batch that a model does not take, and the way out; empty where nobody knows."""
    return _Trial(model, call).hint(batch)


class _Trial:
    """A copy of a model, to try batches on."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self._model, self._call = copied(model).eval(), call
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        self._dtype = parameters[0].dtype if parameters else torch.float32
        first = next(iter(convolutions(model).values()), None)
        self._channels = None if first is None else first.in_channels

    def failure(self, batch: Batch) -> str:
        """What the model says of a batch that it does not take; empty if it does."""
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=()):
                self._call(self._model, batch)
        except Exception as error:  # any operator of any model
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(batch))
            return f"{type(self._model).__name__} does not run on shape {shapes}: {error}"
        return ""

    def is_single(self, batch: Batch) -> bool:
        """Whether the model takes one tensor without its batch dimension, so that its first axis counts no samples."""
        if len(batch) != 1 or not isinstance(batch[0], Tensor):
            return False
        x = batch[0]
        if not x.dim():
            return True
        return bool(self.failure(rows_of(batch, [i % len(x) for i in range(2)]))) and not self.failure((x[None],))

    def hint(self, batch: Batch) -> str:
        """What would make it fit, if that is known."""
        if len(batch) != 1 or not isinstance(batch[0], Tensor):
            return ""
        x = batch[0]
        changes = list(self._changes(x))
        for count in range(1, MOST_FAULTS + 1):
            for some in combinations(changes, count):
                changed = x
                for _, change in some:
                    changed = change(changed)
                if not self.failure((changed,)) and not self.is_single((changed,)):
                    return "; ".join(text for text, _ in some)
        if x.dim() < 2 and not x.is_floating_point():
            return f"shape {tuple(x.shape)} of {_name(x.dtype)} looks like labels; {_FIRST}"
        return ""

    def _changes(self, x: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """What may be wrong with a batch, with the way out, and how it would be right."""
        shape = f"shape {tuple(x.shape)}"
        if self.is_single((x,)) or self.failure((x,)):
            yield f"there is no batch dimension in {shape}; {_BATCHES}", lambda x: x[None]
        if x.dtype != self._dtype:
            way_out = (
                f"pass images.to({self._dtype})"
                if x.is_floating_point()
                else "prepare them as for the network, such as images.float() / 255 less its mean, by its deviation"
            )
            text = f"it is of {_name(x.dtype)}, the model of {_name(self._dtype)}; {way_out}"
            yield text, lambda x: x.to(self._dtype)
        axis = x.dim() - 3
        if self._channels is None or axis < 0 or x.shape[axis] == self._channels:
            return
        wrong = f"{shape} has {x.shape[axis]} channels, and the model takes {self._channels}"
        if x.shape[-1] == self._channels:
            yield f"{shape} has its channels last; pass images.movedim(-1, {axis})", lambda x: x.movedim(-1, -3)
        elif x.shape[axis] == 1:
            yield (
                f"{wrong}; pass pictures in colour, or images.repeat_interleave({self._channels}, {axis})",
                lambda x: x.repeat_interleave(self._channels or 1, -3),
            )
        elif x.shape[axis] > self._channels:
            yield f"{wrong}; drop the others, such as alpha", lambda x: x.narrow(-3, 0, self._channels or 1)


_BATCHES = "pass DataLoader(data, batch_size=32), or each as x[None]"
_FIRST = "a batch is what forward takes, or begins with it: (images, labels)"


def _kind(batch: Batch) -> tuple[object, ...]:
    """What batches have in common that a model takes all or none of: types, axes, channels."""
    return tuple((t.dtype, t.dim(), t.shape[1:2] if t.dim() > 2 else ()) for t in tensors_in(batch))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
