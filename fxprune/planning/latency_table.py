"""Times of the convolutions of a network at each ratio and number of groups, and the choice that meets a latency at the
least damage.

One choice for each layer, least total damage, bounded total time: a multiple-choice knapsack (Kellerer, Pferschy,
Pisinger, "Knapsack Problems", Springer 2004, chapter 11), solved exactly as an integer program.
"""

import contextlib
import ctypes
import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.errors import PlanError
from fxprune.graph.convolutions import convolutions
from fxprune.plans import Form
from fxprune.tables import Bar, Cell, Column, Table, Tabular

# A share is met if the whole network exceeds it by no more than this. If its time is further than this from what was
# predicted, the prediction is corrected, so many times at most.
TOLERANCE = 0.05
# HiGHS ends at an absolute gap of 1e-6, which must be nothing beside the smallest damage that matters.
DAMAGE_SCALE = 1e4
# Of a sum of seconds in another order.
ROUNDING = 1e-9
SHOWN = (1 / 4, 1 / 2, 3 / 4)
"""Ratios that the printed table shows."""


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
        dtype, memory_format: what was timed. The format is that in which the network can become fastest.
        input_shapes: of the example.
        seconds: of the best dense form of the whole network, as `fxprune.accelerate` makes it.
        rest: seconds of all that is in no layer of the table.
        layers: the convolutions that can be pruned.

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

    def __post_init__(self) -> None:
        """Check the rules above."""
        _check_number("seconds", self.seconds, 0)
        if self.rest != 0:
            _check_number("rest", self.rest, 0)

    def brief(self) -> str:
        """What is in it, in a few words."""
        return (
            f"{len(self.layers)} layers, {1e3 * self.seconds:.2f} ms dense on {self.device} in {self.dtype}; at least "
            f"{self.least:.2f} of it must remain"
        )

    def table(self) -> Table:
        """One line for each layer: its share of the time, and the fastest option at a few ratios."""
        columns = (
            Column("layer", right=False),
            Column("dense ms"),
            Column("share", goes=1),
            *(Column(f"at {ratio:.2f}") for ratio in SHOWN),
        )
        rows: list[tuple[Cell, ...]] = []
        for layer in self.layers:
            cells: list[Cell] = []
            for ratio in SHOWN:
                options = [option for option in layer.options if option.ratio == ratio]
                best = min(options, key=lambda option: option.seconds, default=None)
                relative = 0.0 if best is None else best.seconds / layer.seconds
                cells.append("-" if best is None else Bar(f"{relative:.2f} {best.form} {best.groups}", relative))
            share = layer.seconds / self.seconds
            rows.append((layer.name, f"{1e3 * layer.seconds:.3f}", Bar(f"{share:.1%}", share), *cells))
        before = (
            f"whole network: {1e3 * self.seconds:.2f} ms dense, {1e3 * self.rest:.2f} ms of it in no layer below; at "
            f"least {self.least:.2f} of it must remain",
            f"{self.dtype} on {self.device}, {self.memory_format}; at each ratio: the time relative to dense, form and "
            "number of groups of the fastest option",
        )
        return Table(columns, tuple(rows), before)

    @property
    def least(self) -> float:
        """The least share of the dense time that can be reached, by the table."""
        return (self.rest + sum(layer.least for layer in self.layers)) / self.seconds

    def among(
        self, model: nn.Module, inputs: tuple[Any, ...], counts: Mapping[str, Collection[int]], form: str
    ) -> "LatencyTable":
        """The same table if only some of its options are open.

        Args:
            model: what the table must have been measured on.
            inputs: arguments of forward, of the sizes that it must have been measured with.
            counts: numbers of groups, by the name of each convolution that can be pruned.
            form: `"overlap"` for this form only; with `"auto"` the partition form stands for the overlap form of the
                same ratio and number of groups, as in `fxprune.plans.shapes.choose_shape`.

        Raises:
            PlanError: the table is of another model, device, type or input size.
        """
        convs = convolutions(model)
        remedy = "measure again with fxprune.measure_latency"
        for layer in self.layers:
            conv = convs.get(layer.name)
            if conv is None or (conv.out_channels, conv.in_channels) != (layer.filters, layer.channels):
                found = "none" if conv is None else f"one of {conv.out_channels} and {conv.in_channels}"
                raise PlanError(
                    f"latency table: {layer.name} is a convolution of {layer.filters} filters and {layer.channels} "
                    f"channels, but {type(model).__name__} has {found} there; {remedy}"
                )
        for measured, now in zip((self.device, self.dtype, self.input_shapes), setting(model, inputs), strict=True):
            if measured != now:
                raise PlanError(f"latency table: it was measured for {measured}, but this is {now}; {remedy}")
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

    def choose(self, share: float, damage: Mapping[str, Sequence[float]]) -> dict[str, LatencyOption]:
        """The options with the least total damage that leave at most `share` of the dense time, by layer; what is not
        named stays dense.

        Args:
            share: in `(0, 1]`. The dense network itself is a share of 1.
            damage: of each option of each layer, in the order of the table. That of the dense form is 0.

        Raises:
            PlanError: `share` is out of range or cannot be reached; the message says what can.
        """
        check_latency(share)
        if share == 1 or self.predicted({}) <= share:
            return {}
        if self.least > share * (1 + ROUNDING):
            raise PlanError(
                f"latency={share:.4g} cannot be reached: with the fastest form of each of the {len(self.layers)} "
                f"convolutions that can be pruned, {min(1.0, math.ceil(1e4 * self.least) / 1e4):.4g} of the dense time "
                "remains; ask for that or more, or let more layers be pruned"
            )
        names, options, seconds, costs = zip(*self._worthwhile(damage), strict=True)
        # x[i] is 1 if option i is taken: one of each layer, all within the time.
        rows = np.unique(names, return_inverse=True)[1]
        one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
        with _silent():
            result = milp(
                np.array(costs) * DAMAGE_SCALE / (max(costs) or 1.0),
                integrality=np.ones(len(rows)),
                bounds=(0, 1),
                constraints=[
                    LinearConstraint(one_each, 1, 1),
                    LinearConstraint(np.array([seconds]) / self.seconds, -np.inf, share - self.rest / self.seconds),
                ],
                options={"mip_rel_gap": 0},
            )
        if result.x is None:
            raise PlanError(f"latency={share:.4g}: the integer program was not solved: {result.message}")
        taken = zip(names, options, result.x > 0.5, strict=True)
        return {name: option for name, option, is_taken in taken if is_taken and option is not None}

    def predicted(self, choice: Mapping[str, LatencyOption]) -> float:
        """The share of the dense time that a choice leaves, by the table."""
        layers = ((choice.get(layer.name) or layer).seconds for layer in self.layers)
        return (self.rest + sum(layers)) / self.seconds

    def to_json(self) -> str:
        """The table as JSON text; `from_json` gives an equal one back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LatencyTable":
        """Undo `to_json`.

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
            return cls(**{**data, "layers": layers, "input_shapes": shapes})
        except (TypeError, ValueError, KeyError, PlanError) as error:
            raise PlanError(f"the text is no latency table: {error!r}; write it with LatencyTable.to_json") from error

    def _worthwhile(
        self, damage: Mapping[str, Sequence[float]]
    ) -> Iterator[tuple[str, LatencyOption | None, float, float]]:
        """What may be chosen for each layer, with seconds and damage: None is dense. An option that is no faster than
        one of no more damage is left out, which changes no optimum.
        """
        for layer in self.layers:
            yield layer.name, None, layer.seconds, 0.0
            least = math.inf
            priced = zip(layer.options, damage[layer.name], strict=True)
            for option, cost in sorted(priced, key=lambda pair: (pair[0].seconds, pair[1])):
                if option.seconds < layer.seconds and cost < least:
                    least = cost
                    yield layer.name, option, option.seconds, cost


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what C code prints off the standard output, where the command line may be writing JSON: HiGHS 1.12, of scipy
    1.17, prints a line of its own now and then, whatever its options say.
    """
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is no standard output
        yield
        return
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 1)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, TypeError, AttributeError):  # not on every system
                ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def check_latency(share: object) -> None:
    """See that a share of the latency is one.

    Raises:
        PlanError: it is no number in `(0, 1]`.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise PlanError(f"latency is {share!r}; it must be a share in (0, 1] of the time of the best dense form")


def setting(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[str, str, tuple[tuple[int, ...], ...]]:
    """What times depend on beside the layers: kind of device, type, shapes of the inputs."""
    weight = next(model.parameters())
    shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return weight.device.type, str(weight.dtype).removeprefix("torch."), shapes


def _check_number(what: str, value: object, above: float, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < below:
        raise PlanError(f"latency: {what} is {value!r}; it must be a number between {above} and {below}, exclusive")
