"""Times of the convolutions of a network at each ratio and number of groups, and by width, and the choice that meets a
latency at the least damage.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.environment import environment
from fxprune.errors import PlanError
from fxprune.graph.convolutions import convolutions
from fxprune.planning.knapsack import Way, least_damage
from fxprune.planning.latency.grid import LayerGrid, NetworkTimes
from fxprune.plans import Form
from fxprune.plans.fields import check_share
from fxprune.tables import Bar, Cell, Column, Table, Tabular

# A share is met if the whole network exceeds it by no more than this.
TOLERANCE = 0.05
# How near to the share a choice is brought: measured anew it lies up to 3 % elsewhere, and shall be met all the same.
NEAR = 0.02
# Of a sum of seconds in another order.
ROUNDING = 1e-9
SHOWN = (1 / 4, 1 / 2, 3 / 4)
"""Ratios that the printed table shows."""
SHOWN_WIDTHS = (1 / 2, 1 / 4)
"""Widths that it shows."""
PLACE: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "instructions", "threads"), "cuda": ("cuda_device",)}
"""What makes two machines the same one for times, by the kind of device; of `fxprune.environment.environment`."""


@dataclass(frozen=True)
class LatencyOption:
    """One way to prune a convolution, and its time.

    Attributes:
        form, groups, kept: see `fxprune.plans.shapes.Shape`.
        ratio: what to ask for, so that this many channels are kept.
        seconds: of the fastest engine, on the pruned weights.

    Raises:
        PlanError: a value is not legal.
    """

    form: Form
    groups: int
    kept: int
    ratio: float
    seconds: float

    def __post_init__(self) -> None:
        """Check the rules above."""
        if self.form not in get_args(Form):
            raise PlanError(f"latency: the form is {self.form!r}; it must be one of {get_args(Form)}")
        for what in ("groups", "kept"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"latency: {what} is {value!r}; it must be an integer, 1 or more")
        _check_number("ratio", self.ratio, 0, 1)
        _check_number("seconds", self.seconds, 0)


@dataclass(frozen=True)
class LayerLatency:
    """The times of one convolution. If the model calls it several times, the sum.

    Attributes:
        name: module path.
        filters, channels: of the dense convolution.
        seconds: of its fastest dense form.
        options: the ways to prune it.
    """

    name: str
    filters: int
    channels: int
    seconds: float
    options: tuple[LatencyOption, ...]

    def __post_init__(self) -> None:
        """See that the time is one.

        Raises:
            PlanError: it is not positive.
        """
        _check_number(f"{self.name}: seconds", self.seconds, 0)

    @property
    def least(self) -> float:
        """Seconds of the fastest form, dense or pruned."""
        return min([self.seconds, *(option.seconds for option in self.options)])


@dataclass(frozen=True, repr=False)
class LatencyTable(Tabular):
    """Measured times of the convolutions of a network. `str()` is a table, `to_json` keeps it.

    Attributes:
        device: kind of device, see `fxprune.plans.shapes.TARGETS`.
        dtype, memory_format: what was timed; `"int8"` if the network is to be quantized. The format is that in which
            the network can become fastest, and `"own"` in a runtime that chooses it itself.
        input_shapes: of the example.
        seconds: of the best dense form of the whole network in the runtime, as `fxprune.accelerate` makes it.
        rest: seconds of all that is in no layer of the table.
        layers: the convolutions of which kernels can go.
        runtime: what ran it, see `fxprune.accelerate`.
        grids: the convolutions of which filters or inputs can go; none if `granularity="kernel"` was measured.
        lanes: how many channels the processor computes at once; widths between multiples of it save little.
        made: where and when it was made and with what, see `fxprune.environment.environment`, and the version of the
            runtime. Two tables with the same times are equal wherever they were made.

    Raises:
        PlanError: a time is not positive, or not finite.
    """

    device: str
    dtype: str
    memory_format: str
    input_shapes: tuple[tuple[int, ...], ...]
    seconds: float
    rest: float
    layers: tuple[LayerLatency, ...]
    runtime: str = "torch"
    grids: tuple[LayerGrid, ...] = ()
    lanes: int = 8
    made: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Check the rules above."""
        _check_number("seconds", self.seconds, 0)
        if self.rest != 0:
            _check_number("rest", self.rest, 0)
        if isinstance(self.lanes, bool) or not isinstance(self.lanes, int) or self.lanes < 1:
            raise PlanError(f"latency: lanes is {self.lanes!r}; it must be an integer, 1 or more")
        if not isinstance(self.made, Mapping):
            raise PlanError(f"latency: made is a {type(self.made).__name__}; it must say where, in a dict")

    def brief(self) -> str:
        """What is in it, in a few words."""
        count = len({layer.name for layer in self.layers} | {grid.name for grid in self.grids})
        return (
            f"{count} layers, {1e3 * self.seconds:.2f} ms dense on {self.device} in {self.dtype}, {self.runtime}; "
            f"{self._least_of_all}"
        )

    def table(self) -> Table:
        """One line for each layer: its share of the time, the fastest option at a few ratios, and its time at a few
        widths.
        """
        columns = (
            Column("layer", right=False),
            Column("dense ms"),
            Column("share", goes=1),
            *(Column(f"at {ratio:.2f}") for ratio in SHOWN if self.layers),
            *(Column(f"{width:.2f} wide") for width in SHOWN_WIDTHS if self.grids),
        )
        layers = {layer.name: layer for layer in self.layers}
        grids = {grid.name: grid for grid in self.grids}
        rows: list[tuple[Cell, ...]] = []
        for name in {**grids, **layers}:
            layer, grid = layers.get(name), grids.get(name)
            dense = layer.seconds if layer is not None else grids[name].dense
            cells: list[Cell] = []
            for ratio in SHOWN if self.layers else ():
                options = () if layer is None else (option for option in layer.options if option.ratio == ratio)
                best = min(options, key=lambda option: option.seconds, default=None)
                relative = 0.0 if best is None else best.seconds / dense
                cells.append("-" if best is None else Bar(f"{relative:.2f} {best.form} {best.groups}", relative))
            for width in SHOWN_WIDTHS if self.grids else ():
                relative = 0.0 if grid is None else float(grid.at(np.array(width), np.array(width))) / grid.dense
                cells.append("-" if grid is None else Bar(f"{relative:.2f}", relative))
            share = dense / self.seconds
            rows.append((name, f"{1e3 * dense:.3f}", Bar(f"{share:.1%}", share), *cells))
        before = (
            f"whole network: {1e3 * self.seconds:.2f} ms dense, {1e3 * self.rest:.2f} ms of it in no layer of which "
            f"kernels can go; {self._least_of_all}",
            f"{self.dtype} on {self.device}, {self.runtime}, {self.memory_format}; at each ratio: the time relative to "
            "dense, form and number of groups of the fastest option; at each width of inputs and filters: the time",
            f"made on {self.place()}",
        )
        return Table(columns, tuple(rows), before)

    @property
    def where(self) -> str:
        """In what runtime, and in what type unless that is float32."""
        return self.runtime if self.dtype == "float32" else f"{self.runtime} in {self.dtype}"

    def place(self) -> str:
        """Where, when and with what it was made, in words."""
        if not self.made:
            return "a machine that was not noted"
        made = self.made
        processor = made.get("cuda_device") if self.device == "cuda" else made.get("cpu")
        versions = [f"{name} {made[name]}" for name in dict.fromkeys(("torch", self.runtime)) if name in made]
        parts = (processor, made.get("instructions"), f"{made.get('threads')} threads", *versions, made.get("date"))
        return ", ".join(str(part) for part in parts if part)

    @property
    def is_from_here(self) -> bool:
        """Whether it was made on a machine like this one with as many threads, or does not say where; else the times of
        whole networks here have nothing to do with those in it.
        """
        here = environment()
        return all(self.made[name] == here[name] for name in PLACE.get(self.device, ()) if name in self.made)

    @property
    def _least_of_all(self) -> str:
        return f"at least {self.least:.2f} of it must remain if kernels go" if self.layers else "for whole filters"

    @property
    def least(self) -> float:
        """The least share of the dense time that can be reached, by the table."""
        return (self.rest + sum(layer.least for layer in self.layers)) / self.seconds

    def check(self, model: nn.Module, inputs: tuple[Any, ...], runtime: str, precision: str | None = None) -> None:
        """See that the table is of a model.

        Args:
            model: what the table must have been measured on.
            inputs: arguments of forward, of the sizes that it must have been measured with.
            runtime: what it must have been measured in.
            precision: in which precision there; None is that of the model.

        Raises:
            PlanError: the table is of another model, device, type, input size or runtime.
        """
        convs = convolutions(model)
        remedy = "measure again with fxprune.measure_latency"
        sizes = {grid.name: (grid.filters[-1], grid.inputs[-1]) for grid in self.grids}
        sizes |= {layer.name: (layer.filters, layer.channels) for layer in self.layers}
        for name, (filters, channels) in sizes.items():
            conv = convs.get(name)
            if conv is None or (conv.out_channels, conv.in_channels) != (filters, channels):
                found = "none" if conv is None else f"one of {conv.out_channels} and {conv.in_channels}"
                raise PlanError(
                    f"latency table: {name} is a convolution of {filters} filters and {channels} "
                    f"channels, but {type(model).__name__} has {found} there; {remedy}"
                )
        measured = self.device, self.dtype, self.input_shapes, self.runtime
        now = *setting(model, inputs, precision), runtime
        for then, here in zip(measured, now, strict=True):
            if then != here:
                raise PlanError(f"latency table: it was measured for {then}, but this is {here}; {remedy}")

    def among(self, counts: Mapping[str, Collection[int]], form: str) -> "LatencyTable":
        """The same table if only some of its options for kernels are open.

        Args:
            counts: numbers of groups, by the name of each convolution that can be pruned.
            form: `"overlap"` for this form only; with `"auto"` the partition form stands for the overlap form of the
                same ratio and number of groups, as in `fxprune.plans.shapes.choose_shape`.
        """
        layers = []
        for layer in self.layers:
            if layer.name not in counts:
                continue
            legal = [option for option in layer.options if option.groups in counts[layer.name]]
            parted = {(option.groups, option.ratio) for option in legal if option.form == "partition"}
            overlap = [
                o for o in legal if o.form == "overlap" and (form == "overlap" or (o.groups, o.ratio) not in parted)
            ]
            partition = [option for option in legal if option.form == "partition" and form != "overlap"]
            layers.append(replace(layer, options=(*overlap, *partition)))
        left_out = sum(layer.seconds for layer in self.layers if layer.name not in counts)
        return replace(self, layers=tuple(layers), rest=self.rest + left_out)

    def choose(
        self, share: float, damage: Mapping[str, Sequence[float]], others: Sequence["Limit"] = ()
    ) -> dict[str, LatencyOption]:
        """The options with the least total damage that leave at most `share` of the dense time, by layer; what is not
        named stays dense.

        Args:
            share: in `(0, 1]`. The dense network itself is a share of 1.
            damage: of each option of each layer, in the order of the table. That of the dense form is 0.
            others: what else must be kept.

        Raises:
            PlanError: `share` is out of range or cannot be reached, alone or with the others; the message says what
                can.
        """
        check_latency(share)
        if (share == 1 or self.predicted({}) <= share) and all(limit.of(self, {}) <= limit.share for limit in others):
            return {}
        if self.least > share * (1 + ROUNDING) and share < 1:
            raise PlanError(
                f"latency={share:.4g} cannot be reached: with the fastest form of each of the {len(self.layers)} "
                f"convolutions that can be pruned, {min(1.0, math.ceil(1e4 * self.least) / 1e4):.4g} of the dense time "
                "remains; ask for that or more, or let more layers be pruned"
            )
        ways = list(self._worthwhile(damage, others))
        limits = [math.inf if share == 1 else share - self.rest / self.seconds, *(limit.room for limit in others)]
        found = least_damage(ways, limits)
        if isinstance(found, str):
            raise PlanError(self._unreached(share, others, found))
        return {name: option for name, option in found.items() if option is not None}

    def predicted(self, choice: Mapping[str, LatencyOption]) -> float:
        """The share of the dense time that a choice leaves, by the table."""
        layers = ((choice.get(layer.name) or layer).seconds for layer in self.layers)
        return (self.rest + sum(layers)) / self.seconds

    def to_json(self) -> str:
        """The table as JSON text; `from_json` gives an equal one back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LatencyTable":
        """Undo `to_json`. A text of 0.1 is a table for kernels in PyTorch that does not say where it was made.

        Raises:
            PlanError: the text is not a latency table.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            layers = tuple(
                LayerLatency(**{**layer, "options": tuple(LatencyOption(**option) for option in layer["options"])})
                for layer in data["layers"]
            )
            shapes = tuple(tuple(shape) for shape in data["input_shapes"])
            grids = tuple(
                LayerGrid(
                    grid["name"],
                    tuple(grid["inputs"]),
                    tuple(grid["filters"]),
                    tuple(tuple(row) for row in grid["seconds"]),
                )
                for grid in data.get("grids", ())
            )
            return cls(**{**data, "layers": layers, "input_shapes": shapes, "grids": grids})
        except (TypeError, ValueError, KeyError, PlanError) as error:
            raise PlanError(f"the text is no latency table: {error!r}; write it with LatencyTable.to_json") from error

    def by_width(self, names: Sequence[str]) -> NetworkTimes:
        """The time of the network by the widths of its layers.

        Args:
            names: of all layers, in the order of the shares that it is asked for.

        Raises:
            PlanError: there are no times of narrower layers.
        """
        if not self.grids:
            raise PlanError(
                "latency table: it has no times of narrower layers; measure again with fxprune.measure_latency(..., "
                "granularity='filter'), or 'auto'"
            )
        places = {name: place for place, name in enumerate(names)}
        rest = self.rest + sum(layer.seconds for layer in self.layers) - sum(grid.dense for grid in self.grids)
        placed = tuple((places[grid.name], grid) for grid in self.grids if grid.name in places)
        left_out = sum(grid.dense for grid in self.grids if grid.name not in places)
        return NetworkTimes(placed, max(0.0, rest) + left_out, self.lanes)

    def _worthwhile(
        self, damage: Mapping[str, Sequence[float]], others: Sequence["Limit"]
    ) -> Iterator[Way[LatencyOption | None]]:
        """What may be chosen for each layer: None is dense. An option that is no faster than one of no more damage is
        left out where nothing but time counts, which changes no optimum.
        """
        for layer in self.layers:
            yield self._way(layer, None, 0.0, others)
            least = math.inf
            priced = zip(layer.options, damage[layer.name], strict=True)
            for option, cost in sorted(priced, key=lambda pair: (pair[0].seconds, pair[1])):
                if others or (option.seconds < layer.seconds and cost < least):
                    least = cost
                    yield self._way(layer, option, cost, others)

    def _way(
        self, layer: LayerLatency, option: LatencyOption | None, damage: float, others: Sequence["Limit"]
    ) -> Way[LatencyOption | None]:
        seconds = layer.seconds if option is None else min(option.seconds, layer.seconds)
        costs = (limit.dense[layer.name] * _kept(layer, option) for limit in others)
        return Way(layer.name, option, damage, (seconds / self.seconds, *costs))

    def _unreached(self, share: float, others: Sequence["Limit"], message: str) -> str:
        """Why there is no choice."""
        asked = ", ".join([f"latency={share:.4g}", *(f"{limit.name}={limit.share:.4g}" for limit in others)])
        if not others:
            return f"{asked}: the integer program was not solved: {message}"
        smallest = {
            layer.name: min(layer.options, key=lambda option: option.kept, default=None) for layer in self.layers
        }
        least = {name: option for name, option in smallest.items() if option is not None}
        near = ", ".join(f"{limit.name} {limit.of(self, least):.4g}" for limit in others)
        return (
            f"{asked} cannot be met together by kernels of the {len(self.layers)} convolutions that can be pruned; the "
            f"least that each alone can reach is latency {min(1.0, self.least):.4g}, {near}: ask for more"
        )


@dataclass(frozen=True)
class Limit:
    """What beside the time may remain of something that falls with the kernels that are kept.

    Attributes:
        name: `"macs"` or `"params"`.
        share: of the whole network that may remain.
        dense: the share of the whole network that each layer of a table has.
    """

    name: str
    share: float
    dense: Mapping[str, float]

    @property
    def room(self) -> float:
        """What may remain of the layers, as a share of the whole network."""
        return self.share - (1 - sum(self.dense.values()))

    def of(self, table: LatencyTable, choice: Mapping[str, LatencyOption]) -> float:
        """The share of the network that a choice leaves."""
        left = sum(self.dense[layer.name] * _kept(layer, choice.get(layer.name)) for layer in table.layers)
        return 1 - sum(self.dense.values()) + left


def _kept(layer: LayerLatency, option: LatencyOption | None) -> float:
    """The share of its kernels that an option keeps."""
    return 1.0 if option is None else option.kept / layer.channels


def check_latency(share: object) -> None:
    """See that a share of the latency is one.

    Raises:
        PlanError: it is no number in `(0, 1]`.
    """
    check_share(share, "latency", "the time of the best dense form")


def setting(
    model: nn.Module, inputs: tuple[Any, ...], precision: str | None = None
) -> tuple[str, str, tuple[tuple[int, ...], ...]]:
    """What times depend on beside the layers: kind of device, type, shapes of the inputs. A precision is a type."""
    weight = next(model.parameters())
    shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return weight.device.type, precision or str(weight.dtype).removeprefix("torch."), shapes


def _check_number(what: str, value: object, above: float, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < below:
        raise PlanError(f"latency: {what} is {value!r}; it must be a number between {above} and {below}, exclusive")
