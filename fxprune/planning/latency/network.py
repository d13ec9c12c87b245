"""The dense network in its fastest form, beside which pruned ones are timed."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from tqdm import tqdm

from fxprune.calibration.batches import Batch
from fxprune.calibration.stages import Run
from fxprune.calibration.subject import Subject
from fxprune.errors import AccelerationError
from fxprune.exact.rewriting import rewrite
from fxprune.inference.acceleration import accelerate
from fxprune.inference.duel import share_of_time
from fxprune.inference.integers import in_integers
from fxprune.inference.runtimes import RuntimeModel, TorchModel
from fxprune.inference.runtimes.contest import check_runtime
from fxprune.inference.runtimes.precisions import INT8
from fxprune.planning.estimates import TIMING
from fxprune.planning.requests import Request
from fxprune.plans import PrunePlan
from fxprune.plans.masking import masked_copy
from fxprune.plans.shapes import TARGETS
from fxprune.vocabulary import Precision, RuntimeName

Accelerated = fx.GraphModule | RuntimeModel | TorchModel
T = TypeVar("T")


class WholeNetwork:
    """A dense network and what runs it.

    Args:
        model: dense.
        inputs: arguments of forward.
        runtime: what runs it.
        progress: show bars on stderr.
        precision: what it computes in there, if that is less than the type of the model.

    Attributes:
        run: for which it is timed, if that was announced; how far it has come is told there.
    """

    run: Run | None = None

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        runtime: RuntimeName,
        progress: bool = False,
        precision: Precision | None = None,
    ) -> None:
        self.model, self.inputs, self.runtime, self.progress = model, inputs, runtime, progress
        self.precision = precision

    @classmethod
    def of(cls, subject: Subject, request: Request) -> "WholeNetwork":
        """The same one for all who ask about one subject: to accelerate it takes seconds.

        Raises:
            AccelerationError: there is nothing to time it with, or it cannot be accelerated as asked for.
        """
        check_target(subject.model, request, subject.example_inputs is not None)
        assert subject.example_inputs is not None
        known = _KNOWN.get(subject)
        if known is None or (known.runtime, known.precision) != (request.runs_in, request.precision):
            known = _KNOWN[subject] = cls(
                subject.model, subject.example_inputs, request.runs_in, precision=request.precision
            )
        known.run, known.progress = subject.run, request.progress and subject.run is None
        return known

    def each(self, layers: Sequence[T]) -> Iterator[T]:
        """Layers to be timed one after the other: what the run is told, or shows in a bar of its own."""
        if self.run is None:
            yield from tqdm(layers, desc="timing", unit="conv", disable=not self.progress)
            return
        self.run.begin(TIMING)
        for layer in layers:
            yield layer
            self.run.advance(1 / len(layers))

    @cached_property
    def dense(self) -> Accelerated:
        """The network itself.

        Raises:
            AccelerationError: it cannot be accelerated.
        """
        return self.accelerated(self.model)

    def accelerated(self, model: nn.Module, batches: Sequence[Batch] | None = None) -> Accelerated:
        """A network in its fastest form; in integers with ranges measured on the batches, or where there are none, for
        its times alone.
        """
        if self.precision == INT8:
            return in_integers(model, self.inputs, self.runtime, batches, self.progress)
        return accelerate(model, self.inputs, runtime=self.runtime, precision=self.precision, progress=self.progress)

    def share_with(self, plan: PrunePlan) -> float:
        """The share of the dense time that the network takes, pruned by a plan; its weights change no time."""
        return self.share_of(self.accelerated(rewrite(masked_copy(self.model, plan), plan, self.inputs)))

    def share_of(self, fast: nn.Module) -> float:
        """The share of the dense time that an accelerated network takes."""
        return share_of_time(fast, self.dense, self.inputs)


_KNOWN: WeakKeyDictionary[Subject, WholeNetwork] = WeakKeyDictionary()


def check_target(model: nn.Module, request: Request, has_inputs: bool) -> None:
    """See that a model can be accelerated for the target of a request, in its runtime, before hours of planning.

    Raises:
        AccelerationError: there are no inputs to time it on, it is elsewhere, or the runtime is not installed or takes
            no such model.
    """
    target = request.target
    if target not in TARGETS:
        return  # None: the device where the model is
    if not has_inputs:
        raise AccelerationError(
            f"target={target!r} needs example_inputs to time the model on; pass them, or leave target out"
        )
    found = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if found - {target}:
        raise AccelerationError(
            f"target={target!r}, but the model is on {', '.join(sorted(found))}; move model and example_inputs to "
            f"{target} first, or plan with make_plan(target={target!r}) and accelerate there"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    check_runtime(request.runs_in, torch.device(target), dtype, request.precision)
