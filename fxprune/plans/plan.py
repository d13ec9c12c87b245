"""A pruning plan as pure data: which filters form a group, and which input channels each group keeps.

A plan holds no weights and no code. It is validated when it is built, cannot be changed, and survives JSON.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fxprune.errors import PlanError, near_matches
from fxprune.graph.convolutions import Convolution
from fxprune.plans.eligibility import computes_its_own_forward
from fxprune.plans.fields import (
    check_divisible,
    check_ratio,
    fields_of,
    freeze_ratio,
    frozen,
    integer,
    integers,
    parsed,
    rows,
    set_field,
    share,
)
from fxprune.tables import Bar, Cell, Column, Table, Tabular
from fxprune.vocabulary import Form

FORMAT = "fxprune-plan"
VERSION = 1


@dataclass(frozen=True)
class GroupedKernels:
    """How one dense convolution with weight `(O, C, *kernel)` becomes a pruned grouped one.

    Args:
        out_order: `(O,)` the filters in group order: group `g` owns `out_order[g * d:(g + 1) * d]`, `d = O / groups`.
        kept: `(groups, k)` the input channels that each group keeps, ascending.
        in_channels: `C`, the input channels of the dense convolution.
        asked_ratio: the share of kernel groups that was asked to go, in `[0, 1)`; `ratio` is the share that goes.
        redundancy: the share of kernel groups that resemble another of their group, if the planner looked for them.
        block: every kept set is a union of runs of this many channels that start at its multiples, so that one wide
            load brings a run; 1 is no rule.
        block_cost: the share of the importance that the same groups of filters could keep, but for the blocks.

    Raises:
        PlanError: `out_order` is no permutation, the groups differ in size, or a kept set is empty, unordered, out of
            range or no union of blocks. The message does not name the layer: a `GroupedKernels` does not know it.

    >>> kernels = GroupedKernels(out_order=(0, 2, 1, 3), kept=((0, 1), (2, 3)), in_channels=4, asked_ratio=0.5)
    >>> print(kernels)
    partition: 2 groups of 2 filters, each keeps 2 of 4 channels (ratio 0.5)
    """

    out_order: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    in_channels: int
    asked_ratio: float
    redundancy: float | None = None
    block: int = 1
    block_cost: float | None = None

    def __post_init__(self) -> None:
        """Turn lists into tuples and check the rules above."""
        set_field(self, "out_order", integers("out_order", self.out_order))
        set_field(self, "kept", tuple(integers(f"kept[{g}]", channels) for g, channels in enumerate(rows(self.kept))))
        set_field(self, "in_channels", integer("in_channels", self.in_channels))
        set_field(self, "asked_ratio", check_ratio(self.asked_ratio))
        set_field(self, "block", integer("block", self.block))
        for name in ("redundancy", "block_cost"):
            if getattr(self, name) is not None:
                set_field(self, name, share(name, getattr(self, name)))
        filters = len(self.out_order)
        if not filters:
            raise PlanError("out_order is empty; it must list every filter of the convolution once")
        if sorted(self.out_order) != list(range(filters)):
            wrong = next(f for f in range(filters) if self.out_order.count(f) != 1)
            raise PlanError(
                f"out_order has {filters} entries, but filter {wrong} occurs {self.out_order.count(wrong)} times; "
                f"it must hold each of 0..{filters - 1} once"
            )
        check_divisible(filters, len(self.kept))
        if self.in_channels % self.block:
            raise PlanError(f"{self.in_channels} channels do not divide into blocks of {self.block}; use block=1")
        for group, channels in enumerate(self.kept):
            self._check_kept(group, channels)

    def _check_kept(self, group: int, channels: tuple[int, ...]) -> None:
        if not channels:
            raise PlanError(f"group {group} keeps no channel; every group must keep at least one")
        if len(channels) != len(self.kept[0]):
            raise PlanError(
                f"group {group} keeps {len(channels)} channels but group 0 keeps {len(self.kept[0])}; "
                "a grouped convolution needs the same number in every group"
            )
        if any(a >= b for a, b in itertools.pairwise(channels)):
            raise PlanError(f"the channels of group {group} are not strictly ascending; sort them and list each once")
        if channels[0] < 0 or channels[-1] >= self.in_channels:
            outside = channels[0] if channels[0] < 0 else channels[-1]
            raise PlanError(
                f"group {group} keeps channel {outside}, which is outside 0..{self.in_channels - 1}: "
                f"the convolution has {self.in_channels} input channels"
            )
        starts = channels[:: self.block]
        whole = tuple(channel for start in starts for channel in range(start, start + self.block))
        if any(start % self.block for start in starts) or channels != whole:
            raise PlanError(
                f"the channels of group {group} are no union of blocks of {self.block} that start at its multiples; "
                "use block=1 for channels of any order"
            )

    def __str__(self) -> str:
        """One line: form, groups, and what they keep."""
        return (
            f"{self.form}: {self.groups} groups of {self.group_width} filters, "
            f"each keeps {self.kept_channels} of {self.in_channels} channels"
            + (f" in blocks of {self.block}" if self.block > 1 else "")
            + f" (ratio {self.ratio:.4g})"
        )

    def __repr__(self) -> str:
        return f"<GroupedKernels: {self}>"

    @property
    def groups(self) -> int:
        """Number of groups, `n`."""
        return len(self.kept)

    @property
    def out_channels(self) -> int:
        """Filters of the convolution, `O`."""
        return len(self.out_order)

    @property
    def group_width(self) -> int:
        """Filters in each group, `d = O / n`."""
        return self.out_channels // self.groups

    @property
    def kept_channels(self) -> int:
        """Input channels that each group keeps, `k`."""
        return len(self.kept[0])

    @property
    def ratio(self) -> float:
        """Share of kernel groups that is removed: `1 - k / C`."""
        return 1 - self.kept_channels / self.in_channels

    @property
    def form(self) -> Form:
        """`"partition"` if every input channel is kept by exactly one group, else `"overlap"`."""
        readers = sorted(channel for channels in self.kept for channel in channels)
        return "partition" if readers == list(range(self.in_channels)) else "overlap"

    def mask(self) -> torch.Tensor:
        """The kernels that stay, as a bool tensor `(O, C)`."""
        mask = torch.zeros(self.out_channels, self.in_channels, dtype=torch.bool)
        filters = torch.tensor(self.out_order).reshape(self.groups, self.group_width)
        mask[filters[:, :, None], torch.tensor(self.kept)[:, None, :]] = True  # (n, d, 1) and (n, 1, k) -> (n, d, k)
        return mask

    def to_dict(self) -> dict[str, Any]:
        """The fields as lists and numbers, ready for JSON."""
        return {
            "out_order": list(self.out_order),
            "kept": [list(channels) for channels in self.kept],
            "in_channels": self.in_channels,
            "asked_ratio": self.asked_ratio,
            "redundancy": self.redundancy,
            "block": self.block,
            "block_cost": self.block_cost,
        }

    @classmethod
    def from_dict(cls, data: object) -> "GroupedKernels":
        """Undo `to_dict`.

        Raises:
            PlanError: a field is missing, unknown or invalid.
        """
        names = tuple(field.name for field in fields(cls))
        later = {"redundancy": None, "block": 1, "block_cost": None}  # plans of earlier versions have no such fields
        return cls(**fields_of(later | data if isinstance(data, dict) else data, *names))


@dataclass(frozen=True)
class RemovedChannels:
    """Which channels of one module are removed as a whole.

    Args:
        outputs: filters of a convolution, features of a linear layer, entries of a normalisation or of a depthwise
            convolution, or flattened elements of a parameter that the model reads itself; ascending.
        inputs: input channels of a convolution or linear layer that go because nobody writes them any more, ascending.
        asked_ratio: the share of filters that was asked to go, where it was; None in modules that merely follow.
        redundancy: the share of filters that resemble another of the layer, if the planner looked for them.

    Raises:
        PlanError: a list is not strictly ascending from 0 on.
    """

    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    asked_ratio: float | None = None
    redundancy: float | None = None

    def __post_init__(self) -> None:
        """Turn lists into tuples and check the rules above."""
        for name in ("outputs", "inputs"):
            channels = integers(name, getattr(self, name))
            if any(a >= b for a, b in itertools.pairwise((-1, *channels))):
                raise PlanError(f"{name} is not strictly ascending from 0 on; sort the channels and list each once")
            set_field(self, name, channels)
        if self.asked_ratio is not None:
            set_field(self, "asked_ratio", check_ratio(self.asked_ratio))
        if self.redundancy is not None:
            set_field(self, "redundancy", share("redundancy", self.redundancy))

    def to_dict(self) -> dict[str, Any]:
        """The fields as lists and numbers, ready for JSON."""
        return {
            "outputs": list(self.outputs),
            "inputs": list(self.inputs),
            "asked_ratio": self.asked_ratio,
            "redundancy": self.redundancy,
        }

    @classmethod
    def from_dict(cls, data: object) -> "RemovedChannels":
        """Undo `to_dict`.

        Raises:
            PlanError: a field is missing, unknown or invalid.
        """
        return cls(**fields_of(data, *(field.name for field in fields(cls))))


@dataclass(frozen=True, repr=False)
class PrunePlan(Tabular):
    """What is pruned in a model, and what was asked for.

    Args:
        layers: module name to the grouping of that convolution, as it is once `removed` has gone.
        skipped: module name of each convolution that stays dense, to the reason.
        ratio: the ratio that was asked for, or pattern to ratio; an empty mapping in a plan written by hand.
        method: how the groups were chosen.
        criterion: how a kernel's importance was measured.
        seed: of the random numbers that the method drew.
        notes: module name of a planned layer, to what the user should know of how it was planned.
        removed: module name (or parameter name, where the model reads a parameter itself) to the channels that go as a
            whole, in every module they touch.
        baked: names of the convolutions whose computed weight became a plain one before this was planned.
        remarks: what the user should know of the plan as a whole: what else was tried, and what it would have given.
        branches: residual branches that go as a whole: module name of the layer at the end of each, to those of all its
            layers. Channels and kernels are of the network without them.

    Two plans are equal when all fields are. A plan can be copied and pickled, but not hashed.

    Raises:
        PlanError: a field has the wrong type, a layer is both planned and skipped, or a note is about no planned layer.
    """

    layers: Mapping[str, GroupedKernels]
    skipped: Mapping[str, str] = field(default_factory=dict)
    ratio: float | Mapping[str, float] = field(default_factory=dict)
    method: str = "manual"
    criterion: str = "manual"
    seed: int = 0
    notes: Mapping[str, str] = field(default_factory=dict)
    removed: Mapping[str, RemovedChannels] = field(default_factory=dict)
    baked: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    branches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the mappings read-only and check them."""
        set_field(self, "layers", frozen("layers", self.layers, GroupedKernels))
        set_field(self, "skipped", frozen("skipped", self.skipped, str))
        set_field(self, "notes", frozen("notes", self.notes, str))
        set_field(self, "removed", frozen("removed", self.removed, RemovedChannels))
        set_field(self, "ratio", freeze_ratio(self.ratio))
        set_field(self, "seed", integer("seed", self.seed))
        for what, kind in (("baked", "names of modules"), ("remarks", "sentences")):
            texts = getattr(self, what)
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise PlanError(f"{what} is {texts!r}; it must list {kind}")
            set_field(self, what, tuple(texts))
        set_field(self, "branches", MappingProxyType(_checked_branches(self.branches)))
        for name in itertools.chain.from_iterable(self.branches.values()):
            if name in self.layers or name in self.removed:
                raise PlanError(f"{name}: the layer goes with its branch, and is planned beside; list it once")
        for name in ("method", "criterion"):
            if not isinstance(getattr(self, name), str):
                raise PlanError(f"{name} is {getattr(self, name)!r}; it must be a string")
        for name in self.layers.keys() & self.skipped.keys():
            raise PlanError(f"{name}: the layer is both planned and skipped; list it once")
        for name in self.notes.keys() - self.layers.keys() - self.removed.keys():
            raise PlanError(
                f"notes: {name!r} is no planned layer; notes are about these, reasons for others in skipped"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the constructor: `pickle` does not know the mapping proxies that keep the plan constant."""
        ratio = dict(self.ratio) if isinstance(self.ratio, Mapping) else self.ratio
        layers, skipped, notes, removed = (dict(m) for m in (self.layers, self.skipped, self.notes, self.removed))
        names = self.method, self.criterion, self.seed
        branches = dict(self.branches)
        return PrunePlan, (layers, skipped, ratio, *names, notes, removed, self.baked, self.remarks, branches)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrunePlan":
        """The plan itself, for it is constant: a compiled model carries it, and would spend more time on a copy of it
        than on one of its modules.
        """
        return self

    def brief(self) -> str:
        """What is in it, in a few words."""
        filters = sum(channels.asked_ratio is not None for channels in self.removed.values())
        parts = [
            *([f"{len(self.branches)} residual branches go"] if self.branches else []),
            *([f"{filters} convolutions lose whole filters"] if filters else []),
            *([f"{len(self.layers)} convolutions lose kernels"] if self.layers else []),
            *([f"{len(self.skipped)} stay dense"] if self.skipped else []),
        ]
        return "; ".join(parts) or "nothing to prune"

    def table(self) -> Table:
        """One line for each planned layer, then one for each skipped layer with its reason."""
        blocks = any(kernels.block > 1 for kernels in self.layers.values())
        columns = (
            Column("layer", right=False),
            Column("form", right=False),
            Column("groups x filters", goes=2),
            Column("kept/channels", goes=1),
            Column("ratio (asked)"),
            *((Column("blocks (cost)"),) if blocks else ()),
        )
        rows: list[tuple[Cell, ...]] = [
            (name, "branch", f"goes with {', '.join(names)}") for name, names in self.branches.items()
        ]
        rows += [
            (name, "filters", f"{len(channels.outputs)} filters go (asked {channels.asked_ratio:.4g})")
            for name, channels in self.removed.items()
            if channels.asked_ratio is not None
        ]
        for name, kernels in self.layers.items():
            cost = "" if kernels.block_cost is None else f" ({100 * kernels.block_cost:.1f} %)"
            rows.append(
                (
                    name,
                    kernels.form,
                    f"{kernels.groups} x {kernels.group_width}",
                    f"{kernels.kept_channels}/{kernels.in_channels}",
                    Bar(f"{kernels.ratio:.4f} ({kernels.asked_ratio:.4g})", kernels.ratio),
                    *((f"{kernels.block}{cost}",) if blocks else ()),
                )
            )
        rows += [(name, "dense", reason) for name, reason in self.skipped.items()]
        notes = tuple(f"note: {name}: {note}" for name, note in self.notes.items())
        notes += tuple(f"note: {remark}" for remark in self.remarks)
        return Table(columns, tuple(rows), (self.brief(),), notes)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives an equal plan back."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "ratio": dict(self.ratio) if isinstance(self.ratio, Mapping) else self.ratio,
                "method": self.method,
                "criterion": self.criterion,
                "seed": self.seed,
                "layers": {name: kernels.to_dict() for name, kernels in self.layers.items()},
                "skipped": dict(self.skipped),
                "notes": dict(self.notes),
                "removed": {name: channels.to_dict() for name, channels in self.removed.items()},
            }
            | {name: list(texts) for name in ("baked", "remarks") if (texts := getattr(self, name))}
            | ({"branches": {name: list(names) for name, names in self.branches.items()}} if self.branches else {})
        )

    @classmethod
    def from_json(cls, text: str) -> "PrunePlan":
        """Undo `to_json`.

        Raises:
            PlanError: the text is not JSON, not a plan, of another version, or describes an invalid plan.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"the text of the plan is not JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise PlanError(f'the JSON is not a plan: it must be an object with "format": "{FORMAT}"')
        version = data.pop("version", None)
        if version != VERSION:
            raise PlanError(f"the plan has version {version!r}, but only {VERSION} can be read; make the plan again")
        names = (field.name for field in fields(cls))
        values = fields_of(
            {"notes": {}, "removed": {}, "baked": [], "remarks": [], "branches": {}} | data, *names
        )  # earlier versions lack these
        values["layers"] = parsed("layers", values["layers"], GroupedKernels.from_dict)
        values["removed"] = parsed("removed", values["removed"], RemovedChannels.from_dict)
        return cls(**values)

    def check(self, model: nn.Module) -> None:
        """See that the plan fits the model: each layer exists, is a dense convolution, and has the planned size.

        Raises:
            PlanError: naming the first layer that does not fit and what was found in its place.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, kernels in self.layers.items():
            module = modules.get(name)
            if module is None:
                close = near_matches(name, modules)
                raise PlanError(f"{name}: {type(model).__name__} has no module of this name{close}; {REMAKE}")
            if not isinstance(module, Convolution):
                raise PlanError(
                    f"{name}: the plan prunes a convolution, the model has a {type(module).__name__}; {REMAKE}"
                )
            if "weight" not in module._parameters or (name in self.baked and computes_its_own_forward(type(module))):
                raise PlanError(
                    f"{name}: the plan prunes its weight, but the {type(module).__name__} computes another; mask with "
                    "bake=True if the plan was made so, or leave the layer alone"
                )
            if module.groups != 1:
                raise PlanError(
                    f"{name}: the convolution already has groups={module.groups}, but only groups=1 can be regrouped; "
                    "apply the plan to the dense model it was made for"
                )
            gone = self.removed.get(name)
            outputs, inputs = (0, 0) if gone is None else (len(gone.outputs), len(gone.inputs))
            planned = kernels.out_channels + outputs, kernels.in_channels + inputs
            found = module.out_channels, module.in_channels
            if planned != found:
                raise PlanError(
                    f"{name}: the plan is for {planned[0]} filters of {planned[1]} channels, "
                    f"but the convolution has {found[0]} of {found[1]}; {REMAKE}"
                )
        for name in self.branches:
            if name not in modules or not isinstance(getattr(modules[name], "weight", None), torch.Tensor):
                raise PlanError(
                    f"{name}: the plan removes the branch that this layer ends, and {type(model).__name__} has no "
                    f"layer with a weight of this name{near_matches(name, modules)}; {REMAKE}"
                )
        parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        for name, gone in self.removed.items():
            if name not in modules and name not in parameters:
                raise PlanError(
                    f"{name}: {type(model).__name__} has nothing of this name{near_matches(name, modules)}; {REMAKE}"
                )
            if name in parameters:
                sizes = parameters[name].numel(), 0
            else:
                sizes = channels_of(modules[name])
            for what, channels, size in zip(("output", "input"), (gone.outputs, gone.inputs), sizes, strict=True):
                if channels and channels[-1] >= size:
                    raise PlanError(f"{name}: the plan removes {what} {channels[-1]}, but there are {size}; {REMAKE}")
                if channels and len(channels) == size:
                    raise PlanError(f"{name}: the plan removes all {size} {what}s; keep at least one")


def _checked_branches(branches: object) -> dict[str, tuple[str, ...]]:
    """The branches with tuples of names."""
    if not isinstance(branches, Mapping):
        raise PlanError(f"branches is {branches!r}; it must map the layer at the end of each to its layers")
    found = {}
    for name, layers in branches.items():
        texts = isinstance(layers, list | tuple) and all(isinstance(layer, str) for layer in layers)
        if not isinstance(name, str) or not texts or name not in layers:
            raise PlanError(f"branches: {name!r} has {layers!r}; it must list the layers of the branch, {name!r} too")
        found[name] = tuple(layers)
    return found


def channels_of(module: nn.Module) -> tuple[int, int]:
    """How many output and input channels can be removed from a module by number: those of a layer, the entries of a
    normalisation.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, Convolution):
        return module.out_channels, module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features, 0  # perhaps statistics alone
    return (len(weight), 0) if isinstance(weight, torch.Tensor) and weight.dim() == 1 else (0, 0)


REMAKE = "make a plan for this model with fxprune.make_plan"
"""The way out where a plan and a model that were passed do not fit."""


def check_is_plan(plan: object) -> None:
    """See that what was passed as a plan is one.

    Raises:
        PlanError: it is not.
    """
    if not isinstance(plan, PrunePlan):
        raise PlanError(
            f"the plan is a {type(plan).__name__}; pass what fxprune.make_plan returned, or PrunePlan.from_json of its "
            "to_json"
        )
