"""The convolutions of a network one by one: where pruning saves the time that it promises, and where not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxprune.comparison.layer_calls import input_shapes
from fxprune.comparison.rivals import Network
from fxprune.comparison.runtimes import RUNTIMES, Call, prepare
from fxprune.graph.convolutions import Convolution
from fxprune.graph.editing import calls
from fxprune.graph.layers import ChannelGather
from fxprune.inference.race import Timing, race

WARMUP = 3
MIN_SECONDS = 0.005
"""A turn lasts at least about this long; shorter than those of whole networks, for there are many layers."""


@dataclass(frozen=True)
class LayerRow:
    """One convolution, dense and grouped, at its real input shape; each in its faster layout.

    Attributes:
        name: module path.
        ratio: what fxprune was asked to prune.
        batch: images at a time.
        groups: of the grouped convolution.
        macs_share: its MACs relative to the dense one.
        dense, grouped, gather: seconds of one call, median; the gather is the one that the graph has right before the
            convolution, 0 if there is none.
        relative: grouped and gather together to dense: median of the ratios within a round.
        lost: seconds beyond the share of the dense time that the MACs promise.
    """

    name: str
    ratio: float
    batch: int
    groups: int
    macs_share: float
    dense: float
    grouped: float
    gather: float
    relative: float
    lost: float


@torch.inference_mode()
def measure_layers(
    dense: Network, pruned: Network, layouts: Sequence[str], inputs: Tensor, rounds: int, progress: bool = False
) -> list[LayerRow]:
    """Race each grouped convolution of `pruned` against the dense one, eagerly; most time lost first.

    Arguments are those of `fxprune.comparison.latency.measure`.
    """
    graph = pruned.folded
    assert isinstance(graph, torch.fx.GraphModule)
    assert dense.folded is not None
    assert pruned.ratio is not None
    # Shapes do not depend on the batch but for its size.
    one = torch.zeros(1, *inputs.shape[1:])
    shapes = input_shapes(dense.folded, one, Convolution)
    gathered = input_shapes(graph, one, Convolution | ChannelGather)
    rows = []
    pairs = [
        (node, conv, dense.folded.get_submodule(str(node.target)))
        for node, conv in calls(graph, Convolution)
        if str(node.target) in shapes
    ]
    changed = [(node, new, old) for node, new, old in pairs if new.weight.shape != old.weight.shape]
    for node, new, old in tqdm(changed, desc="layers", leave=False, disable=not progress):
        name, source = str(node.target), str(node.all_input_nodes[0].target)
        gather = dict(graph.named_modules()).get(source)
        racing = {("dense", layout): _layer_call(old, shapes[name], layout, inputs) for layout in layouts}
        racing |= {("grouped", layout): _layer_call(new, gathered[name], layout, inputs) for layout in layouts}
        if isinstance(gather, ChannelGather):
            racing |= {("gather", layout): _layer_call(gather, gathered[source], layout, inputs) for layout in layouts}
        timings = race(
            {" ".join(key): call for key, call in racing.items()},
            rounds=rounds,
            warmup=WARMUP,
            device=inputs.device,
            min_seconds=MIN_SECONDS,
        )
        share = new.weight.numel() / old.weight.numel()
        rows.append(_layer_row(name, pruned.ratio, len(inputs), new.groups, share, timings, layouts))
    return sorted(rows, key=lambda row: row.lost, reverse=True)


def _layer_call(layer: nn.Module, shape: tuple[int, ...], layout: str, inputs: Tensor) -> Call:
    """A call of a copy of `layer` on normal numbers, in the type and on the device of `inputs`, of as many images."""
    network = Network("layer", None, module=layer, folded=layer)
    x = torch.randn(len(inputs), *shape[1:], generator=torch.Generator().manual_seed(0))
    return prepare(network, RUNTIMES["eager"], layout, x.to(inputs.device, inputs.dtype))


def _layer_row(
    name: str,
    ratio: float,
    batch: int,
    groups: int,
    share: float,
    timings: Mapping[str, Timing],
    layouts: Sequence[str],
) -> LayerRow:
    dense = min((timings[f"dense {layout}"] for layout in layouts), key=lambda timing: timing.median)
    options = []
    for layout in layouts:
        grouped, gather = timings[f"grouped {layout}"], timings.get(f"gather {layout}")
        gathering = gather.seconds if gather else (0.0,) * len(grouped.seconds)
        both = Timing(tuple(a + b for a, b in zip(grouped.seconds, gathering, strict=True)))
        options.append((both, grouped.median, gather.median if gather else 0.0))
    both, alone, gathering_median = min(options, key=lambda option: option[0].median)
    relative, lost = both.relative_to(dense), both.median - share * dense.median
    return LayerRow(name, ratio, batch, groups, share, dense.median, alone, gathering_median, relative, lost)


def layer_table(rows: Sequence[LayerRow]) -> str:
    """The convolutions as text, one a line, in milliseconds."""
    width = max([11, *(len(row.name) for row in rows)])
    lines = [
        f"{'convolution':{width}}{'ratio':>7}{'batch':>7}{'groups':>8}{'dense':>10}{'grouped':>10}{'gather':>10}"
        f"{'to dense':>10}{'MACs':>7}{'lost':>10}"
    ]
    lines.extend(
        f"{row.name:{width}}{row.ratio:>7g}{row.batch:>7}{row.groups:>8}{row.dense * 1e3:>10.3f}"
        f"{row.grouped * 1e3:>10.3f}{row.gather * 1e3:>10.3f}{row.relative:>10.3f}{row.macs_share:>7.3f}"
        f"{row.lost * 1e3:>10.3f}"
        for row in rows
    )
    return "\n".join(lines)
