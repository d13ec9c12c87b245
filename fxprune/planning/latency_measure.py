"""Measure how long each convolution of a network takes, dense and pruned, at the input size that it has there."""

import copy
import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.acceleration import FORMATS, accelerate, acceleration_report
from fxprune.inference.engines import ENGINES, Engine
from fxprune.inference.forms import Form, form_calls, form_key, operand_shapes
from fxprune.inference.fused_graph import fused_graph
from fxprune.inference.race import race
from fxprune.inference.stopwatch import Stopwatch
from fxprune.planning.latency_table import LatencyOption, LatencyTable, LayerLatency, setting
from fxprune.plans.shapes import BLOCKS, Shape, choose_shape

# What is timed: these ratios, and of a number of groups n also 1 - 1/n, the partition form. More groups than 8 leave
# few layers that are wide enough to gain.
RATIOS = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
GROUP_COUNTS = (2, 4, 8)
ROUNDS = 15  # of the whole network against what is not in the table
MOST_REST = 0.99  # noise must not leave the layers without time


@torch.no_grad()
def measure_layers(
    model: nn.Module, inputs: tuple[Any, ...], counts: Mapping[str, Collection[int]], *, progress: bool = False
) -> LatencyTable:
    """Time the dense network and every option of every convolution, each in its fastest engine.

    A time depends on shapes, not on numbers: the pruned layers get random weights and random kept channels. In
    partition form they read their channels in order, and in both forms write them in order, because the passes leave
    few other gathers.

    Args:
        model: dense, on the device to measure.
        inputs: arguments of forward, of the sizes to measure.
        counts: numbers of groups to try, by the name of each convolution that can be pruned.
        progress: show bars on stderr.

    Raises:
        AccelerationError: see `fxprune.accelerate`.
    """
    network = accelerate(model, inputs, progress=progress)
    dense = acceleration_report(network)
    graph, _ = fused_graph(model, inputs)
    shapes = operand_shapes(graph, inputs)
    device, dtype, input_shapes = setting(model, inputs)
    stopwatch = Stopwatch(torch.device(dense.device))
    # A format whose dense convolutions are far slower was not raced, and is not worth timing here either.
    formats = [name.split()[1] for name in dense.seconds]
    sites = [(name, node, conv) for node, conv in calls(graph, FusedConv2d) if (name := _name(node, counts))]
    layers: dict[str, dict[str, LayerLatency]] = {name: {} for name in formats}
    for name, node, conv in tqdm(sites, desc="timing", unit="conv", disable=not progress):
        for memory_format, found in _time(name, conv, counts[name], shapes[node.name], formats, stopwatch).items():
            timed = layers[memory_format]
            timed[name] = _sum(timed[name], found) if name in timed else found
    stopwatch.save()
    convs = {name: sum(layer.seconds for layer in timed.values()) for name, timed in layers.items()}
    whole = dense.seconds[dense.chosen]
    if sites:
        whole = convs[dense.memory_format] / (1 - _rest_share(network, inputs, counts))
    tables = []
    for name, timed in layers.items():
        rest = whole * dense.seconds[f"dense {name}"] / dense.seconds[dense.chosen] - convs[name]
        tables.append(LatencyTable(device, dtype, name, input_shapes, whole, max(0.0, rest), tuple(timed.values())))
    return min(tables, key=lambda table: table.least)


class _Known(nn.Module):
    """A layer whose output is known beforehand: it takes no time."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *operands: Tensor) -> Tensor:
        return self.output


def _rest_share(network: fx.GraphModule, inputs: tuple[Any, ...], names: Collection[str]) -> float:
    """The share of the time of an accelerated network that remains if some of its convolutions take none.

    Seconds that were measured at different times cannot be subtracted: the machine may have been busier. A share of
    neighbouring rounds can be trusted.
    """
    rest = copy.deepcopy(network)
    outputs: dict[str, Tensor] = {}
    for node, engine in calls(rest, Engine):
        if _name(node, names):
            path = str(node.target)
            engine.register_forward_hook(lambda _, operands, output, path=path: outputs.update({path: output}))
    rest(*inputs)
    for path, output in outputs.items():
        rest.add_submodule(path, _Known(output.clone()))
    timings = race(
        {"network": functools.partial(network, *inputs), "rest": functools.partial(rest, *inputs)},
        rounds=ROUNDS,
        device=next(iter(outputs.values())).device,
    )
    return min(MOST_REST, timings["rest"].relative_to(timings["network"]))


def _name(node: fx.Node, names: Collection[str]) -> str | None:
    """Which of `names` a fused convolution was before; called twice, a convolution becomes two, the second numbered."""
    name, _, number = str(node.target).rpartition("_fused")
    return name if name in names and number.strip("_0123456789") == "" else None


def _time(
    name: str,
    conv: FusedConv2d,
    counts: Collection[int],
    shapes: list[torch.Size],
    formats: Collection[str],
    stopwatch: Stopwatch,
) -> dict[str, LayerLatency]:
    """Time one call of a convolution and all its options, by memory format, in one race."""
    options = list(_options(conv, counts))
    variants = [conv, *(_pruned(conv, shape) for _, shape in options)]
    forms = {
        memory_format: [
            _forms(variant, shapes, FORMATS[memory_format], is_dense=variant is conv) for variant in variants
        ]
        for memory_format in formats
    }
    seconds = stopwatch.times(key for tried in forms.values() for keys in tried for key in keys)
    if seconds is None:
        seconds = stopwatch.race(
            {
                key: call
                for memory_format, tried in forms.items()
                for variant, keys in zip(variants, tried, strict=True)
                for key, call in form_calls(keys, variant, shapes, FORMATS[memory_format]).items()
            }
        )
    found = {}
    for memory_format, tried in forms.items():
        dense, *pruned = (min(seconds[key] for key in keys) for keys in tried)
        timed = (
            LatencyOption(shape.form, shape.groups, shape.kept, ratio, time)
            for (ratio, shape), time in zip(options, pruned, strict=True)
        )
        found[memory_format] = LayerLatency(name, conv.out_channels, conv.channels, dense, tuple(timed))
    return found


def _forms(
    conv: FusedConv2d, shapes: list[torch.Size], memory_format: torch.memory_format, is_dense: bool
) -> dict[str, Form]:
    """The ways to compute a convolution, by key."""
    forms = (Form(engine, is_dense) for engine in ENGINES if not engine.obstacle(conv, memory_format))
    return {form_key(form, conv, shapes, memory_format): form for form in forms}


def _options(conv: FusedConv2d, counts: Collection[int]) -> Iterator[tuple[float, Shape]]:
    """Each ratio and shape that is legal, once."""
    device = conv.weight.device.type
    legal = [groups for groups in counts if conv.out_channels % groups == 0]
    ratios = sorted({*RATIOS, *(1 - 1 / groups for groups in legal if groups > 1)})
    seen = set()
    for groups in legal:
        for ratio in ratios:
            for form in ("overlap", "auto"):  # auto is partition where that is possible, else overlap again
                shape = choose_shape(conv.out_channels, conv.channels, ratio, groups, form, BLOCKS[device], device)
                if not isinstance(shape, str) and shape[:3] not in seen:
                    seen.add(shape[:3])
                    yield ratio, shape


def _pruned(conv: FusedConv2d, shape: Shape) -> FusedConv2d:
    """The convolution as it will be, with random weights and random kept channels."""
    generator = torch.Generator().manual_seed(0)
    pruned = conv.copy()
    pruned.groups, pruned.dense_groups = shape.groups, 1
    weight = torch.randn(conv.out_channels, shape.kept, *conv.kernel_size, generator=generator)
    pruned.weight = weight.to(conv.weight)
    if shape.form == "overlap":
        order = torch.rand(shape.groups, conv.channels // shape.block, generator=generator).argsort(1)
        blocks = order[:, : shape.kept // shape.block].sort(1).values
        index = blocks[..., None] * shape.block + torch.arange(shape.block)
        pruned.index = index.flatten().to(conv.weight.device)
    return pruned


def _sum(first: LayerLatency, second: LayerLatency) -> LayerLatency:
    """The times of two calls of one convolution."""
    pairs = zip(first.options, second.options, strict=True)
    options = tuple(replace(mine, seconds=mine.seconds + other.seconds) for mine, other in pairs)
    return replace(first, seconds=first.seconds + second.seconds, options=options)
