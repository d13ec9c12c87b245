"""How much each convolution suffers as it is pruned, measured on calibration data, and the ratios that meet a budget.

The damage of pruning one layer is the squared error that a refit leaves, on images that it does not see
(`fxprune.calibration.damage`), relative to the variance of what the next layer reads: after the BatchNorm and the
addition that follow, and what a rectifier lets through. Two convolutions with the same error of their own differ by
far in what they do to a residual stream, and only the latter counts. So what a layer inside of a branch suffers is
multiplied by the share of the branch in the sum, or concatenation, in which it ends (`fxprune.calibration.joins`).

A budget is met by taking channels from the layer where the loss for each multiply-accumulate saved is least, again and
again: the greedy solution of the Lagrangian, optimal where the loss is convex. The loss of a layer is
`-log(1 - damage)`: what is left of the signal, `1 - damage`, multiplies from layer to layer. For small damages that is
their sum. It keeps a budget from emptying one layer because its damage, measured alone, cannot exceed 1: the deep
layers of a VGG-16 for ten classes can each be replaced by a handful of channels, but not one after the other.
"""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import fx, nn
from tqdm import tqdm

from fxprune.calibration.batches import Batch
from fxprune.calibration.damage import LEAST_SIGNAL, damage_path, loss_of
from fxprune.calibration.following import Bounds
from fxprune.calibration.samples import MAX_ROWS, Samples
from fxprune.calibration.stages import Run
from fxprune.calibration.survey import measured
from fxprune.errors import PlanError
from fxprune.graph.convolutions import Layer, conv_at, convolutions, kernels_of
from fxprune.methods import Matrix, cocluster
from fxprune.plans.fields import check_share
from fxprune.plans.shapes import kept_channels, unit_of
from fxprune.tables import Bar, Column, Table, Tabular

Cost = Literal["macs", "params"]

# How close a budget is met, relative to it, and how far above it the search goes on.
TOLERANCE = 0.01
ENOUGH = 0.001
# Channels are taken in steps of this share of a layer, but at least one at a time.
STEP = 1 / 32
FLOOR = 1 / 16
"""Share of its channels that a budget leaves each layer while others have more, as for whole filters: a layer that is
nearly empty is a bottleneck that no other makes up for ("layer collapse" of Tanaka, Kunin, Yamins, Ganguli, NeurIPS
2020), and it was measured with a network around it that was whole."""
SHOWN = (0.25, 0.5, 0.75)
"""Ratios that the printed table shows."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What pruning does to one convolution, the rest of the network dense.

    Attributes:
        name: module path.
        groups: number of groups that the damage was measured with.
        macs, params: of the weight of the dense layer, one image; a bias stays whatever is pruned.
        damage: `(C,)` entry `k - 1` is the squared error of the output if each group keeps `k` channels, relative to
            the variance of what the next layer reads.

    Raises:
        PlanError: a number is none, negative or not finite.
    """

    name: str
    groups: int
    macs: int
    params: int
    damage: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the rules above."""
        if not isinstance(self.name, str):
            raise PlanError(f"sensitivity: the name of a layer is {self.name!r}; it must be the path of a module")
        for what, least in (("groups", 1), ("macs", 0), ("params", 0)):
            _check_count(f"sensitivity of {self.name}: {what}", getattr(self, what), least)
        for value in self.damage or (None,):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise PlanError(
                    f"sensitivity of {self.name}: a damage is {value!r}; there must be a finite number, 0 or more, for "
                    "each number of channels"
                )

    def at(self, ratio: float) -> float:
        """The damage at a ratio in `[0, 1)`."""
        return self.damage[kept_channels(len(self.damage), ratio) - 1]


@dataclass(frozen=True, repr=False)
class Sensitivity(Tabular):
    """The sensitivity of each convolution of a network. `str()` is a table, `plot` a picture, `to_json` keeps it.

    Attributes:
        layers: the convolutions that can be pruned.
        macs, params: of the whole network, as `fxprune.report` counts them.

    Raises:
        PlanError: `macs` or `params` is no count.
    """

    layers: tuple[LayerSensitivity, ...]
    macs: int
    params: int

    def __post_init__(self) -> None:
        """Check the rules above."""
        for what in ("macs", "params"):
            _check_count(f"sensitivity: {what}", getattr(self, what), 0)

    def brief(self) -> str:
        """What is in it, in a few words."""
        return f"{len(self.layers)} layers of a network of {self.macs:,} MACs and {self.params:,} parameters"

    def table(self) -> Table:
        """One line for each layer: its share of the MACs, and the damage at a few ratios."""
        columns = (
            Column("layer", right=False),
            Column("groups", goes=2),
            Column("MACs"),
            Column("params", goes=1),
            *(Column(f"at {ratio:.2f}") for ratio in SHOWN),
        )
        worst = max([LEAST_SIGNAL, *(layer.at(ratio) for layer in self.layers for ratio in SHOWN)])
        return Table(
            columns,
            tuple(
                (
                    layer.name,
                    str(layer.groups),
                    Bar(f"{layer.macs / max(1, self.macs):.1%}", layer.macs / max(1, self.macs)),
                    f"{layer.params / max(1, self.params):.1%}",
                    *(Bar(f"{layer.at(ratio):.2%}", layer.at(ratio) / worst) for ratio in SHOWN),
                )
                for layer in self.layers
            ),
        )

    def among(self, model: nn.Module, names: Collection[str]) -> "Sensitivity":
        """The same table if only the convolutions `names` of `model` can be pruned.

        Raises:
            PlanError: the table was measured on another model.
        """
        convs = convolutions(model)
        for layer in self.layers:
            conv = convs.get(layer.name)
            found = None if conv is None else (conv.in_channels, conv.weight.numel())
            if found != (len(layer.damage), layer.params):
                has = (
                    "no such convolution"
                    if found is None
                    else "a convolution of {} channels and {} weights there".format(*found)
                )
                raise PlanError(
                    f"sensitivity: {layer.name} has {len(layer.damage)} channels and {layer.params} weights, but "
                    f"{type(model).__name__} has {has}; measure this model with fxprune.measure_sensitivity"
                )
        return replace(self, layers=tuple(layer for layer in self.layers if layer.name in names))

    def ratios(self, share: float, cost: Cost = "macs", block: int = 1) -> dict[str, float]:
        """The ratio of each layer with which `share` of the cost of the whole network remains, at the least damage.

        Args:
            share: in `(0, 1]`, of the MACs or parameters of the dense network.
            cost: which of the two.
            block: channels go in blocks of this many, in the layers that divide into them.

        Raises:
            PlanError: `share` is out of range, or cannot be reached within 1 %; the message says how near one comes.
        """
        check_share(share, cost)
        total = self.macs if cost == "macs" else self.params
        price = {layer.name: getattr(layer, cost) / len(layer.damage) for layer in self.layers}
        kept = {layer.name: len(layer.damage) for layer in self.layers}
        spent = float(total)
        while (surplus := spent - share * total) > ENOUGH * share * total:
            # The last step is as small as will do. Where the channels of one layer are too dear, those of another fill
            # the gap; where all are, the nearest is the best.
            beyond = TOLERANCE * share * total
            moves = self._steps(kept, price, surplus, surplus + beyond / 2, block, FLOOR)
            for floor in (FLOOR, 0.0):  # below the floor only where nothing else is left
                if not moves and surplus > beyond:
                    moves = self._steps(kept, price, surplus, 2 * surplus, block, floor)
            if not moves:
                break
            _, count, name = min(moves)
            kept[name] -= count
            spent -= count * price[name]
        if abs(spent / (share * total) - 1) > TOLERANCE:
            whole = "whole channels" if block == 1 else f"blocks of {block} channels"
            raise PlanError(
                f"{cost}={share:.4g} cannot be met within {TOLERANCE:.0%} by removing {whole} from the "
                f"{len(self.layers)} convolutions that can be pruned; the nearest share is {spent / total:.4g}: "
                "ask for that, or let more layers be pruned"
            )
        return {layer.name: 1 - kept[layer.name] / len(layer.damage) for layer in self.layers}

    def check_reachable(self, share: float, cost: Cost, block: int = 1) -> None:
        """See that a share of the whole network can be met, whatever the damage.

        Args:
            share, cost, block: see `ratios`.

        Raises:
            PlanError: more than that remains with the least in every layer.
        """
        if share < 1 and not self.layers:
            raise PlanError(
                f"{cost}={share:.4g} cannot be reached by kernels: no convolution can be pruned; let some be"
            )
        total = max(1, self.macs if cost == "macs" else self.params)
        sizes = [len(layer.damage) for layer in self.layers]
        shares = (1 - unit_of(size, block) / size for size in sizes)
        most = sum(getattr(layer, cost) * share for layer, share in zip(self.layers, shares, strict=True))
        if (least := 1 - most / total) > share * (1 + TOLERANCE):
            raise PlanError(
                f"{cost}={share:.4g} cannot be reached by kernels: with all but the least that each group of the "
                f"{len(self.layers)} convolutions that can be pruned needs removed, {least:.4g} remains; ask for more "
                "than that, or let more layers be pruned"
            )

    def _steps(
        self,
        kept: Mapping[str, int],
        price: Mapping[str, float],
        surplus: float,
        most: float,
        block: int,
        floor: float,
    ) -> list[tuple[float, int, str]]:
        """For each layer that has a next step: the damage for each unit of cost that it saves, its channels, and the
        layer. A step saves about `surplus` if it can, but never more than `most`, and leaves `floor` of the layer.
        """
        steps = []
        for layer in self.layers:
            size = len(layer.damage)
            unit = unit_of(size, block)
            left, cost = kept[layer.name], price[layer.name] * unit
            if not cost:
                continue
            step = max(1, int(STEP * size / unit)), max(1, round(surplus / cost))
            least = max(1, math.ceil(floor * size / unit))
            count = unit * min(*step, int(most / cost), left // unit - least)
            if count >= 1:
                loss = loss_of(layer.damage[left - count - 1]) - loss_of(layer.damage[left - 1])
                steps.append((loss / (count * price[layer.name]), count, layer.name))
        return steps

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the damage of each layer against its ratio into a picture file; needs matplotlib.

        Raises:
            PlanError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise PlanError("a plot needs matplotlib; pip install matplotlib") from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        visible = any(layer.damage[0] > 0 for layer in self.layers)
        scale = "log" if visible else "linear"
        axes = figure.add_subplot(xlabel="ratio", ylabel="relative squared error", yscale=scale)
        for layer in self.layers:
            channels = len(layer.damage)
            axes.plot([1 - k / channels for k in range(1, channels)], layer.damage[:-1], label=layer.name)
        if 0 < len(self.layers) <= 24:
            axes.legend(fontsize="x-small", ncols=2)
        figure.savefig(path)

    def to_json(self) -> str:
        """The table as JSON text; `from_json` gives an equal one back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Sensitivity":
        """Undo `to_json`.

        Raises:
            PlanError: the text is not a sensitivity table.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            layers = [LayerSensitivity(**{**layer, "damage": tuple(layer["damage"])}) for layer in data["layers"]]
            return cls(tuple(layers), data["macs"], data["params"])
        except (TypeError, ValueError, KeyError, PlanError) as error:
            raise PlanError(
                f"the text is no sensitivity table: {error!r}; write it with Sensitivity.to_json"
            ) from error


def unmeasured(dense: nn.Module, groups: Mapping[str, int], costs: Mapping[str, tuple[int, int | None]]) -> Sensitivity:
    """The table of convolutions before anything is measured: what they cost, and no damage.

    Args:
        dense: the network.
        groups: number of groups of each convolution to measure, by module path.
        costs: parameters and MACs of all layers, as `fxprune.graph.costs.layer_costs` counts them.

    Raises:
        PlanError: the MACs are not known, for lack of an example input.
    """
    if any(macs is None for _, macs in costs.values()):
        raise PlanError("the MACs of the model are not known: no usual input size fits it; pass example_inputs")
    weights = {name: kernels_of(conv_at(dense, name)) for name in groups}
    layers = (
        LayerSensitivity(name, groups[name], costs[name][1] or 0, weight.numel(), (0.0,) * weight.shape[1])
        for name, weight in weights.items()
    )
    return Sensitivity(
        tuple(layers),
        macs=sum(macs or 0 for _, macs in costs.values()),
        params=sum(p.numel() for p in dense.parameters()),
    )


def measure(
    table: Sensitivity,
    dense: fx.GraphModule,
    batches: Sequence[Batch] | None,
    *,
    seed: int = 0,
    rows: int = MAX_ROWS,
    progress: bool | Run = False,
) -> Sensitivity:
    """Measure the sensitivity of convolutions, each with the rest of the network dense.

    Args:
        table: names them, see `unmeasured`.
        dense: the network, traced.
        batches: calibration data. Without them the damage is the share of weight energy lost, a poor substitute: it
            knows nothing of what the network does with the output.
        seed: of the positions and of the clustering.
        rows: about how many positions are drawn for each at most.
        progress: show a bar on stderr.

    Raises:
        CalibrationError: the data do not fit the model.
    """
    groups = {layer.name: layer.groups for layer in table.layers}
    damages = (
        _from_weights(dense, groups, seed, progress)
        if batches is None
        else _from_data(dense, groups, batches, seed, rows, progress)
    )
    return replace(table, layers=tuple(replace(layer, damage=damages[layer.name]) for layer in table.layers))


def _from_data(
    dense: fx.GraphModule,
    groups: Mapping[str, int],
    batches: Sequence[Batch],
    seed: int,
    rows: int,
    progress: bool | Run,
) -> dict[str, tuple[float, ...]]:
    def path(name: str, conv: Layer, samples: Samples, bounds: Bounds | None) -> Matrix:
        return damage_path(kernels_of(conv), samples, groups[name], seed, bounds)

    found = measured(dense, batches, groups, path, seed=seed, rows=rows, progress=progress)
    return {name: _falling(damage * share) for name, (damage, share) in found.items()}


def _from_weights(
    dense: fx.GraphModule, groups: Mapping[str, int], seed: int, progress: bool | Run
) -> dict[str, tuple[float, ...]]:
    damages = {}
    for name in tqdm(groups, desc="measuring", unit="conv", disable=progress is not True):
        weight = kernels_of(conv_at(dense, name)).detach().double().cpu()
        energy = weight.square().sum(tuple(range(2, weight.dim()))).numpy()
        found = cocluster(energy, groups[name], max(1, energy.shape[1] // 2), seed=seed)
        totals = energy[np.array(found.out_order).reshape(groups[name], -1)].sum(1)  # (n, C)
        kept = np.sort(totals, axis=1)[:, ::-1].sum(0).cumsum()
        damages[name] = _falling(1 - kept / max(kept[-1], np.finfo(np.float64).tiny))
    return damages


def _falling(damage: Matrix) -> tuple[float, ...]:
    """The damage as it must be, 0 or more and never rising with the channels kept: rounding may make it otherwise."""
    return tuple(np.maximum.accumulate(np.maximum(damage, 0)[::-1])[::-1].tolist())


def _check_count(what: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{what} is {value!r}; it must be an integer, {least} or more")
