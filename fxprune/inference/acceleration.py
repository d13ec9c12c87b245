"""The inference form of a model for one device: fused, packed, and every choice timed.

1. BatchNorm is folded; gather, convolution, residual add and activation become one `FusedConv2d`.
2. For each memory format, each engine that can compute a convolution is timed, pruned and dense.
3. The best pruned graph and the best dense graph of each format run side by side; the fastest is returned, so the
   result is never slower than the best dense form.
"""

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from fxprune.errors import AccelerationError, VerificationError
from fxprune.exact.record import ACCELERATION, find_record
from fxprune.exact.verification import difference
from fxprune.graph.containers import tensors_in
from fxprune.graph.editing import calls
from fxprune.graph.examples import Inputs, as_inputs
from fxprune.graph.fused import FusedConv2d
from fxprune.graph.gathered import GatheredLayer
from fxprune.graph.tracing import check_is_model
from fxprune.inference.engines import Engine
from fxprune.inference.forms import Choices, all_forms, operand_shapes, time_forms
from fxprune.inference.fused_graph import FormatKeepingGather, fused_graph, with_engines
from fxprune.inference.race import race
from fxprune.inference.reporting import AccelerationReport, LayerChoice
from fxprune.inference.stopwatch import Stopwatch

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
    original = copy.deepcopy(model).eval()
    reference = tensors_in(original(*inputs))
    graph, skipped = fused_graph(model, inputs)
    formats = FORMATS if any(value == 4 for value in _dimensions(inputs)) else {"contiguous": torch.contiguous_format}
    stopwatch = Stopwatch(device, remember)
    choices: dict[str, Choices] = {}
    shapes = operand_shapes(graph, inputs)
    with tqdm(total=len(formats) * len(shapes), desc="timing", disable=not progress, leave=False) as bar:
        for name, memory_format in formats.items():
            choices[name] = time_forms(graph, shapes, memory_format, stopwatch, bar)
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
        relative=timings[chosen].fastest / timings[best_dense].fastest,
        spread={name: timing.spread for name, timing in timings.items()},
        layers=_layers(choices[memory_format_name], dense=chosen.startswith("dense")),
        gathers=sum(1 for _ in calls(result, FormatKeepingGather)),
        difference=gap,
        notes=skipped,
        compiled=getattr(find_record(model), "report", None),
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


def _place(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point type of model and inputs."""
    given = tensors_in(inputs)
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


def _check(
    accelerated: nn.Module, original: nn.Module, inputs: tuple[Any, ...], expected: list[Tensor], dtype: torch.dtype
) -> float:
    """The difference that acceleration made, relative to the largest output.

    Raises:
        VerificationError: it is more than rounding.
    """
    found = tensors_in(accelerated(*inputs))
    gap = difference(found, expected)[1]
    is_cuda = any(tensor.is_cuda for tensor in expected)
    limit = TF32_TOLERANCE if is_cuda and dtype == torch.float32 else TOLERANCES.get(dtype, LARGEST_LIMIT)
    if gap > limit:
        shaken = tree_map(lambda leaf: _shaken(leaf, limit / NOISE_MARGIN), inputs)
        moved = tensors_in(original(*shaken))
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
