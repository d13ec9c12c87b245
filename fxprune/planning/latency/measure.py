"""Measure how long each convolution of a network takes, dense, pruned and narrower, at the input size that it has
there, in PyTorch or in another runtime.
"""

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.channels.units import STAYS, ChannelUnits
from fxprune.environment import environment
from fxprune.graph.editing import calls
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.acceleration import acceleration_report
from fxprune.inference.engines import Engine
from fxprune.inference.forms import operand_shapes
from fxprune.inference.fused_graph import fused_graph
from fxprune.inference.race import race
from fxprune.inference.runtimes.onnx_based import OnnxBased
from fxprune.inference.stopwatch import Stopwatch
from fxprune.planning.latency.grid import LayerGrid, widths
from fxprune.planning.latency.layers import InRuntime, InTorch, Timekeeper, Variant, layers_in, timed
from fxprune.planning.latency.network import WholeNetwork
from fxprune.planning.latency.table import LatencyOption, LatencyTable, LayerLatency, setting
from fxprune.plans.shapes import BLOCKS, Shape, choose_shape

# What is timed: these ratios, and of a number of groups n also 1 - 1/n, the partition form. More groups than 8 leave
# few layers that are wide enough to gain.
RATIOS = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
GROUP_COUNTS = (2, 4, 8)
ROUNDS = 15  # of the whole network against what is not in the table
LANES = {"AVX512": 16}  # float32 numbers in a register, by the instructions that PyTorch uses; else 8, or fewer
MOST_REST = 0.99  # noise must not leave the layers without time


@dataclass(frozen=True)
class Wanted:
    """What is to be timed of a network.

    Attributes:
        counts: numbers of groups to try, by the name of each convolution of which kernels can go.
        units: the filters that can go; None if none shall.
        lanes: how many channels the processor computes at once.
    """

    counts: Mapping[str, Collection[int]] = field(default_factory=dict)
    units: ChannelUnits | None = None
    lanes: int = field(default_factory=lambda: LANES.get(torch.backends.cpu.get_cpu_capability(), 8))

    @property
    def names(self) -> Collection[str]:
        """The convolutions to time."""
        return {**self.counts, **{name: () for name in self.narrower}}

    @functools.cached_property
    def narrower(self) -> dict[str, tuple[bool, bool]]:
        """Whether inputs, and whether filters can go, by the name of each layer of which some can."""
        layers = {} if self.units is None else self.units.layers
        sides = {
            name: (layer.reads is not None and bool((layer.reads != STAYS).any()), bool((layer.writes != STAYS).any()))
            for name, layer in layers.items()
        }
        return {name: both for name, both in sides.items() if any(both)}


@torch.no_grad()
def measure_layers(network: WholeNetwork, wanted: Wanted) -> LatencyTable:
    """Time the dense network and every option of every convolution, each in its fastest form.

    A time depends on shapes, not on numbers: the pruned layers get random weights and random kept channels. In
    partition form they read their channels in order, and in both forms write them in order, because the passes leave
    few other gathers.

    Args:
        network: dense, on the device to measure, in PyTorch or a runtime that reads ONNX.
        wanted: what is timed.

    Raises:
        PlanError: layers cannot be timed in the runtime.
        AccelerationError: see `fxprune.accelerate`.
    """
    model, inputs, runtime = network.model, network.inputs, network.runtime
    other = layers_in(runtime, network.precision)
    dense = acceleration_report(network.dense)
    graph, _ = fused_graph(model, inputs)
    shapes = operand_shapes(graph, inputs)
    stopwatch = Stopwatch(torch.device(dense.device))
    # A format whose dense convolutions are far slower was not raced, and is not worth timing here either.
    keepers: dict[str, Timekeeper] = (
        {dense.memory_format: InRuntime(other)}
        if other is not None
        else {name.split()[1]: InTorch(name.split()[1]) for name in dense.seconds}
    )
    sites = [_Site(name, conv, shapes[node.name]) for node, conv, name in _sites(graph, wanted.names)]
    found: dict[str, _Times] = {name: _Times() for name in keepers}
    for site in network.each(sites):
        for memory_format, times in site.times(wanted, keepers, stopwatch).items():
            found[memory_format].add(times)
    stopwatch.save()
    whole = dense.seconds[dense.chosen]
    if sites and other is not None:
        whole = _whole_by_layers(network.dense, inputs, InRuntime(other), sites, stopwatch)
    elif sites:
        assert isinstance(network.dense, fx.GraphModule)
        whole = found[dense.memory_format].dense / (1 - _rest_share(network.dense, inputs, wanted.names))
    device, dtype, input_shapes = setting(model, inputs, network.precision)
    tables = []
    for name, times in found.items():
        slower = 1.0 if name == dense.memory_format else dense.seconds[f"dense {name}"] / dense.seconds[dense.chosen]
        rest = whole * slower - sum(layer.seconds for layer in times.layers.values())
        tables.append(
            LatencyTable(
                device,
                dtype,
                name,
                input_shapes,
                whole,
                max(0.0, rest),
                tuple(times.layers.values()),
                runtime=runtime,
                grids=tuple(times.grids.values()),
                lanes=wanted.lanes,
                made=_made(runtime, other),
            )
        )
    return min(tables, key=lambda table: (table.least, table.rest))


@dataclass
class _Times:
    """What was found of some layers.

    Attributes:
        dense: seconds of all of them, dense.
        layers, grids: by name.
    """

    dense: float = 0.0
    layers: dict[str, LayerLatency] = field(default_factory=dict)
    grids: dict[str, LayerGrid] = field(default_factory=dict)

    def add(self, other: "_Times") -> None:
        """Take in what was found of other calls."""
        self.dense += other.dense
        for name, layer in other.layers.items():
            self.layers[name] = _sum(self.layers[name], layer) if name in self.layers else layer
        for name, grid in other.grids.items():
            self.grids[name] = self.grids[name] + grid if name in self.grids else grid


@dataclass(frozen=True)
class _Site:
    """One call of a convolution.

    Attributes:
        name: module path of the convolution.
        conv: with what is fused into it.
        shapes: of its operands.
    """

    name: str
    conv: FusedConv2d
    shapes: list[torch.Size]

    def times(self, wanted: Wanted, keepers: Mapping[str, Timekeeper], stopwatch: Stopwatch) -> dict[str, _Times]:
        """Seconds of it and all its options, by memory format, in one race."""
        options = list(_options(self.conv, wanted.counts[self.name])) if self.name in wanted.counts else []
        grouped = [Variant(_pruned(self.conv, shape), self.shapes, is_grouped=True) for _, shape in options]
        inputs, filters = self._widths(*wanted.narrower.get(self.name, (False, False)), wanted.lanes)
        narrower = [self._narrowed(reads, writes) for reads in inputs for writes in filters]
        every = timed([Variant(self.conv, self.shapes), *grouped, *narrower], list(keepers.values()), stopwatch)
        found = {}
        for memory_format, (dense, *seconds) in zip(keepers, every, strict=True):
            times = found[memory_format] = _Times(dense)
            pruned, narrow = seconds[: len(options)], seconds[len(options) :]
            if self.name in wanted.counts:
                taken = (
                    LatencyOption(shape.form, shape.groups, shape.kept, ratio, time)
                    for (ratio, shape), time in zip(options, pruned, strict=True)
                )
                layer = LayerLatency(self.name, self.conv.out_channels, self.conv.channels, dense, tuple(taken))
                times.layers[self.name] = layer
            if self.name in wanted.narrower:
                size = len(filters)
                rows = tuple(tuple(narrow[row * size : (row + 1) * size]) for row in range(len(inputs)))
                times.grids[self.name] = LayerGrid(self.name, inputs, filters, rows)
        return found

    def _widths(self, inputs: bool, filters: bool, lanes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers of inputs and of filters to time it with."""
        if not inputs and not filters:
            return (), ()
        return (
            widths(self.conv.channels, lanes) if inputs else (self.conv.channels,),
            tuple(count for count in widths(self.conv.out_channels, lanes) if count % self._each == 0)
            if filters
            else (self.conv.out_channels,),
        )

    @property
    def _each(self) -> int:
        """Filters of one input channel, if it is depthwise; 1 otherwise."""
        return self.conv.out_channels // self.conv.groups if self.conv.groups > 1 else 1

    def _narrowed(self, inputs: int, filters: int) -> Variant:
        """It with its first inputs and filters."""
        narrow = self.conv.copy()
        if self.conv.groups > 1:
            narrow.groups = inputs = filters // self._each
        narrow.channels, narrow.out_channels = inputs, filters
        narrow.weight = self.conv.weight[:filters, : inputs // narrow.groups].clone()
        narrow.bias = None if self.conv.bias is None else self.conv.bias[:filters].clone()
        channels = (inputs, filters)
        return Variant(narrow, [torch.Size((s[0], c, *s[2:])) for s, c in zip(self.shapes, channels, strict=False)])


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


def _whole_by_layers(
    network: nn.Module, inputs: tuple[Any, ...], keeper: InRuntime, sites: Sequence[_Site], stopwatch: Stopwatch
) -> float:
    """Seconds of a network in a runtime, as they were when its layers were timed: it races against all of them, one
    after the other. A runtime shows no part of a network alone, so that the rest cannot be timed as in PyTorch.
    """
    variants = [Variant(site.conv, site.shapes) for site in sites]
    keys = {key for variant in variants for key in keeper.keys(variant)}
    known = stopwatch.times(keys) or {}
    layers: dict[str, Callable[[], object]] = {}
    for variant in variants:
        (key, *_) = keeper.keys(variant)
        if key not in layers:
            layers[key] = keeper.calls(variant)[key]
    order = [keeper.keys(variant)[0] for variant in variants]

    def one_by_one() -> None:
        for key in order:
            layers[key]()

    timings = race(
        {"network": functools.partial(network, *inputs), "layers": one_by_one},
        rounds=ROUNDS,
        device=torch.device("cpu"),
    )
    together = sum(keeper.whole(variant, known) for variant in variants)
    return together * timings["network"].relative_to(timings["layers"])


def _made(runtime: str, other: OnnxBased | None) -> dict[str, Any]:
    """Where and when the times were measured, and with what."""
    version = {} if other is None else {runtime: other.program.version()}
    return environment() | version


def _sites(graph: fx.GraphModule, names: Collection[str]) -> Iterator[tuple[fx.Node, FusedConv2d, str]]:
    """The calls of the convolutions of these names."""
    for node, conv in calls(graph, FusedConv2d):
        if name := _name(node, names):
            yield node, conv, name


def _name(node: fx.Node, names: Collection[str]) -> str | None:
    """Which of `names` a fused convolution was before; called twice, a convolution becomes two, the second numbered."""
    name, _, number = str(node.target).rpartition("_fused")
    return name if name in names and number.strip("_0123456789") == "" else None


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
