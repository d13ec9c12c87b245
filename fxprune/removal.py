"""Which channels of a model can be removed as a whole, as units, and what a choice of units removes in each module."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx, nn

from fxprune.channels import ChannelAnalysis, analyze_channels
from fxprune.eligibility import QUANTIZED_PACKAGES, parameters_of_several_modules
from fxprune.plans import RemovedChannels, channels_of
from fxprune.removability import irremovable
from fxprune.tracing import is_hooked
from fxprune.units import STAYS, ChannelUnits, Chosen, UnitLayer, Units


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
    obstacles: Mapping[str, str] = {},
) -> Removable:
    """Find the units of a traced model.

    Args:
        module: the graph.
        values: what each node gives on meta tensors.
        costs: parameters and MACs of each layer by module path.
        ignore: module paths of convolutions whose filters stay.
        obstacles: layers whose filters have to stay for another reason, and why.
    """
    analysis = analyze_channels(module, values)
    classes = analysis.blocks.classes
    refused = irremovable(module, dict(values), analysis)
    writers = _writers(module, analysis)
    shared = parameters_of_several_modules(module)
    prunable = set()
    for name, atoms in writers.items():
        layer = module.get_submodule(name)
        reason = obstacles.get(name, "") or _why_whole(layer, shared) or ("is ignored" if name in ignore else "")
        if reason:
            for c in np.unique(classes[atoms]).tolist():
                refused.setdefault(c, f"{name} {reason}")
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
            prunable.add(name)
    unit_of, space, names = _number(analysis, refused, {name: writers[name] for name in writers if name in prunable})
    reads = {str(port.node.target): port.atoms for port in analysis.ports if port.kind == "reads"}
    layers = {}
    for name, (params, macs) in costs.items():
        layer = module.get_submodule(name)
        depthwise = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.in_channels > 1
        owned = next((scale.atoms for scale in analysis.scales if scale.owner == name), None)
        layers[name] = UnitLayer(
            writes=_units_at(unit_of, owned if depthwise else writers.get(name), channels_of(layer)[0]),
            reads=None if depthwise else _units_at(unit_of, reads.get(name), channels_of(layer)[1]),
            macs=macs,
            params=params,
            prunable=name in prunable,
        )
    fixed = {
        name: next((refused[c] for c in classes[writers[name]].tolist() if c in refused), "its channels meet no other")
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d) and name in writers and (layers[name].writes == STAYS).all()
    }
    return Removable(ChannelUnits(space, names, layers, fixed), entries_of(analysis), unit_of)


def _writers(module: fx.GraphModule, analysis: ChannelAnalysis) -> dict[str, Units]:
    """The atoms that each convolution or linear layer writes; those of its first call stand for all."""
    found: dict[str, Units] = {}
    for port in analysis.ports:
        if port.kind == "writes":
            found.setdefault(str(port.node.target), port.atoms)
    return found


def _why_whole(layer: nn.Module, shared: Collection[int]) -> str:
    """Why a layer cannot lose filters, or an empty string."""
    if not isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
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

    Classes that the same producers write, in the same numbers, form one space: only these can be compared.
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
    ordered = sorted((sorted(members) for members in spaces.values() if len(members) > 1), key=lambda m: m[0])
    unit_of_class = np.full(len(blocks.members), STAYS, dtype=np.int64)
    space = np.repeat(np.arange(len(ordered)), [len(members) for members in ordered])
    for unit, c in enumerate(c for members in ordered for c in members):
        unit_of_class[c] = unit
    return unit_of_class[blocks.classes], space, tuple(name_of[members[0]] for members in ordered)


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
