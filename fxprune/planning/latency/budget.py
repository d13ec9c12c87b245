"""The ratio, groups and form of each layer with which a share of the dense latency remains, at the least damage.

Single layers are timed once (`measure`); the whole network is measured with each choice, and the choice
corrected (`meeting`).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from torch import nn

from fxprune.calibration.subject import Subject
from fxprune.errors import PlanError
from fxprune.graph.convolutions import Convolution, conv_at, convolutions, kernels_of
from fxprune.methods import Matrix, cocluster
from fxprune.planning.latency.measure import GROUP_COUNTS, Wanted, measure_layers
from fxprune.planning.latency.meeting import Meeting
from fxprune.planning.latency.network import WholeNetwork
from fxprune.planning.latency.table import LatencyOption, LatencyTable, Limit
from fxprune.planning.patterns import match_patterns, one_each
from fxprune.planning.planner import Planner, prunable_shapes
from fxprune.planning.requests import PUBLISHED, Request
from fxprune.planning.sensitivity import Sensitivity
from fxprune.plans import Form


def meet_latency(
    subject: Subject, request: Request, sensitivity: Sensitivity, writers: Iterable[Collection[str]]
) -> tuple[Request, str]:
    """The request with a ratio and a number of groups for each layer in place of its budgets, and what came of it.

    Args:
        subject: the model, on the device to be fast on, with an example input.
        request: what is asked for.
        sensitivity: of all convolutions that can be pruned.
        writers: see `fxprune.planning.planner.Planner`.

    Raises:
        PlanError: the share cannot be reached, or a table is of another model.
        AccelerationError: the model cannot be accelerated.
    """
    assert request.latency is not None
    network = WholeNetwork.of(subject, request)
    model, inputs = network.model, network.inputs
    counts = group_counts(subject, request)
    table = request.latency_table or measure_layers(network, Wanted(counts))
    table.check(model, inputs, request.runs_in, request.precision)
    form = "overlap" if request.method in PUBLISHED else request.form
    open_ = table.among(counts, form)

    def share_of(choice: Mapping[str, LatencyOption]) -> float:
        planner = Planner(model, request.by_weights(*as_patterns(open_, choice), form), writers=writers)
        return network.share_with(planner.from_weights())

    damage = damages(model, open_, sensitivity, request.seed)
    others = _limits(request, sensitivity)
    meeting = Meeting(
        request.latency,
        choose=lambda share: open_.choose(share, damage, others),
        predicted=open_.predicted,
        damage=lambda choice: _total_damage(open_, choice, damage),
        measure=share_of if table.is_from_here else None,
        least=open_.least,
    )
    met = meeting.met()
    ratios, groups = as_patterns(open_, met.choice)
    planned = request.without_budgets(ratio=ratios, groups=groups)
    return planned, met.told(request.latency, table)


def _limits(request: Request, sensitivity: Sensitivity) -> list[Limit]:
    """The budgets beside the time."""
    return [
        Limit(
            cost, share, {layer.name: getattr(layer, cost) / getattr(sensitivity, cost) for layer in sensitivity.layers}
        )
        for cost, share in request.budgets.items()
    ]


def group_counts(subject: Subject, request: Request) -> dict[str, tuple[int, ...]]:
    """The numbers of groups to time for each convolution that can be pruned."""
    convs = list(convolutions(subject.model))
    asked = request.groups
    wanted = match_patterns("groups", asked, convs) if isinstance(asked, Mapping) else dict.fromkeys(convs, asked)
    shapes = prunable_shapes(subject, request)
    return {name: GROUP_COUNTS if wanted.get(name, "auto") == "auto" else (s.groups,) for name, s in shapes.items()}


def damages(model: nn.Module, table: LatencyTable, sensitivity: Sensitivity, seed: int = 0) -> dict[str, list[float]]:
    """The damage of each option of each layer.

    The sensitivity of a layer is known for one number of groups, in overlap form. For another number and for the
    partition form it is multiplied by the ratio of the weight energies that are lost at the same number of channels.
    That is exact for a sensitivity that was measured on the weights. Against one measured on data, for 2 and 8 groups
    instead of 4 (a network trained on digits, ratios 0.5 and 0.75, 16 to 64 channels): the factor is right within 19 %
    and mostly within 8 %, where damages of layers differ eightyfold.

    Args:
        model: the dense model.
        table: names layers and options.
        sensitivity: of the same layers or more.
        seed: of the clustering.

    Raises:
        PlanError: the sensitivity of a layer is not known.
    """
    known = {layer.name: layer for layer in sensitivity.layers}
    found: dict[str, list[float]] = {}
    for layer in table.layers:
        if layer.name not in known:
            raise PlanError(f"sensitivity: {layer.name} is not in it; measure it with fxprune.measure_sensitivity")
        measured = known[layer.name]
        energies = Energies(conv_at(model, layer.name), seed)
        found[layer.name] = []
        for option in layer.options:
            damage = measured.damage[option.kept - 1] - measured.damage[-1]
            lost = energies.relative(option.form, option.groups, option.kept, measured.groups)
            found[layer.name].append(damage * lost)
    return found


def as_patterns(table: LatencyTable, choice: Mapping[str, LatencyOption]) -> tuple[dict[str, float], dict[str, int]]:
    """Ratio and number of groups by pattern, as `fxprune.planning.planner.Planner` reads them: each matches one
    module only, the dense ones too.
    """
    ratios = {layer.name: choice[layer.name].ratio if layer.name in choice else 0.0 for layer in table.layers}
    return one_each(ratios), one_each({name: option.groups for name, option in choice.items()})


class Energies:
    """The weight energies of one convolution that are lost in different numbers of groups.

    Args:
        conv: dense.
        seed: of the clustering.
    """

    def __init__(self, conv: Convolution, seed: int) -> None:
        weight = kernels_of(conv).detach().double().cpu()
        self._energy: Matrix = weight.square().flatten(2).sum(2).numpy()
        self._seed = seed
        self._known: dict[int, Matrix] = {}

    def relative(self, form: Form, groups: int, kept: int, usual: int) -> float:
        """What is lost with so many groups that keep so many channels, relative to the overlap form with another
        number of groups and the same channels.
        """
        if form == "overlap" and groups == usual:
            return 1.0
        before, now = float(self._lost(usual)[kept - 1]), float(self._lost(groups)[kept - 1])
        if form == "partition":
            clusters = cocluster(self._energy, groups, kept, "partition", self._seed)
            rows = np.array(clusters.out_order).reshape(groups, -1, 1)
            now = 1 - float(self._energy[rows, np.array(clusters.kept)[:, None]].sum()) / self._total
        return now / before if before > 0 else 1.0

    def _lost(self, groups: int) -> Matrix:
        """`(C,)`: the share of the energy that is lost where each group keeps 1 to `C` channels."""
        if groups not in self._known:
            clusters = cocluster(self._energy, groups, max(1, self._energy.shape[1] // 2), seed=self._seed)
            totals = self._energy[np.array(clusters.out_order).reshape(groups, -1)].sum(1)  # (n, C)
            kept: Matrix = np.sort(totals, axis=1)[:, ::-1].sum(0).cumsum()
            self._known[groups] = np.maximum(0, 1 - kept / self._total)
        return self._known[groups]

    @property
    def _total(self) -> float:
        return max(float(self._energy.sum()), np.finfo(np.float64).tiny)


def _total_damage(
    table: LatencyTable, choice: Mapping[str, LatencyOption], damage: Mapping[str, Sequence[float]]
) -> float:
    return sum(
        cost
        for layer in table.layers
        for option, cost in zip(layer.options, damage[layer.name], strict=True)
        if choice.get(layer.name) == option
    )
