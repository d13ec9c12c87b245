"""Which channels of a model can be removed as a whole, as units, and what a choice of units removes in each module."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.channels import ChannelAnalysis, analyze_channels
from fxprune.channels.atoms import UNLABELLED
from fxprune.channels.compaction import Classes, Compaction, StuckError
from fxprune.channels.removability import irremovable
from fxprune.channels.units import STAYS, ChannelUnits, Chosen, UnitLayer, Units
from fxprune.graph.convolutions import Convolution, convolutions, is_depthwise
from fxprune.graph.recording import like
from fxprune.graph.tracing import is_hooked
from fxprune.plans import RemovedChannels
from fxprune.plans.eligibility import QUANTIZED_PACKAGES, parameters_of_several_modules
from fxprune.plans.plan import channels_of


@dataclass(frozen=True)
class Entries:
    """Positions of a module that belong to atoms: those of its outputs or of its inputs.

    Attributes:
        name: module path, or parameter path where the model reads a parameter itself.
        kind: `"outputs"` or `"inputs"`, as in `RemovedChannels`.
        atoms: the atom at each position.
    """

    name: str
    kind: str
    atoms: Units


@dataclass(frozen=True)
class Removable:
    """What can be removed from a traced model.

    Attributes:
        units: the units, and what the layers cost.
        entries: which positions of which modules go with which atoms.
        unit_of: `(atoms,)` the unit of each atom, or `STAYS`.
    """

    units: ChannelUnits
    entries: tuple[Entries, ...]
    unit_of: Units

    def removed(self, chosen: Chosen) -> dict[str, RemovedChannels]:
        """What goes from each module without the units that are `chosen (U,)`."""
        goes = np.append(chosen, False)  # STAYS is the last
        found: dict[str, dict[str, Any]] = {}
        for entry in self.entries:
            positions = np.flatnonzero(goes[self.unit_of[entry.atoms]])
            if positions.size:
                found.setdefault(entry.name, {})[entry.kind] = tuple(positions.tolist())
        return {name: RemovedChannels(**kinds) for name, kinds in found.items()}


def find_removable(
    module: fx.GraphModule,
    values: Mapping[fx.Node, Any],
    costs: Mapping[str, tuple[int, int | None]],
    ignore: Collection[str] = (),
    obstacles: Mapping[str, str] = MappingProxyType({}),
    counted: Mapping[str, str] = MappingProxyType({}),
) -> Removable:
    """Find the units of a traced model.

    Args:
        module: the graph.
        values: what each node gives on meta tensors.
        costs: parameters and MACs of each layer by module path.
        ignore: module paths of convolutions whose filters stay.
        obstacles: layers whose filters have to stay for another reason, and why.
        counted: nodes that stand for code in which the number of their channels, or of those they read, is written.
    """
    analysis = analyze_channels(module, values)
    classes = analysis.blocks.classes
    refused = irremovable(module, dict(values), analysis)
    for node in module.graph.nodes:
        if node.name in counted:
            refused |= dict.fromkeys(_held(analysis, (node, *node.all_input_nodes), refused), counted[node.name])
    writers = _writers(module, analysis)
    shared = parameters_of_several_modules(module)
    prunable = set()
    for name, atoms in writers.items():
        layer = module.get_submodule(name)
        reason = obstacles.get(name, "") or _why_whole(layer, shared) or ("is ignored" if name in ignore else "")
        if reason:
            for c in np.unique(classes[atoms]).tolist():
                refused.setdefault(c, f"{name} {reason}")
        elif isinstance(layer, Convolution) and layer.groups == 1:
            prunable.add(name)
    written = {name: writers[name] for name in writers if name in prunable}
    unit_of, space, names = _number(analysis, refused, written)
    while (stuck := _stuck(module, values, analysis, unit_of, space)) is not None:
        held = _held(analysis, (stuck.node,), refused) or _held(analysis, stuck.node.all_input_nodes, refused)
        if not held:
            raise stuck
        refused |= dict.fromkeys(held, str(stuck))
        unit_of, space, names = _number(analysis, refused, written)
    reads = {str(port.node.target): port.atoms for port in analysis.ports if port.kind == "reads"}
    owned = {scale.owner: scale.atoms for scale in reversed(analysis.scales)}
    layers = {}
    for name, (params, macs) in costs.items():
        layer = module.get_submodule(name)
        depthwise = isinstance(layer, Convolution) and is_depthwise(layer)
        layers[name] = UnitLayer(
            writes=_units_at(unit_of, (owned if depthwise else writers).get(name), channels_of(layer)[0]),
            reads=None if depthwise else _units_at(unit_of, reads.get(name), channels_of(layer)[1]),
            macs=macs,
            params=params,
            prunable=name in prunable,
        )
    unknown = {str(node.target): analysis.boundaries.get(node.name, "") for node in module.graph.nodes}
    fixed = {}
    for name in convolutions(module):
        if name not in layers or (layers[name].writes == STAYS).all():
            atoms = writers.get(name, owned.get(name, np.zeros(0, dtype=np.int64)))
            why = next((refused[c] for c in classes[atoms].tolist() if c in refused), "")
            never = "one channel of each space stays" if name in layers else "the model never calls it"
            fixed[name] = why or unknown.get(name) or obstacles.get(name) or never
    return Removable(ChannelUnits(space, names, layers, fixed), entries_of(analysis), unit_of)


def _held(analysis: ChannelAnalysis, nodes: Iterable[fx.Node], refused: Collection[int]) -> list[int]:
    """The classes in what some nodes give, without those that are refused already."""
    found = {c for node in nodes for c in _classes_in(analysis, node)}
    return sorted(c for c in found if c != UNLABELLED and c not in refused)


def _writers(module: fx.GraphModule, analysis: ChannelAnalysis) -> dict[str, Units]:
    """The atoms that each convolution or linear layer writes; those of its first call stand for all."""
    found: dict[str, Units] = {}
    for port in analysis.ports:
        if port.kind == "writes":
            found.setdefault(str(port.node.target), port.atoms)
    return found


def _why_whole(layer: nn.Module, shared: Collection[int]) -> str:
    """Why a layer cannot lose filters, or an empty string."""
    if not isinstance(layer, Convolution | nn.Linear):
        return f"is a {type(layer).__name__}, which cannot lose channels"
    if is_hooked(layer):
        return "has hooks or a parametrized weight"
    if type(layer).__module__.startswith(QUANTIZED_PACKAGES) or not layer.weight.is_floating_point():
        return "is quantized"
    if any(id(parameter) in shared for parameter in layer.parameters(recurse=False)):
        return "shares a parameter with another module"
    return ""


def _number(
    analysis: ChannelAnalysis, refused: Mapping[int, str], prunable: Mapping[str, Units]
) -> tuple[Units, Units, tuple[str, ...]]:
    """Unit of each atom, space of each unit, and names of the spaces.

    Classes that the same producers write, in the same numbers, form one space: only these can be compared. Halves that
    different layers read are spaces apart, see `_split`.
    """
    blocks = analysis.blocks
    name_of: dict[int, str] = {}
    for name, atoms in prunable.items():
        for c in blocks.classes[atoms].tolist():
            name_of.setdefault(c, name)
    spaces: dict[bytes, list[int]] = {}
    for c in name_of:
        if c not in refused:
            runs = np.sort(np.searchsorted(blocks.starts, blocks.members[c], side="right"))
            spaces.setdefault(runs.tobytes(), []).append(c)
    apart = _split(analysis, [members for members in spaces.values() if len(members) > 1])
    ordered = sorted((sorted(members) for members in apart), key=lambda m: m[0])
    unit_of_class = np.full(blocks.count, STAYS, dtype=np.int64)
    space = np.repeat(np.arange(len(ordered)), [len(members) for members in ordered])
    for unit, c in enumerate(c for members in ordered for c in members):
        unit_of_class[c] = unit
    return unit_of_class[blocks.classes], space, tuple(name_of[members[0]] for members in ordered)


def _split(analysis: ChannelAnalysis, spaces: list[list[int]]) -> list[list[int]]:
    """Split spaces until every value that could lose all its channels holds the whole of one, which keeps a channel.

    No layer reads an empty tensor: if one half of a convolution's channels feeds another layer than the other half,
    both halves have to keep one. A space of a single channel would lose none and is left out.
    """
    space_of = np.full(analysis.blocks.count, STAYS, dtype=np.int64)
    for i, members in enumerate(spaces):
        space_of[members] = i
    count = len(spaces)
    for found in sorted({tuple(_classes_in(analysis, node)) for node in analysis.labels}, key=len):
        if not found or found[0] == UNLABELLED:
            continue  # channels of which nothing is known stay
        held, sizes = np.unique(space_of[list(found)], return_counts=True)
        if STAYS in held or (sizes == np.bincount(space_of[space_of >= 0])[held]).any():
            continue
        cut = space_of == held[sizes.argmax()]
        inside = np.zeros_like(cut)
        inside[list(found)] = True
        for part in (cut & inside, cut & ~inside):
            space_of[part] = count if part.sum() > 1 else STAYS
            count += 1
    return [np.flatnonzero(space_of == i).tolist() for i in np.unique(space_of[space_of >= 0])]


def _classes_in(analysis: ChannelAnalysis, node: fx.Node) -> list[int]:
    """The classes of channels in a value, ascending; `UNLABELLED` first if it has other channels as well."""
    found: set[int] = set()
    for leaf in tree_leaves(analysis.labels.get(node)):
        if isinstance(leaf, Tensor):
            atoms = np.unique(leaf.numpy())
            known = atoms[atoms != UNLABELLED]
            found.update(analysis.blocks.classes[known].tolist(), atoms[atoms == UNLABELLED].tolist())
    return sorted(found)


def _stuck(
    module: fx.GraphModule, values: Mapping[fx.Node, Any], analysis: ChannelAnalysis, unit_of: Units, space: Units
) -> StuckError | None:
    """Try on a copy of the graph whether its operators can do without half of the units; return the first that cannot.

    What moves channels may do so in a form of which no part can be missing, such as `x.view(n, 4, 8, h, w).relu()`.
    """
    generator = np.random.default_rng(0)
    order = np.lexsort((generator.random(len(space)), space))
    first = np.flatnonzero(np.diff(space, prepend=-1))
    goes = generator.random(len(space)) < 0.5
    goes[order[first]], goes[order[first + 1]] = True, False  # each space loses one and keeps one
    nodes: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, nodes))
    twin = replace(analysis, labels={nodes[n]: labels for n, labels in analysis.labels.items() if n in nodes})
    known = {nodes[node]: value for node, value in values.items() if node in nodes}
    removed: Classes = np.append(goes, False)[unit_of]
    try:
        Compaction(like(module, graph), known, twin, removed).apply()
    except StuckError as error:
        return StuckError(next(node for node, copied in nodes.items() if copied is error.node), str(error))
    return None


def _units_at(unit_of: Units, atoms: Units | None, size: int) -> Units:
    return np.full(size, STAYS, dtype=np.int64) if atoms is None or len(atoms) != size else unit_of[atoms]


def entries_of(analysis: ChannelAnalysis) -> tuple[Entries, ...]:
    """Where the atoms stand in modules and parameters."""
    found = [(str(port.node.target), "outputs" if port.kind == "writes" else "inputs", port) for port in analysis.ports]
    ports = {(name, kind): Entries(name, kind, port.atoms) for name, kind, port in reversed(found)}  # of the first call
    scales: dict[str, Entries] = {}
    for scale in analysis.scales:
        name = scale.owner if scale.dim == 0 else f"{scale.owner}.{scale.attribute}".lstrip(".")
        scales.setdefault(name, Entries(name, "outputs", scale.atoms))
    return (*ports.values(), *scales.values())
