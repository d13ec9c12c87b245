"""A model that is to be pruned, with its trace, and the inputs that were given with it."""

import inspect
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.calibration import FITS, Batch, Calibration, Choose, read_batches, reconstruct
from fxprune.errors import CalibrationError, TraceError
from fxprune.planning import Planner
from fxprune.plans import GroupedKernels
from fxprune.report import layer_costs
from fxprune.rewriting import calls, first_reader, read_by_name
from fxprune.sensitivity import Sensitivity, measure
from fxprune.shapes import Groups
from fxprune.tracing import Inputs, Trace, as_inputs, trace


class Subject:
    """The trace of a model, with the inputs that it was given: an example, calibration data, both or none."""

    def __init__(self, model: nn.Module, example_inputs: Inputs | None, calibration: Calibration | None) -> None:
        self.batches, self._inputs, self.example_inputs = None, example_inputs, example_inputs
        if calibration is not None:
            given = _arguments_needed(model) if example_inputs is None else len(as_inputs(example_inputs))
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

    def overlap_planner(
        self,
        model: nn.Module,
        groups: Groups | Mapping[str, Groups],
        target: str | None,
        ignore: str | Iterable[str],
    ) -> Planner:
        """A planner whose shapes are those of all convolutions that can be pruned, in the form that any ratio has."""
        obstacles = find_obstacles(model, self.trace)
        return Planner(model, groups=groups, form="overlap", ignore=ignore, obstacles=obstacles, target=target)

    def sensitivity(
        self,
        model: nn.Module,
        table: Sensitivity | None,
        groups: Groups | Mapping[str, Groups],
        target: str | None,
        ignore: str | Iterable[str],
        seed: int,
        progress: bool,
    ) -> Sensitivity:
        """The sensitivity of all convolutions that can be pruned, from `table` if there is one."""
        planner = self.overlap_planner(model, groups, target, ignore)
        shapes = {name: shape.groups for name, shape in planner.shapes.items()}
        if table is not None:
            return table.among(model, shapes)
        costs = layer_costs(self.trace.module, self.trace.values)
        return measure(self.trace.module, shapes, costs, self.batches, seed=seed, progress=progress)

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


def find_obstacles(model: nn.Module, traced: Trace) -> dict[str, str]:
    """Convolutions that the traced graph does not allow to be grouped, with the reason."""
    called = {str(node.target): conv for node, conv in calls(traced.module, nn.Conv2d)}
    named = read_by_name(traced.module)
    obstacles = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        whole = next((path for path in traced.opaque if name.startswith(f"{path}.")), None)
        if whole is not None:
            obstacles[name] = f"inside {whole}: {traced.opaque[whole]}"
        elif name not in called:
            obstacles[name] = "the traced graph never calls it"
        elif reader := first_reader(called[name].parameters(), named):
            obstacles[name] = f"its parameters are also read by {reader}, which needs them dense"
    return obstacles


def _arguments_needed(model: nn.Module) -> int:
    """How many positional arguments of forward have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def _first_two(batch: Batch) -> Batch:
    """Two samples are enough of an example, where all tensors agree on what a sample is."""
    sizes = {leaf.shape[:1] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or torch.Size() in sizes:
        return batch
    first: Batch = tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) else leaf, batch)
    return first
