"""The inference form of a model for one device: fused, packed, and every choice timed.

1. BatchNorm is folded; gather, convolution, residual add and activation become one `FusedConv2d`.
2. For each memory format, each engine that can compute a convolution is timed, pruned and dense.
3. The best pruned graph and the best dense graph of each format run side by side, and beside them, if asked for, those
   of other runtimes (`runtimes`); the fastest is returned, so the result is never slower than the best dense form.

On CUDA all of these times are those of replayed CUDA graphs, which is how to run what is fast there: called from Python
a small batch takes as long as its launches do, pruned or not.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import fx, nn
from tqdm import tqdm

from fxprune.errors import AccelerationError
from fxprune.exact.record import ACCELERATION, find_record
from fxprune.graph.containers import tensors_in
from fxprune.graph.editing import calls
from fxprune.graph.examples import Inputs, as_inputs
from fxprune.graph.fused import FusedConv2d
from fxprune.graph.gathered import GatheredLayer
from fxprune.graph.tracing import check_is_model
from fxprune.inference.checks import check_same
from fxprune.inference.cuda_graphs import captured
from fxprune.inference.engines import Engine
from fxprune.inference.forms import Choices, all_forms, operand_shapes, time_forms
from fxprune.inference.fused_graph import FormatKeepingGather, fused_graph, with_engines
from fxprune.inference.race import race
from fxprune.inference.reporting import AccelerationReport, LayerChoice
from fxprune.inference.runtimes import AUTO, TORCH, RuntimeModel, TorchModel
from fxprune.inference.runtimes.contest import check_runtime, computed_in, entrants
from fxprune.inference.runtimes.precisions import INT8
from fxprune.inference.runtimes.runtime import Network
from fxprune.inference.stopwatch import Stopwatch
from fxprune.vocabulary import GraphRuntime, Precision, RuntimeName

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

SCRIPTED = " scripted"
"""Ends the name of a graph that TorchScript calls."""

ROUNDS = 9  # of the race between whole graphs
TURN_SECONDS = 0.02  # a turn of it lasts at least about this long
MARGIN = 1.15  # a memory format whose convolutions alone are slower by this factor is not raced


@overload
def accelerate(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    runtime: Literal["torch"] = "torch",
    remember: bool = True,
    progress: bool = False,
) -> fx.GraphModule: ...


@overload
def accelerate(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    runtime: GraphRuntime,
    precision: Precision | None = None,
    remember: bool = True,
    progress: bool = False,
) -> RuntimeModel: ...


@overload
def accelerate(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    runtime: RuntimeName,
    precision: Precision | None = None,
    remember: bool = True,
    progress: bool = False,
) -> fx.GraphModule | RuntimeModel | TorchModel: ...


@torch.no_grad()
def accelerate(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    runtime: RuntimeName = "torch",
    precision: Precision | None = None,
    remember: bool = True,
    progress: bool = False,
) -> fx.GraphModule | RuntimeModel | TorchModel:
    """Return the fastest inference form of a model on the device where it is.

    Args:
        model: what `fxprune.compile`, `rewrite` or `load` returned; also any other traceable model, which becomes the
            best dense form of itself: the opponent to compare with. It is not changed.
        example_inputs: positional arguments of forward, with the sizes to be fast for. Other batch and image sizes work
            too; the choices were timed for these. Other runtimes than `"torch"` take other batch sizes only.
        runtime: what shall run it. `"torch"`: PyTorch, each layer in the fastest engine. `"inductor"`, `"onnxruntime"`,
            `"openvino"`: that runtime, which is installed with `fxprune[onnx]` or `fxprune[openvino]`; on the CPU, and
            but for Inductor in float32. `"tensorrt"`: refused, fxprune does not run it yet. `"auto"`: all of these that
            are here, and the fastest is returned.
        precision: what the runtime shall compute a float32 model in: `"bfloat16"` with `runtime="openvino"`, on
            processors that have it; inputs and results are float32 all the same. None is the type of the model, and so
            in PyTorch a model in bfloat16 is computed in bfloat16. Integers are made by `fxprune.quantize`.
        remember: keep measured times of layers in the cache folder (`FXPRUNE_CACHE`, default `~/.cache/fxprune`), and
            use those that are there.
        progress: show bars on stderr.

    Returns:
        A `GraphModule` for evaluation on this device and in this type. With another runtime a module that is called as
        the model is, says what it is when printed, and has `save(path)`, which writes what the runtime needs, see
        `fxprune.inference.runtimes.model`; it runs with as many threads as torch is set to when it is called.
        `fxprune.acceleration_report` explains either.

    Raises:
        AccelerationError: the model and the inputs are not on one device or not of one floating-point type, or the
            model was accelerated before; or the runtime is not installed, or cannot take the model.
        TraceError: the model cannot be traced.
        VerificationError: the result differs from the model.
    """
    check_is_model(model)
    inputs = as_inputs(example_inputs, model)
    if ACCELERATION in getattr(model, "meta", {}):
        raise AccelerationError("the model is accelerated already; pass what it was made from")
    if any(isinstance(layer, GatheredLayer) for layer in model.modules()):
        raise AccelerationError(
            f"{type(model).__name__} is the model's own module with gathers inside its layers, and only a graph can be "
            "accelerated; compile with output='graph' if the model can be traced"
        )
    device, dtype = _place(model, inputs)
    if precision == INT8:
        raise AccelerationError(
            "precision='int8' needs data to measure the ranges of activations on: fxprune.quantize(fxprune.accelerate("
            "model, x, runtime=...), images)"
        )
    check_runtime(runtime, device, dtype, precision)
    original = copy.deepcopy(model).eval()
    reference = tensors_in(original(*inputs))
    graph, skipped = fused_graph(model, inputs)
    stopwatch = Stopwatch(device, remember)
    choices = _choices(graph, inputs, stopwatch, progress) if runtime in (TORCH, AUTO) else {}
    network = Network(graph, inputs, stopwatch, progress)
    others, absent, remarks = entrants(runtime, network, original, reference, dtype, precision)
    stopwatch.save()

    in_torch = dict(_candidates(graph, inputs, choices))
    graphs: dict[str, Any] = {**in_torch, **others}
    if runtime == AUTO:
        scripted, unscripted = _scripted(in_torch)
        graphs |= scripted
        skipped += unscripted
    timings = race(
        replayed({name: functools.partial(candidate, *inputs) for name, candidate in graphs.items()}, device),
        rounds=ROUNDS,
        device=device,
        min_seconds=TURN_SECONDS,
        progress="comparing" if progress else None,
    )
    chosen = min(timings, key=lambda name: timings[name].fastest)
    best_dense = min((name for name in timings if name.startswith("dense")), key=lambda name: timings[name].fastest)
    result = graphs[chosen]
    if runtime == AUTO and isinstance(result, fx.GraphModule):
        result = TorchModel(result)
    gap = check_same(result, original, inputs, reference, computed_in(dtype, precision))
    of_torch = in_torch.get(chosen.removesuffix(SCRIPTED))
    memory_format_name = "own" if of_torch is None else chosen.split()[1]
    is_dense = chosen.startswith("dense")
    layers = result.layers if of_torch is None else _layers(choices[memory_format_name], is_dense)
    result.meta[ACCELERATION] = AccelerationReport(
        device=str(device),
        dtype=precision or str(dtype).removeprefix("torch."),
        memory_format=memory_format_name,
        chosen=chosen,
        seconds={name: timing.fastest for name, timing in timings.items()},
        relative=timings[chosen].fastest / timings[best_dense].fastest,
        spread={name: timing.spread for name, timing in timings.items()},
        layers=layers,
        gathers=result.gathers if of_torch is None else sum(1 for _ in calls(of_torch, FormatKeepingGather)),
        difference=gap,
        notes=skipped + remarks,
        compiled=getattr(find_record(model), "report", None),
        runtime=result.runtime if of_torch is None else TORCH,
        absent=absent,
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


def replayed(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, Callable[[], Any]]:
    """On CUDA the calls as CUDA graphs, if all of them can be captured; elsewhere the calls."""
    if device.type != "cuda":
        return dict(calls)
    try:
        return {name: captured(call) for name, call in calls.items()}
    except RuntimeError:  # the model reads values back from the device
        return dict(calls)


def _place(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point type of model and inputs."""
    own, given = [*model.parameters(), *model.buffers()], tensors_in(inputs)
    devices = {tensor.device for tensor in (*own, *given)}
    dtypes = {tensor.dtype for tensor in (*own, *given) if tensor.is_floating_point()}
    if len(devices) != 1 or len(dtypes) != 1:
        found = ", ".join(sorted(map(str, devices | dtypes)))
        raise AccelerationError(
            f"model and example inputs are of several devices or types ({found}): the model {_of(own)}, the inputs "
            f"{_of(given)}; move and convert them to one"
        )
    return devices.pop(), dtypes.pop()


def _of(tensors: Iterable[torch.Tensor]) -> str:
    """Types and devices of tensors, in words."""
    found = {f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors if t.is_floating_point()}
    return " and ".join(sorted(found)) or "has none"


def _choices(
    graph: fx.GraphModule, inputs: tuple[Any, ...], stopwatch: Stopwatch, progress: bool
) -> dict[str, Choices]:
    """The fastest engine of each layer, by memory format."""
    formats = FORMATS if any(value == 4 for value in _dimensions(inputs)) else {"contiguous": torch.contiguous_format}
    choices: dict[str, Choices] = {}
    shapes = operand_shapes(graph, inputs)
    with tqdm(total=len(formats) * len(shapes), desc="timing", disable=not progress, leave=False) as bar:
        for name, memory_format in formats.items():
            choices[name] = time_forms(graph, shapes, memory_format, stopwatch, bar)
    return choices


def _dimensions(inputs: tuple[Any, ...]) -> list[int]:
    return [tensor.dim() for tensor in tensors_in(inputs)]


def _candidates(
    graph: fx.GraphModule, inputs: tuple[Any, ...], choices: Mapping[str, Choices]
) -> Iterator[tuple[str, fx.GraphModule]]:
    """The whole graphs worth comparing, by name."""
    totals = {name: sum(layer.seconds[layer.chosen] for layer in found.values()) for name, found in choices.items()}
    dense_totals = {name: sum(layer.dense_seconds for layer in found.values()) for name, found in choices.items()}
    for name, found in choices.items():
        best, dense = _layers(found, dense=False), _layers(found, dense=True)
        if dense_totals[name] <= MARGIN * min(dense_totals.values()):
            engines = _engines(graph, dense, FORMATS[name])
            yield f"dense {name}", with_engines(graph, inputs, engines, FORMATS[name])
        if best != dense and totals[name] <= MARGIN * min(totals.values()):
            engines = _engines(graph, best, FORMATS[name])
            yield f"pruned {name}", with_engines(graph, inputs, engines, FORMATS[name])


def _scripted(graphs: Mapping[str, fx.GraphModule]) -> tuple[dict[str, TorchModel], tuple[str, ...]]:
    """The same called by TorchScript, and what it cannot take."""
    found: dict[str, TorchModel] = {}
    refused = []
    for name, graph in graphs.items():
        try:
            found[f"{name}{SCRIPTED}"] = TorchModel(graph, scripted=True)
        except AccelerationError as error:
            refused.append(f"{name}: {error}")
    return found, tuple(refused)


def _layers(found: Choices, dense: bool) -> tuple[LayerChoice, ...]:
    """The choices of a whole graph: the fastest form of each convolution, or its fastest dense form."""
    return tuple(replace(layer, chosen=layer.dense_form) if dense else layer for layer in found.values())


def _engines(
    graph: fx.GraphModule, choices: Iterable[LayerChoice], memory_format: torch.memory_format
) -> dict[str, Engine]:
    """The engines of the chosen forms, by name of the graph node."""
    forms = {str(form): form for form in all_forms()}
    convs = calls(graph, FusedConv2d)
    return {
        node.name: forms[choice.chosen].build(conv, memory_format)
        for (node, conv), choice in zip(convs, choices, strict=True)
    }
