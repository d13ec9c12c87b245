"""Plan which whole filters are removed: find the units, score them, choose, and say what goes in each module."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fxprune.calibration import survey
from fxprune.calibration.subject import Subject
from fxprune.calibration.unit_damage import Reader, StiffReader
from fxprune.channels.removal import Removable, find_removable
from fxprune.channels.units import STAYS, ChannelUnits, Chosen
from fxprune.criteria import Evidence, resolve
from fxprune.criteria.snapshots import load_snapshots
from fxprune.criteria.variety import Array, Redundancy
from fxprune.errors import PlanError
from fxprune.exact.narrowing import CountedError
from fxprune.graph.convolutions import conv_at, convolutions
from fxprune.planning.candidates import best_plan, between, uniform
from fxprune.planning.estimates import SENSITIVITY
from fxprune.planning.latency.filters import FilterTimes
from fxprune.planning.lossy import without_removed
from fxprune.planning.patterns import match_patterns
from fxprune.planning.requests import RECONSTRUCTION, Request
from fxprune.planning.selection import choose_units
from fxprune.planning.sensitivity import Sensitivity
from fxprune.planning.unit_scores import unit_scores, varied
from fxprune.planning.unit_sensitivity import UnitSensitivity, measure_readers, measure_units
from fxprune.plans import PrunePlan, RemovedChannels
from fxprune.plans.eligibility import check_model, check_weight
from fxprune.plans.masking import masked_copy


def plan_filters(subject: Subject, request: Request) -> PrunePlan:
    """Choose the filters to remove. In a user's own module those whose number its code has written into it stay.

    Raises:
        PlanError: the shapes of the model are not known, or so much cannot be removed.
        CalibrationError: the calibration data do not fit the model.
    """
    plans = FilterPlanner(subject).plans(request)
    return best_plan(subject, plans, "ways to spread the filters")


class FilterPlanner:
    """Plans of filters for one model, for several amounts; what its layers read is measured once.

    Args:
        subject: the model.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._readers: dict[str, Reader | StiffReader] | None = None
        self._sensitivity: tuple[bytes, UnitSensitivity] | None = None
        self._times: FilterTimes | None = None

    def plans(self, request: Request, only: str | None = None) -> dict[str, PrunePlan]:
        """Plans of filters, by the way in which the amount is spread over the channel spaces.

        Args:
            request: what is asked for.
            only: one of the ways below, if the others are not wanted.

        One, unless there are a budget and calibration data and nobody says how it is spread: then

        - `"global"`: one ranking of all units, with the reconstruction criterion by the loss for each unit of cost
          saved.
        - `"between"`: with that criterion, by the geometric mean of the loss and one that spreads evenly.
        - `"local"`: the same share of each space.

        Raises:
            PlanError: see `plan_filters`, as for the other.
            CalibrationError: see there.
        """
        subject = self._subject
        measures = request.measures_filters(subject.batches is not None)
        while True:
            removable = removable_of(subject, request.patterns)
            for name, layer in removable.units.layers.items():
                if layer.prunable:
                    check_weight(name, conv_at(subject.layers, name).weight)
            gone = removed_units(removable, request.after)
            if measures and self._readers is None:
                _check_reachable(removable.units, request, gone)
            times = None if request.latency is None else self._timed(request, removable.units)
            if measures:
                worth = _by_error(request, self._measured(request, removable, gone), removable.units, times)
            else:
                worth = _by_criterion(subject, request, removable)
            plans = _plans(subject, request, removable, gone, worth, times, only)
            if not any(is_counted(subject, plan) for plan in plans.values()):
                return plans

    def share_of(self, plan: PrunePlan) -> float:
        """The share of the dense time that the network takes without the filters of a plan with `latency`.

        Raises:
            PlanError: it cannot be measured here.
        """
        assert self._times is not None
        return self._times.share_with(plan)

    def sensitivity(self, request: Request, first: PrunePlan | None) -> tuple[Removable, UnitSensitivity]:
        """The units, and what it costs to remove them in the order in which they go as asked for, whatever their
        scores say of it.

        Args:
            request: what is asked for.
            first: a plan that was made for it: where another criterion than the error decides, what it removes goes
                first.

        Raises:
            PlanError: see `plan_filters`, as for the other.
            CalibrationError: see there.
        """
        removable = removable_of(self._subject, request.patterns)
        units, gone = removable.units, np.zeros(removable.units.count, dtype=np.bool_)
        if request.measures_filters(calibrated=True):
            return removable, self._measured(request, removable, gone)
        scores = _by_criterion(self._subject, request, removable).scores["local"]
        order = np.lexsort((scores, ~removed_units(removable, first), units.space))
        return removable, measure_units(self._known_readers(request, units), units, gone, order)

    def tables(self, request: Request, removable: Removable, found: UnitSensitivity) -> dict[str, Sensitivity]:
        """What the units of each space cost together, by the way in which an amount is spread, see `plans`."""
        return _tables(found, removable.units, _prices(request, found, removable.units, self._times))

    def _measured(self, request: Request, removable: Removable, gone: Chosen) -> UnitSensitivity:
        """The sensitivity of the units, measured anew only where these are others than before."""
        units = removable.units
        readers = self._known_readers(request, units)
        key = b"".join(part.tobytes() for part in (removable.unit_of, gone))
        if self._sensitivity is None or self._sensitivity[0] != key:
            self._sensitivity = key, measure_units(readers, units, gone)
        return self._sensitivity[1]

    def _known_readers(self, request: Request, units: ChannelUnits) -> dict[str, Reader | StiffReader]:
        """What the layers that read units lose without some, measured once."""
        if self._readers is None:
            self._subject.begin(SENSITIVITY)
            self._readers = measure_readers(self._subject, units, request.seed, request.progress)
        return self._readers

    def _timed(self, request: Request, units: ChannelUnits) -> FilterTimes:
        """The times of the network, measured once."""
        if self._times is None:
            self._times = FilterTimes(self._subject, request, units)
        return self._times


@dataclass(frozen=True)
class _Worth:
    """What units are worth.

    Attributes:
        scores: `(U,)`, by the way in which they spread an amount, see `FilterPlanner.plans`.
        criterion: its name.
        comparable: whether they have one scale in all spaces.
    """

    scores: Mapping[str, Array]
    criterion: str
    comparable: bool


def _check_reachable(units: ChannelUnits, request: Request, gone: Chosen) -> None:
    """See that so much can be removed, whatever it is worth, before anything is measured.

    Raises:
        PlanError: it cannot be.
    """
    if units.count and (request.budgets or request.latency is None):
        choose_units(units, np.ones(units.count), replace(request, latency=None, latency_table=None), gone)


def _plans(
    subject: Subject,
    request: Request,
    removable: Removable,
    gone: Chosen,
    worth: _Worth,
    times: FilterTimes | None,
    only: str | None,
) -> dict[str, PrunePlan]:
    model, units = subject.layers, removable.units
    found: dict[str, PrunePlan] = {}
    taken: list[Chosen] = []
    judged = request.scope is None and request.has_budget and subject.batches is not None
    ways = tuple(worth.scores) if judged else (request.scope or "local",)
    for way in (only,) if only in ways else ways:
        scores, criterion = worth.scores[way], worth.criterion
        asked = replace(request, scope="local" if way == "local" else "global")
        redundancies: tuple[Redundancy, ...] = ()
        if request.rule is not None:
            first = (
                choose_units(units, scores, asked, gone, worth.comparable, None if times is None else times.by_width)
                if units.count
                else np.zeros(0, dtype=np.bool_)
            )
            scores, redundancies = varied(model, units, scores, request.rule, first)
            criterion = f"{criterion}, variety {request.rule.rule}"
        chosen, remarks = _chosen(removable, scores, asked, gone, worth.comparable, times)
        if any(np.array_equal(chosen, other) for other in taken):
            continue
        taken.append(chosen)
        found[way] = plan_of_units(subject, request, removable, chosen, f"filter, {way}", criterion, redundancies)
        found[way] = replace(found[way], remarks=remarks)
    return found


def is_counted(subject: Subject, plan: PrunePlan) -> bool:
    """Whether the code of a user's own module has numbers of channels written into it that a plan changes. They are
    noted in the subject, and stay when it is planned for anew.

    Raises:
        CountedError: they were noted before.
    """
    if not subject.is_recorded:
        return False
    try:
        without_removed(subject, masked_copy(subject.model, plan), plan)
    except CountedError as error:
        if error.nodes.keys() <= subject.counted.keys():
            raise
        subject.counted.update(error.nodes)
        return True
    return False


def plan_of_units(
    subject: Subject,
    request: Request,
    removable: Removable,
    chosen: Chosen,
    method: str,
    criterion: str,
    redundancies: tuple[Redundancy, ...] = (),
) -> PrunePlan:
    """The plan that removes the units that are `chosen (U,)`."""
    units = removable.units
    uncalled = {name: why for name, why in subject.obstacles.items() if name not in units.layers}
    return PrunePlan(
        {},
        {**uncalled, **units.fixed},
        {} if request.filter_ratio is None else request.filter_ratio,
        method,
        criterion,
        request.seed,
        removed=_annotated(removable, removable.removed(chosen), request.filter_ratio, redundancies),
    )


def _chosen(
    removable: Removable, scores: Array, request: Request, gone: Chosen, comparable: bool, times: FilterTimes | None
) -> tuple[Chosen, tuple[str, ...]]:
    """The units that go, and what is to be said of it."""
    units = removable.units
    if not units.count:
        return np.zeros(0, dtype=np.bool_), ()
    if times is None:
        return choose_units(units, scores, request, gone, comparable), ()
    return times.meet(removable, scores, request, gone, comparable)


def _by_criterion(subject: Subject, request: Request, removable: Removable) -> _Worth:
    model = subject.layers
    moments = _moments(subject, removable, request)
    earlier = () if request.snapshots is None else load_snapshots(request.snapshots, model)
    evidence = Evidence(model, next(iter(earlier), None), moments, request.seed)
    criterion, score = resolve("l2" if request.criterion is None else request.criterion, evidence)
    scores = unit_scores(model, removable.units, score, criterion)
    return _Worth({"global": scores, "local": scores}, criterion, comparable=False)


def _by_error(request: Request, found: UnitSensitivity, units: ChannelUnits, times: FilterTimes | None) -> _Worth:
    if not request.has_budget:
        scores = found.scores(found.table, None)
        return _Worth({"global": scores, "local": scores}, RECONSTRUCTION, comparable=True)
    prices = _prices(request, found, units, times)
    tables = _tables(found, units, prices)
    scores = found.scores(tables["global"], prices)
    mean = found.scores(tables["between"], prices)
    return _Worth({"global": scores, "between": mean, "local": scores}, RECONSTRUCTION, comparable=True)


def _tables(found: UnitSensitivity, units: ChannelUnits, prices: Array) -> dict[str, Sensitivity]:
    """The losses that lead to each way to spread an amount, where one unit of each space saves `prices` `(S,)`."""
    sizes = np.bincount(units.space, minlength=len(units.names))
    costs = dict(zip(units.names, (prices * sizes).tolist(), strict=True))
    even = uniform(found.table, costs)
    return {"global": found.table, "between": between(found.table, even), "local": even}


def _prices(request: Request, found: UnitSensitivity, units: ChannelUnits, times: FilterTimes | None) -> Array:
    """What one unit of each space saves, `(S,)`: of the one budget, or of several, by how much each has to save."""
    if len(request.shares) == 1 and request.budgets:
        return found.prices(next(iter(request.budgets)))
    saved = [
        (1 - share) * found.prices(cost) / max(1, getattr(found.table, cost)) for cost, share in request.budgets.items()
    ]
    if times is not None and request.latency is not None:
        saved.append((1 - request.latency) * times.prices(units))
    return np.asarray(sum(saved, np.zeros(len(units.names))))


def removable_of(subject: Subject, ignore: Iterable[str] = ()) -> Removable:
    """The units of filters of a model.

    Args:
        subject: the model.
        ignore: patterns of layers whose filters stay.

    Raises:
        PlanError: the shapes of the model are not known, it has no convolution, or a pattern matches none.
    """
    model = subject.layers
    check_model(model)
    convs = list(convolutions(model))
    if not convs:
        raise PlanError(f"{type(model).__name__} has no convolution; fxprune prunes only these")
    if not subject.trace.inputs:
        raise PlanError(
            "which channels go together depends on the shapes of the model, and no usual input size fits it; pass "
            "example_inputs"
        )
    ignored = match_patterns("ignore", dict.fromkeys(ignore, True), convs)
    graph, values = subject.trace.module, subject.trace.values
    return find_removable(graph, values, subject.costs, ignored.keys(), subject.obstacles, subject.counted)


def _moments(subject: Subject, removable: Removable, request: Request) -> dict[str, Tensor] | None:
    """Second moments of what the prunable convolutions read, if the criterion may ask for them."""
    if subject.batches is None or (isinstance(request.criterion, str | None) and request.criterion != "activation"):
        return None
    names = [name for name, layer in removable.units.layers.items() if layer.prunable]
    graph = subject.network
    samples = survey(graph, subject.network_batches or [], names, seed=request.seed, progress=request.progress)
    return {name: sample.second_moment(conv_at(graph, name).in_channels) for name, sample in samples}


def removed_units(removable: Removable, after: PrunePlan | None) -> Chosen:
    """The units that an earlier plan removed, `(U,)`."""
    gone = np.zeros(removable.units.count, dtype=np.bool_)
    for entry in removable.entries:
        channels = None if after is None else after.removed.get(entry.name)
        if channels is not None:
            units = removable.unit_of[entry.atoms[list(getattr(channels, entry.kind))]]
            gone[units[units != STAYS]] = True
    return gone


def _annotated(
    removable: Removable,
    removed: dict[str, RemovedChannels],
    asked: float | Mapping[str, float] | None,
    redundancies: tuple[Redundancy, ...],
) -> dict[str, RemovedChannels]:
    """The same with what was asked for and found in each convolution that was free to lose filters."""
    layers = removable.units.layers
    free = {name: np.unique(layer.writes[layer.writes != STAYS]) for name, layer in layers.items() if layer.prunable}
    names = [*(name for name in free if len(free[name])), *removable.units.fixed]
    ratios = match_patterns("ratio", asked, names) if isinstance(asked, Mapping) else {}
    for name, units in free.items():
        if name not in removed or not removed[name].outputs:
            continue
        share = len(removed[name].outputs) / len(layers[name].writes)
        ratio = share if asked is None else ratios.get(name, share) if isinstance(asked, Mapping) else asked
        spaces = removable.units.space[units]
        redundancy = float(np.mean([redundancies[space].share for space in spaces])) if redundancies else None
        removed[name] = replace(removed[name], asked_ratio=ratio, redundancy=redundancy)
    return removed
