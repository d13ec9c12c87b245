"""The inference form of a model for one device: fused, packed, and every choice timed.

1. BatchNorm is folded; gather, convolution, residual add and activation become one `FusedConv2d`.
2. For each memory format, each engine that can compute a convolution is timed, pruned and dense.
3. The best pruned graph and the best dense graph of each format run side by side; the fastest is returned, so the
   result is never slower than the best dense form.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from fxprune.choices import AccelerationReport, LayerChoice
from fxprune.engines import ENGINES, Engine
from fxprune.errors import AccelerationError, VerificationError
from fxprune.fused import FusedConv2d, gather_channels
from fxprune.kernels.gather_conv import aligned_block
from fxprune.layers import ChannelGather
from fxprune.measurements import Stopwatch
from fxprune.passes import FoldBatchNorm, FuseConvs
from fxprune.pipeline import common_block
from fxprune.rewriting import calls
from fxprune.timing import race
from fxprune.tracing import Inputs, as_inputs, trace
from fxprune.verification import RECORD, difference

ACCELERATION = "fxprune_acceleration"
"""Key of `GraphModule.meta` under which an accelerated module keeps its report."""

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

ROUNDS = 9  # of the race between whole graphs
TURN_SECONDS = 0.02  # a turn of it lasts at least about this long
MARGIN = 1.15  # a memory format whose convolutions alone are slower by this factor is not raced
# Largest difference to the model before, relative to the largest output: some hundred steps of the type (TF32 for
# float32 on CUDA), or else what the model itself makes of such a step on its input, times a few for its many layers.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32_TOLERANCE = 1e-2
NOISE_MARGIN = 20
LARGEST_LIMIT = 0.1


@dataclass(frozen=True)
class Form:
    """One way to compute a convolution: an engine, on the pruned weights or on the dense ones with zeros."""

    engine: type[Engine]
    is_dense: bool

    def __str__(self) -> str:
        return f"{'dense' if self.is_dense else 'pruned'} {self.engine.name}"

    def build(self, conv: FusedConv2d, memory_format: torch.memory_format) -> Engine:
        return self.engine(conv.dense() if self.is_dense and conv.dense_groups else conv, memory_format)


_Choices = dict[str, LayerChoice]  # by name of the graph node


@torch.no_grad()
def accelerate(
    model: nn.Module, example_inputs: Inputs, *, remember: bool = True, progress: bool = False
) -> fx.GraphModule:
    """Return the fastest inference form of a model on the device where it is.

    Args:
        model: what `fxprune.compile`, `rewrite` or `load` returned; also any other traceable model, which becomes the
            best dense form of itself: the opponent to compare with. It is not changed.
        example_inputs: positional arguments of forward, with the sizes to be fast for. Other batch and image sizes work
            too; the choices were timed for these.
        remember: keep measured times of layers in the cache folder (`FXPRUNE_CACHE`, default `~/.cache/fxprune`), and
            use those that are there.
        progress: show bars on stderr.

    Returns:
        A `GraphModule` for evaluation on this device and in this type. `fxprune.acceleration_report` explains it.

    Raises:
        AccelerationError: the model and the inputs are not on one device or not of one floating-point type, or the
            model was accelerated before.
        TraceError: the model cannot be traced.
        VerificationError: the result differs from the model.
    """
    inputs = as_inputs(example_inputs)
    if ACCELERATION in getattr(model, "meta", {}):
        raise AccelerationError("the model is accelerated already; pass what it was made from")
    device, dtype = _place(model, inputs)
    original = copy.deepcopy(model).eval()
    reference = [leaf for leaf in tree_leaves(original(*inputs)) if isinstance(leaf, Tensor)]
    graph, skipped = _fused_graph(model, inputs)
    formats = FORMATS if any(value == 4 for value in _dimensions(inputs)) else {"contiguous": torch.contiguous_format}
    stopwatch = Stopwatch(device, remember)
    choices: dict[str, _Choices] = {}
    count = len(formats) * sum(1 for _ in calls(graph, FusedConv2d))
    with tqdm(total=count, desc="timing", disable=not progress, leave=False) as bar:
        for name, memory_format in formats.items():
            choices[name] = _choose(graph, inputs, memory_format, stopwatch, bar)
    stopwatch.save()

    graphs = dict(_candidates(graph, inputs, choices))
    timings = race(
        {name: functools.partial(candidate, *inputs) for name, candidate in graphs.items()},
        rounds=ROUNDS,
        device=device,
        min_seconds=TURN_SECONDS,
        progress="comparing" if progress else None,
    )
    chosen = min(timings, key=lambda name: timings[name].fastest)
    best_dense = min((name for name in timings if name.startswith("dense")), key=lambda name: timings[name].fastest)
    result = graphs[chosen]
    gap = _check(result, original, inputs, reference, dtype)
    memory_format_name = chosen.split()[1]
    result.meta[ACCELERATION] = AccelerationReport(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        memory_format=memory_format_name,
        chosen=chosen,
        seconds={name: timing.fastest for name, timing in timings.items()},
        relative=timings[chosen].relative_to(timings[best_dense]),
        layers=tuple(_as_chosen(choices[memory_format_name], dense=chosen.startswith("dense"))),
        gathers=sum(1 for _ in calls(result, _Gather)),
        difference=gap,
        notes=skipped,
        compiled=getattr(getattr(model, "meta", {}).get(RECORD), "report", None),
    )
    return result


def acceleration_report(accelerated: nn.Module) -> AccelerationReport:
    """Return the report of an accelerated model.

    Raises:
        AccelerationError: the module was not accelerated by fxprune, or lost its report in pickling.
    """
    meta = getattr(accelerated, "meta", None)
    report = meta.get(ACCELERATION) if isinstance(meta, dict) else None
    if not isinstance(report, AccelerationReport):
        raise AccelerationError(
            f"{type(accelerated).__name__} carries no report of an acceleration; pass what fxprune.accelerate returned"
        )
    return report


# --- the graph --------------------------------------------------------------------------------------------------------


class _Entry(nn.Module):
    """What every input passes first: refuses what the model was not made for, and converts the memory format. No
    gradient goes back through it, for the fused operators have none.
    """

    def __init__(self, example: Tensor, channels_last: bool) -> None:
        super().__init__()
        self.device_type = example.device.type
        self.dtype = example.dtype
        self.dimensions = example.dim()
        self.channels_last = channels_last and example.dim() == 4

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise AccelerationError("an accelerated model is for inference; call eval(), or train the pruned model")
        if x.device.type != self.device_type or x.dtype != self.dtype:
            raise AccelerationError(
                f"the model was accelerated for {self.dtype} on {self.device_type}, and the input is {x.dtype} on "
                f"{x.device}; convert it, or accelerate the pruned model there"
            )
        if x.dim() != self.dimensions:
            raise AccelerationError(
                f"the model was accelerated for an input of {self.dimensions} dimensions, and this one has {x.dim()}; "
                "add or remove the batch dimension"
            )
        if self.channels_last:
            return x.detach().contiguous(memory_format=torch.channels_last)
        return x.detach().contiguous()


class _Gather(nn.Module):
    """A gather that keeps the memory format."""

    index: Tensor

    def __init__(self, gather: ChannelGather) -> None:
        super().__init__()
        self.dim = gather.dim
        self.register_buffer("index", gather.index)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and self.dim in (-3, 1):
            return gather_channels(x, self.index)
        return x.index_select(self.dim, self.index)


def _place(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point type of model and inputs."""
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *given]
    devices = {tensor.device for tensor in tensors}
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(devices) != 1 or len(dtypes) != 1:
        found = ", ".join(sorted(map(str, devices | dtypes)))
        raise AccelerationError(
            f"model and example inputs are of several devices or types ({found}); move and convert them to one"
        )
    return devices.pop(), dtypes.pop()


def _dimensions(inputs: tuple[Any, ...]) -> list[int]:
    return [leaf.dim() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _fused_graph(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The model in evaluation mode with `FusedConv2d` in place of its convolutions, and why some were left."""
    record = getattr(model, "meta", {}).get(RECORD)
    gm = copy.deepcopy(model if isinstance(model, fx.GraphModule) else trace(model, inputs).module).eval()
    gm.meta = {}
    meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs)
    FoldBatchNorm()(gm)
    pruned = frozenset(record.plan.layers) if record is not None else frozenset()
    outcome = FuseConvs(meta, pruned, common_block(record.plan) if record is not None else 1)(gm)
    for node in gm.graph.nodes:  # a view of channels_last memory may not exist
        is_view = node.op == "call_method" and node.target == "view" and not node.kwargs
        if is_view and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"
    gm.graph.lint()
    gm.recompile()
    return gm, tuple(f"{skip.node} is not fused: {skip.reason}" for skip in outcome.skipped)


def _build(
    graph: fx.GraphModule, inputs: tuple[Any, ...], choices: Mapping[str, str], memory_format: torch.memory_format
) -> fx.GraphModule:
    """A copy of the graph in which each convolution is computed by the form that `choices` names for its node."""
    forms = {str(form): form for form in _forms()}
    gm = copy.deepcopy(graph)
    for node, conv in calls(gm, FusedConv2d):
        _replace(gm, node, forms[choices[node.name]].build(conv, memory_format))
    for node, gather in calls(gm, ChannelGather):
        _replace(gm, node, _Gather(gather))
    for node, example in zip([n for n in gm.graph.nodes if n.op == "placeholder"], inputs, strict=False):
        if isinstance(example, Tensor) and node.users:
            path = f"entry_{node.name}"
            gm.add_submodule(path, _Entry(example, memory_format == torch.channels_last))
            with gm.graph.inserting_after(node):
                entry = gm.graph.call_module(path, (node,))
            node.replace_all_uses_with(entry, delete_user_cb=lambda user, entry=entry: user is not entry)
    gm.graph.lint()
    gm.recompile()
    return gm.eval().requires_grad_(False)


def _replace(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    parent, _, child = str(node.target).rpartition(".")
    setattr(gm.get_submodule(parent), child, module.eval())


# --- the choices ------------------------------------------------------------------------------------------------------


def _forms() -> Iterator[Form]:
    return (Form(engine, is_dense) for is_dense in (False, True) for engine in ENGINES)


def _choose(
    graph: fx.GraphModule,
    inputs: tuple[Any, ...],
    memory_format: torch.memory_format,
    stopwatch: Stopwatch,
    bar: "tqdm[Any]",
) -> _Choices:
    """Time every form of every convolution at the shapes that the example gives it."""
    seen = operand_shapes(graph, inputs)
    found: _Choices = {}
    for node, conv in calls(graph, FusedConv2d):
        shapes = seen[node.name]
        forms: dict[str, Form] = {}
        obstacles: dict[str, str] = {}
        for form in _forms():
            if not form.is_dense and not conv.dense_groups:
                continue  # what was not pruned has dense forms only
            if reason := form.engine.obstacle(conv, memory_format):
                obstacles[form.engine.name] = reason
            else:
                forms[form_key(form, conv, shapes, memory_format)] = form
        timed = stopwatch.times(forms) or stopwatch.race(form_calls(forms, conv, shapes, memory_format))
        seconds = {str(form): timed[key] for key, form in forms.items()}
        name = str(node.target).removesuffix("_fused")
        chosen = min(seconds, key=seconds.__getitem__)
        found[node.name] = LayerChoice(name, tuple(shapes[0]), chosen, seconds, obstacles)
        bar.update()
    return found


def operand_shapes(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, list[torch.Size]]:
    """Shapes of the input, and of the residual if there is one, of each fused convolution, by name of its node."""
    shapes: dict[str, list[torch.Size]] = {}
    handles = [
        conv.register_forward_pre_hook(
            lambda _, operands, name=node.name: shapes.update({name: [operand.shape for operand in operands]})
        )
        for node, conv in calls(graph, FusedConv2d)
    ]
    graph(*inputs)
    for handle in handles:
        handle.remove()
    return shapes


def form_calls(
    forms: Mapping[str, Form], conv: FusedConv2d, shapes: list[torch.Size], memory_format: torch.memory_format
) -> dict[str, Callable[[], object]]:
    """A call of each form on random inputs, by key."""
    generator = torch.Generator().manual_seed(0)
    operands = [
        torch.randn(shape, generator=generator).to(conv.weight).contiguous(memory_format=memory_format)
        for shape in shapes
    ]
    return {key: functools.partial(form.build(conv, memory_format), *operands) for key, form in forms.items()}


def form_key(form: Form, conv: FusedConv2d, shapes: list[torch.Size], memory_format: torch.memory_format) -> str:
    """All that the time of a form depends on, but for the machine."""
    parts = (
        form, list(conv.weight.shape), conv.groups, conv.stride, conv.padding, conv.dilation, conv.bias is not None,
        0 if conv.index is None else aligned_block(conv.index, conv.weight.shape[1]), conv.order is not None,
        conv.minimum, conv.maximum, [list(s) for s in shapes],
        str(conv.weight.dtype), str(memory_format),
    )  # fmt: skip
    return " ".join(map(str, parts))


def _candidates(
    graph: fx.GraphModule, inputs: tuple[Any, ...], choices: Mapping[str, _Choices]
) -> Iterator[tuple[str, fx.GraphModule]]:
    """The whole graphs worth comparing, by name."""
    totals = {name: sum(layer.seconds[layer.chosen] for layer in found.values()) for name, found in choices.items()}
    dense_totals = {name: sum(layer.dense_seconds for layer in found.values()) for name, found in choices.items()}
    for name, found in choices.items():
        best = {node: layer.chosen for node, layer in found.items()}
        dense = {node: layer.chosen for node, layer in zip(found, _as_chosen(found, dense=True), strict=True)}
        if dense_totals[name] <= MARGIN * min(dense_totals.values()):
            yield f"dense {name}", _build(graph, inputs, dense, FORMATS[name])
        if best != dense and totals[name] <= MARGIN * min(totals.values()):
            yield f"pruned {name}", _build(graph, inputs, best, FORMATS[name])


def _as_chosen(found: _Choices, dense: bool) -> Iterator[LayerChoice]:
    """The choices of a graph: the fastest form of each convolution, or its fastest dense form."""
    for layer in found.values():
        forms = {form: time for form, time in layer.seconds.items() if not dense or form.startswith("dense")}
        chosen = min(forms, key=forms.__getitem__)
        yield LayerChoice(layer.name, layer.input_shape, chosen, layer.seconds, layer.obstacles)


# --- the check --------------------------------------------------------------------------------------------------------


def _check(
    accelerated: nn.Module, original: nn.Module, inputs: tuple[Any, ...], expected: list[Tensor], dtype: torch.dtype
) -> float:
    """The difference that acceleration made, relative to the largest output.

    Raises:
        VerificationError: it is more than rounding.
    """
    found = [leaf for leaf in tree_leaves(accelerated(*inputs)) if isinstance(leaf, Tensor)]
    gap = difference(found, expected)[1]
    is_cuda = any(tensor.is_cuda for tensor in expected)
    limit = TF32_TOLERANCE if is_cuda and dtype == torch.float32 else TOLERANCES.get(dtype, LARGEST_LIMIT)
    if gap > limit:
        shaken = tree_map(lambda leaf: _shaken(leaf, limit / NOISE_MARGIN), inputs)
        moved = [leaf for leaf in tree_leaves(original(*shaken)) if isinstance(leaf, Tensor)]
        limit = max(limit, min(LARGEST_LIMIT, NOISE_MARGIN * difference(moved, expected)[1]))
    if not gap <= limit:
        raise VerificationError(
            f"the accelerated model differs by {gap:.1e} of the largest output (limit {limit:.0e}); "
            "this is a defect of fxprune, please report it with the model"
        )
    return gap


def _shaken(leaf: Any, share: float) -> Any:
    """The input, each number moved by about `share` of itself."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)).to(leaf)
    return leaf * (1 + share * noise)
