"""Measure how long each convolution of a network takes, dense and pruned, at the input size that it has there."""

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from fxprune.acceleration import FORMATS, Form, accelerate, acceleration_report, form_calls, form_key, operand_shapes
from fxprune.engines import ENGINES
from fxprune.fused import FusedConv2d
from fxprune.latency import LatencyOption, LatencyTable, LayerLatency, setting
from fxprune.measurements import Stopwatch
from fxprune.passes import FoldBatchNorm, FuseConvs
from fxprune.rewriting import calls
from fxprune.shapes import BLOCKS, Shape, choose_shape
from fxprune.timing import race
from fxprune.tracing import trace

# What is timed: these ratios, and of a number of groups n also 1 - 1/n, the partition form. More groups than 8 leave
# few layers that are wide enough to gain.
RATIOS = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
GROUP_COUNTS = (2, 4, 8)
ROUNDS = 15  # of the whole network against its convolutions


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
    graph = _fused(model, inputs)
    shapes = operand_shapes(graph, inputs)
    device, dtype, input_shapes = setting(model, inputs)
    stopwatch = Stopwatch(torch.device(dense.device))
    # A format whose dense convolutions are far slower was not raced, and is not worth timing here either.
    formats = [name.split()[1] for name in dense.seconds]
    sites = [(name, node, conv) for node, conv in calls(graph, FusedConv2d) if (name := _name(node, counts))]
    layers: dict[str, dict[str, LayerLatency]] = {name: {} for name in formats}
    with tqdm(total=len(formats) * len(sites), desc="timing", unit="conv", disable=not progress) as bar:
        for memory_format, timed in layers.items():
            for name, node, conv in sites:
                found = _time(name, conv, counts[name], shapes[node.name], FORMATS[memory_format], stopwatch)
                timed[name] = _sum(timed[name], found) if name in timed else found
                bar.update()
    stopwatch.save()
    convs = {name: sum(layer.seconds for layer in timed.values()) for name, timed in layers.items()}
    best, format_ = dense.memory_format, FORMATS[dense.memory_format]
    whole = dense.seconds[dense.chosen]
    if sites:
        alone = [_fastest_dense(conv, shapes[node.name], format_, stopwatch) for _, node, conv in sites]
        whole = convs[best] / _share(network, inputs, alone)
    tables = []
    for name, timed in layers.items():
        rest = whole * dense.seconds[f"dense {name}"] / dense.seconds[dense.chosen] - convs[name]
        tables.append(LatencyTable(device, dtype, name, input_shapes, whole, max(0.0, rest), tuple(timed.values())))
    return min(tables, key=lambda table: table.least)


def _share(network: nn.Module, inputs: tuple[Any, ...], alone: Sequence[Callable[[], object]]) -> float:
    """The share of the time of a network that some of its layers take, when called one after the other.

    Seconds that were measured at different times cannot be subtracted: the machine may have been busier. A share of
    neighbouring rounds can be trusted.
    """

    def layers() -> None:
        for call in alone:
            call()

    timings = race(
        {"network": functools.partial(network, *inputs), "layers": layers},
        rounds=ROUNDS,
        device=next(leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)),
    )
    return min(1.0, timings["layers"].relative_to(timings["network"]))


def _fused(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    """The model in evaluation mode with `FusedConv2d` in place of its convolutions."""
    gm = copy.deepcopy(trace(model, inputs).module).eval()
    FoldBatchNorm()(gm)
    FuseConvs(tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs))(gm)
    gm.recompile()
    return gm


def _name(node: fx.Node, names: Collection[str]) -> str | None:
    """Which of `names` a fused convolution was before; called twice, a convolution becomes two, the second numbered."""
    name, _, number = str(node.target).rpartition("_fused")
    return name if name in names and number.strip("_0123456789") == "" else None


def _time(
    name: str,
    conv: FusedConv2d,
    counts: Collection[int],
    shapes: list[torch.Size],
    memory_format: torch.memory_format,
    stopwatch: Stopwatch,
) -> LayerLatency:
    """Time one call of a convolution and all its options, in one race."""
    options = list(_options(conv, counts))
    variants = [conv, *(_pruned(conv, shape) for _, shape in options)]
    forms = [_forms(variant, shapes, memory_format, is_dense=variant is conv) for variant in variants]
    seconds = stopwatch.times(key for keys in forms for key in keys)
    if seconds is None:
        seconds = stopwatch.race(
            {
                key: call
                for variant, keys in zip(variants, forms, strict=True)
                for key, call in form_calls(keys, variant, shapes, memory_format).items()
            }
        )
    dense, *pruned = (min(seconds[key] for key in keys) for keys in forms)
    timed = (
        LatencyOption(shape.form, shape.groups, shape.kept, ratio, time)
        for (ratio, shape), time in zip(options, pruned, strict=True)
    )
    return LayerLatency(name, conv.out_channels, conv.channels, dense, tuple(timed))


def _forms(
    conv: FusedConv2d, shapes: list[torch.Size], memory_format: torch.memory_format, is_dense: bool
) -> dict[str, Form]:
    """The ways to compute a convolution, by key."""
    forms = (Form(engine, is_dense) for engine in ENGINES if not engine.obstacle(conv, memory_format))
    return {form_key(form, conv, shapes, memory_format): form for form in forms}


def _fastest_dense(
    conv: FusedConv2d, shapes: list[torch.Size], memory_format: torch.memory_format, stopwatch: Stopwatch
) -> Callable[[], object]:
    """A call of a convolution that was timed, in its fastest dense form."""
    forms = _forms(conv, shapes, memory_format, is_dense=True)
    seconds = stopwatch.times(forms)
    assert seconds is not None
    key = min(seconds, key=seconds.__getitem__)
    return form_calls({key: forms[key]}, conv, shapes, memory_format)[key]


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
