"""A model that is to be pruned, with its trace, and the inputs that were given with it."""

from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.calibration import FITS, Batch, Calibration, Choose, read_batches, reconstruct
from fxprune.calibration.recovery import RECOVERED, Recovery, recover
from fxprune.errors import CalibrationError, TraceError
from fxprune.graph.costs import layer_costs
from fxprune.graph.tracing import Inputs, as_inputs, positional_parameters, trace
from fxprune.plans import GroupedKernels
from fxprune.plans.eligibility import find_obstacles


class Subject:
    """The trace of a model, with the inputs that it was given: an example, calibration data, both or none."""

    def __init__(self, model: nn.Module, example_inputs: Inputs | None, calibration: Calibration | None) -> None:
        self.model = model
        if example_inputs is not None:
            example_inputs = as_inputs(example_inputs, model)
        self.batches, self._inputs, self.example_inputs = None, example_inputs, example_inputs
        if calibration is not None:
            given = _arguments_needed(model) if example_inputs is None else len(example_inputs)
            self.batches = read_batches(calibration, given)
            if example_inputs is None:
                self._inputs, self.example_inputs = self.batches[0], _first_two(self.batches[0])
        try:
            self.trace = trace(model, self._inputs)
        except TraceError as error:
            if example_inputs is None and calibration is not None:
                trace(model)  # it fails too if the model is at fault
                raise CalibrationError(f"calibration batch 0 does not fit the model: {error}") from error
            raise

    def of(self, model: nn.Module) -> "Subject":
        """Another model with the same inputs."""
        return Subject(model, self._inputs, self.batches)

    @cached_property
    def obstacles(self) -> dict[str, str]:
        """Convolutions that the graph does not allow to be grouped, with the reason."""
        return find_obstacles(self.model, self.trace)

    @cached_property
    def costs(self) -> dict[str, tuple[int, int | None]]:
        """Parameters and MACs of each layer, see `fxprune.graph.costs.layer_costs`."""
        return layer_costs(self.trace.module, self.trace.values)

    def reconstruct(
        self, masked: nn.Module, layers: Collection[str], choose: Choose, seed: int, progress: bool
    ) -> dict[str, GroupedKernels]:
        """Prune and refit `masked`, a copy of the model, in place."""
        assert self.batches is not None
        twin = trace(masked, self._inputs)
        kernels, fits = reconstruct(
            self.trace.module, twin.module, self.batches, layers, choose, seed=seed, progress=progress
        )
        setattr(masked, FITS, fits)
        return kernels

    def recover(
        self, masked: nn.Module, kept: Mapping[str, Tensor], recovery: Recovery, seed: int, progress: bool
    ) -> None:
        """Train `masked`, a copy of the model in which what is not `kept` is zero, in place."""
        assert self.batches is not None
        modes = [(module, module.training) for module in masked.modules()]
        tensors = dict(masked.named_parameters(remove_duplicate=False))
        entries = {id(tensors[name]): stays for name, stays in kept.items() if name in tensors}
        with torch.inference_mode(False):
            twin = trace(masked.eval(), self._inputs)
            done = recover(self.trace, twin, self.batches, entries, recovery, seed=seed, progress=progress)
        for module, mode in modes:
            module.training = mode
        setattr(masked, RECOVERED, done)


def _arguments_needed(model: nn.Module) -> int:
    """How many positional arguments of forward have no default."""
    return sum(p.default is p.empty for p in positional_parameters(model))


def _first_two(batch: Batch) -> Batch:
    """Two samples are enough of an example, where all tensors agree on what a sample is."""
    sizes = {leaf.shape[:1] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or torch.Size() in sizes:
        return batch
    first: Batch = tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) else leaf, batch)
    return first
