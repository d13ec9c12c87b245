"""The ways in which a budget may prune the kernels of each convolution, with what they lose and how long they take."""

from collections.abc import Iterator, Mapping

from torch import nn

from fxprune.calibration.damage import loss_of
from fxprune.calibration.subject import Subject
from fxprune.graph.convolutions import conv_at
from fxprune.planning.latency.budget import Energies, damages, group_counts
from fxprune.planning.latency.table import LatencyTable
from fxprune.planning.planner import serves_accuracy
from fxprune.planning.program.terms import ALIGNED, Kernels, KernelWay, width_count
from fxprune.planning.requests import PUBLISHED, Request
from fxprune.planning.sensitivity import LayerSensitivity, Sensitivity
from fxprune.plans import Form
from fxprune.plans.shapes import ACCURATE_GROUP_WIDTH, kept_channels, partition_groups, unit_of

RATIOS = tuple(part / 8 for part in range(1, 8))
"""Of kernel groups that may go from a layer, where no table of times names others."""
_FORM: Mapping[str, Form] = {"partition": "partition", "overlap": "overlap", "auto": "overlap"}
FEWEST = 2
"""Groups that a layer has at least."""


def kernel_ways(
    subject: Subject, request: Request, losses: Sensitivity, slopes: Mapping[str, float], scale: float
) -> dict[str, Kernels]:
    """The ways of each convolution that can be pruned.

    Args:
        subject: the model.
        request: for kernels; with a table of times its options are the ways.
        losses: of the layers; the least damage, or another way to spend a budget.
        slopes: see `fxprune.planning.program.interaction`.
        scale: by which losses are multiplied.
    """
    form = form_for(request)
    model = subject.layers
    if request.latency_table is None:
        widths = width_count(len(subject.costs))
        ways = {layer.name: tuple(_counted(model, layer, request, form, widths)) for layer in losses.layers}
    else:
        ways = _timed(model, request.latency_table.among(group_counts(subject, request), form), losses, request, form)
    found = {}
    for layer in losses.layers:
        if not ways.get(layer.name):
            continue
        scaled = tuple(
            KernelWay(way.ratio, way.form, {n: scale * loss for n, loss in way.losses.items()}, way.time)
            for way in ways[layer.name]
        )
        width = conv_at(model, layer.name).out_channels // layer.groups
        if request.groups != "auto" or request.latency is not None:  # they are named
            width = 1
        elif serves_accuracy(subject, request):
            width = ACCURATE_GROUP_WIDTH
        slope = slopes.get(layer.name, 0.0)
        found[layer.name] = Kernels(scaled, width, slope, request.effective_block, request.target)
    return found


def _counted(
    model: nn.Module, layer: LayerSensitivity, request: Request, form: str, widths: int
) -> Iterator[KernelWay]:
    """The ways by ratio, in the number of groups that suits the filters that stay."""
    channels, shape, conv = len(layer.damage), _FORM[form], conv_at(model, layer.name)
    energies = Energies(conv, request.seed)
    counts = [layer.groups]
    # Wide layers keep multiples of `ALIGNED`, which divide as the whole layer does.
    is_narrow = conv.out_channels < ALIGNED * widths or layer.groups > ALIGNED
    while is_narrow and request.groups == "auto" and counts[-1] % 2 == 0 and counts[-1] > FEWEST:
        counts.append(counts[-1] // 2)
    for ratio in RATIOS:
        kept = kept_channels(channels, ratio, unit_of(channels, request.effective_block))
        loss = loss_of(layer.damage[kept - 1]) - loss_of(layer.damage[-1])
        legal = counts if shape == "overlap" else [n for n in counts if n == partition_groups(ratio)]
        if kept < channels and legal:
            yield KernelWay(
                ratio, form, {n: max(0.0, loss) * energies.relative(shape, n, kept, layer.groups) for n in legal}
            )


def form_for(request: Request) -> str:
    """The form of what has kernels pruned: the partition form only where it was asked for, or where time counts."""
    free = request.form == "auto" and request.latency is None
    return "overlap" if request.method in PUBLISHED or free else request.form


def _timed(
    model: nn.Module, table: LatencyTable, losses: Sensitivity, request: Request, form: str
) -> dict[str, tuple[KernelWay, ...]]:
    """The options of a table. Where nothing but time counts, those that are no faster than one of no more loss are
    left out, which changes no optimum.
    """
    known = {layer.name for layer in losses.layers}
    found: dict[str, tuple[KernelWay, ...]] = {}
    table = table.among(
        {layer.name: {o.groups for o in layer.options} for layer in table.layers if layer.name in known}, form
    )
    priced = damages(model, table, losses, request.seed)
    for layer in table.layers:
        ways = [
            KernelWay(o.ratio, form, {o.groups: max(0.0, loss_of(damage))}, min(1.0, o.seconds / layer.seconds))
            for o, damage in zip(layer.options, priced[layer.name], strict=True)
        ]
        ways.sort(key=lambda way: (way.time, *way.losses.values()))
        if not request.budgets:
            least, worthwhile = float("inf"), []
            for way in ways:
                (loss,) = way.losses.values()
                if way.time < 1 and loss < least:
                    least = loss
                    worthwhile.append(way)
            ways = worthwhile
        found[layer.name] = tuple(ways)
    return found
