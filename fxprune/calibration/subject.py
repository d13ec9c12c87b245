"""A model that is to be pruned, with its trace or recording, and the inputs that were given with it."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.calibration import FITS, Batch, Calibration, Choose, read_batches, reconstruct
from fxprune.calibration.batches import rows_of, samples_in
from fxprune.calibration.effort import FULL, Effort
from fxprune.calibration.least_squares import Part, parts_that_stay
from fxprune.calibration.likeness import warn_if_unlike
from fxprune.calibration.lockstep import Lockstep
from fxprune.calibration.misfits import check_batches, misfit
from fxprune.calibration.recovery import RECOVERED, Recovery, recover
from fxprune.calibration.refitting import refit_layers
from fxprune.calibration.stages import Run
from fxprune.channels.capture import capture, recorded
from fxprune.errors import CalibrationError, TraceError
from fxprune.graph.containers import convert_tensors
from fxprune.graph.convolutions import Layer, kernels_of
from fxprune.graph.costs import layer_costs
from fxprune.graph.examples import Example, Inputs, as_examples, in_order, positional_parameters
from fxprune.graph.modes import in_evaluation
from fxprune.graph.recording import Recording
from fxprune.graph.replaying import SIZES, free_batch
from fxprune.graph.tracing import Trace, check_is_model, trace
from fxprune.plans import GroupedKernels
from fxprune.plans.eligibility import check_model, find_obstacles
from fxprune.vocabulary import Output


class Subject:
    """The trace or recording of a model, with the inputs that it was given: examples, calibration data, both or none.

    Attributes:
        model: the user's, only read.
        examples: what forward is called with, from the examples or the first batch; none if neither was given.
        batches: the arguments of each calibration batch; None without data.
        trace: a `Recording` if the result is to be the user's own module.
        effort: how much is spent on the fit of each layer.
        run: what it is used for, if that was announced: how far it has come is told there.
        counted: names of nodes of a recording whose channels have to stay, with the reason; planning finds them.

    Raises:
        TraceError: the model cannot be captured as asked for.
        CalibrationError: the calibration data are malformed, or do not fit the model.

    Warns:
        UnlikeTrainingWarning: they fit it, but are not like what it was trained on.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs | None,
        calibration: Calibration | None,
        output: Output = "graph",
    ) -> None:
        self.model, self.batches, self.effort = model, None, FULL
        self.counted: dict[str, str] = {}
        self.run: Run | None = None
        self._names: tuple[str, ...] = ()
        check_is_model(model)
        check_model(model)
        self.examples = () if example_inputs is None else as_examples(example_inputs, model)
        if self.examples:
            self._names = tuple(self.examples[0].kwargs)
        if calibration is not None:
            wanted = len(self.examples[0].args) if self.examples else _arguments_needed(model)
            names = _named_arguments(model, wanted, self._names)
            self.batches = read_batches(calibration, wanted + len(self._names), names)
            if not self.examples:
                self.examples = (self.example(_first(self.batches[0], 2)),)
        try:
            self.trace = capture(model, self.examples, output)
        except TraceError as failure:
            if example_inputs is not None or self.batches is None:
                raise
            if output != "module":
                trace(model)  # it fails too if the model is at fault
            error = self._failure_on_batch() or failure
            said = misfit(model, self.batches[0], self.output_of) or error
            raise CalibrationError(f"calibration batch 0 does not fit the model: {said}") from error
        if self.batches is not None:
            check_batches(model, [tuple(example.tensors) for example in self.examples], self.batches, self.output_of)
            warn_if_unlike(model, self.batches, self.output_of)

    @property
    def is_recorded(self) -> bool:
        """Whether the result is the user's own module, not a graph."""
        return isinstance(self.trace, Recording)

    @property
    def layers(self) -> nn.Module:
        """The model as planners see it: a convolution whose own forward only pads and convolves is a plain one."""
        return self.trace.layers if isinstance(self.trace, Recording) else self.model

    @property
    def example_inputs(self) -> tuple[Any, ...] | None:
        """The first example by position, which is what graphs are called with; None without examples."""
        return in_order(self.examples[0], self.model) if self.examples else None

    def of(self, model: nn.Module) -> "Subject":
        """Another model with the same inputs."""
        other = object.__new__(Subject)
        other.model, other.examples, other.batches, other._names = model, self.examples, self.batches, self._names
        other.trace, other.counted, other.effort = self.captured(model), {}, self.effort
        other.run = self.run
        return other

    def calibrated_on(self, batches: list[Batch], effort: Effort) -> "Subject":
        """The same model with other calibration data; what is known of the model is known there too."""
        other = object.__new__(Subject)
        vars(other).update({name: value for name, value in vars(self).items() if name != "network_batches"})
        other.batches, other.effort = batches, effort
        return other

    def without_data(self) -> "Subject":
        """The same model without calibration data."""
        other = object.__new__(Subject)
        vars(other).update({name: value for name, value in vars(self).items() if name != "network_batches"})
        other.batches, other.run = None, None
        return other

    def refitted_as(self, masked: nn.Module) -> "Subject":
        """The same model, to be refitted with the pulls that the refit of `masked` found."""
        other = object.__new__(Subject)
        vars(other).update(vars(self))
        found = {name: fit.ridge for name, fit in getattr(masked, FITS, {}).items()}
        other.effort = replace(self.effort, ridges={**self.effort.ridges, **found})
        return other

    def announce(self, seconds: Mapping[str, float], progress: bool) -> None:
        """Say what a run will take, if anything is known of it, see `Run`."""
        if seconds:
            self.run = Run(seconds, progress)

    def finish(self) -> None:
        """The run is over."""
        if self.run is not None:
            self.run.finish()
            self.run = None

    def begin(self, stage: str, passes: int = 1) -> None:
        """A stage of the run begins, see `Run.begin`."""
        if self.run is not None:
            self.run.begin(stage, passes)

    def captured(self, model: nn.Module) -> Trace:
        """Capture another model of the same structure in the same way."""
        found = recorded(model, self.examples) if self.is_recorded else trace(model, self.example_inputs)
        return replace(found, notes=tuple(dict.fromkeys((*self.trace.notes, *found.notes))))

    @cached_property
    def obstacles(self) -> dict[str, str]:
        """Convolutions that the graph does not allow to be grouped, with the reason."""
        return find_obstacles(self.model, self.trace)

    @cached_property
    def costs(self) -> dict[str, tuple[int, int | None]]:
        """Parameters and MACs of each layer, see `fxprune.graph.costs.layer_costs`."""
        return layer_costs(self.trace.module, self.trace.values)

    @cached_property
    def running(self) -> Trace:
        """The model as it runs on calibration batches, see `runnable`."""
        return self.runnable(self.model, self.trace)

    @property
    def network(self) -> fx.GraphModule:
        """Its graph."""
        return self.running.module

    @cached_property
    def network_batches(self) -> list[Batch] | None:
        """What `network` is called with for each batch; None without data."""
        if self.batches is None or not self.is_recorded:
            return self.batches
        return [tuple(self.example(batch).tensors) for batch in self.batches]

    @cached_property
    def takes_any_size(self) -> bool:
        """Whether calibration batches may have other sizes than the user's."""
        assert self.batches is not None
        try:
            if self.is_recorded:
                self._free(self.model, self.batches[0])
                return True
            (output,) = (node for node in self.network.graph.nodes if node.op == "output")
            with torch.no_grad(), Lockstep(self.network, self.network, [_first(self.batches[0], 1)]) as networks:
                networks.pause_before(output.name)
        except (TraceError, CalibrationError):
            return False
        return True

    def runnable(self, model: nn.Module, captured: Trace | None = None) -> Trace:
        """A trace of `model`, which has the structure of the subject, that runs on calibration batches.

        Raises:
            CalibrationError: the model treats its batches in a way that no graph can follow.
        """
        if not self.is_recorded:
            return self.captured(model) if captured is None else captured
        assert self.batches is not None
        batch = self.batches[0]
        try:
            return self._free(model, batch)
        except TraceError as error:
            if len({_shapes(batch) for batch in self.batches}) > 1:
                raise CalibrationError(
                    f"the model cannot be followed over batches of different sizes: {error}; pass batches of one size"
                ) from error
        return recorded(model, [self.example(batch)], modes=("eval",))

    def reconstruct(
        self, masked: nn.Module, layers: Collection[str], choose: Choose, seed: int, progress: bool
    ) -> dict[str, GroupedKernels]:
        """Prune and refit `masked`, a copy of the model, in place."""
        assert self.network_batches is not None
        twin = self.runnable(masked).module
        kernels, fits = reconstruct(
            self.network,
            twin,
            self.network_batches,
            layers,
            choose,
            seed=seed,
            effort=self.effort,
            progress=self.run or progress,
        )
        setattr(masked, FITS, fits)
        return kernels

    def refit(self, masked: nn.Module, stays: Mapping[str, Tensor], seed: int, progress: bool) -> None:
        """Solve layers of `masked`, a copy of the model that may have been trained, anew in place: their kernels that
        stay, `(O, C)` bool.
        """
        assert self.network_batches is not None

        def kept(name: str, layer: Layer, samples: object) -> list[Part]:
            weight = kernels_of(layer)
            return parts_that_stay(stays[name].to(weight.device), weight[0, 0].numel())

        with torch.inference_mode(False), in_evaluation(masked):
            twin = self.runnable(masked).module
            fits = refit_layers(
                self.network,
                twin,
                self.network_batches,
                stays,
                kept,
                seed=seed,
                effort=self.effort,
                progress=self.run or progress,
            )
        setattr(masked, FITS, fits)

    def recover(
        self,
        masked: nn.Module,
        kept: Mapping[str, Tensor],
        branches: Collection[str],
        recovery: Recovery,
        seed: int,
        progress: bool,
    ) -> None:
        """Train `masked`, a copy of the model in which what is not `kept` is zero, in place; `branches` of it, named by
        their last layers, are not computed, for they went.
        """
        assert self.network_batches is not None
        tensors = dict(masked.named_parameters(remove_duplicate=False))
        entries = {id(tensors[name]): stays for name, stays in kept.items() if name in tensors}
        with torch.inference_mode(False), in_evaluation(masked):
            twin = self.runnable(masked)
            done = recover(
                self.running,
                twin,
                self.network_batches,
                entries,
                recovery,
                branches=branches,
                seed=seed,
                progress=progress,
            )
        setattr(masked, RECOVERED, done)

    def _failure_on_batch(self) -> TraceError | None:
        """What a run on the whole of the first batch says, of which two samples alone may look like something else."""
        assert self.batches is not None
        try:
            recorded(self.model, [self.example(self.batches[0])], modes=("eval",))
        except TraceError as error:
            return error
        return None

    def _free(self, model: nn.Module, batch: Batch) -> Recording:
        """The recording of a model that runs on batches of any size."""
        small, large = (recorded(model, [self.example(_first(batch, size))], modes=("eval",)) for size in SIZES)
        return free_batch(small, large)

    def output_of(self, model: nn.Module, batch: Batch) -> object:
        """What a model gives for a batch, of which it has a copy of its own, on its device: it may write into it."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        own = convert_tensors(batch, lambda tensor: tensor.to(device, copy=True))
        return self.example(own).call(model)

    def example(self, batch: Batch) -> Example:
        """A batch as arguments of forward."""
        count = len(batch) - len(self._names)
        return Example(batch[:count], dict(zip(self._names, batch[count:], strict=True)))


def _arguments_needed(model: nn.Module) -> int:
    """How many positional arguments of forward have no default; one, if all have and there are any."""
    parameters = positional_parameters(model)
    return sum(p.default is p.empty for p in parameters) or min(1, len(parameters))


def _named_arguments(model: nn.Module, count: int, keywords: tuple[str, ...]) -> tuple[str, ...]:
    """What the arguments in a batch are called: `count` by position, the others by name."""
    return (*(p.name for p in positional_parameters(model)[:count]), *keywords)


def _first(batch: Batch, count: int) -> Batch:
    """Some samples of a batch, repeated if it has fewer, where all its tensors agree on what a sample is."""
    size = samples_in(batch)
    return batch if size is None else rows_of(batch, [i % size for i in range(count)])


def _shapes(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
