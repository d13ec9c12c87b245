"""Plan which whole filters are removed: find the units, score them, choose, and say what goes in each module."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from fxprune.calibration import survey
from fxprune.calibration.subject import Subject
from fxprune.channels.removal import Removable, find_removable
from fxprune.channels.units import STAYS, Chosen
from fxprune.criteria import Evidence, resolve
from fxprune.criteria.snapshots import load_snapshots
from fxprune.criteria.variety import Redundancy
from fxprune.errors import PlanError
from fxprune.exact.narrowing import CountedError
from fxprune.graph.convolutions import conv_at, convolutions
from fxprune.planning.lossy import without_removed
from fxprune.planning.patterns import match_patterns
from fxprune.planning.requests import Request
from fxprune.planning.selection import choose_units
from fxprune.planning.unit_scores import unit_scores, varied
from fxprune.plans import PrunePlan, RemovedChannels
from fxprune.plans.eligibility import check_model, check_weight
from fxprune.plans.masking import masked_copy


def plan_filters(subject: Subject, request: Request) -> PrunePlan:
    """Choose the filters to remove. In a user's own module those whose number its code has written into it stay.

    Raises:
        PlanError: the shapes of the model are not known, or so much cannot be removed.
    """
    while True:
        plan = _plan(subject, request)
        if not subject.is_recorded:
            return plan
        try:
            without_removed(subject, masked_copy(subject.model, plan), plan)
        except CountedError as error:
            if error.nodes.keys() <= subject.counted.keys():
                raise
            subject.counted.update(error.nodes)
            continue
        return plan


def _plan(subject: Subject, request: Request) -> PrunePlan:
    model = subject.layers
    removable = removable_of(subject, request.patterns)
    units = removable.units
    for name, layer in units.layers.items():
        if layer.prunable:
            check_weight(name, conv_at(model, name).weight)
    moments = _moments(subject, removable, request)
    earlier = () if request.snapshots is None else load_snapshots(request.snapshots, model)
    evidence = Evidence(model, next(iter(earlier), None), moments, request.seed)
    criterion, score = resolve("l2" if request.criterion is None else request.criterion, evidence)
    scores = unit_scores(model, units, score, criterion)
    gone = removed_units(removable, request.after)
    nothing: Chosen = np.zeros(0, dtype=np.bool_)
    chosen = choose_units(units, scores, request, gone) if units.count else nothing
    redundancies: tuple[Redundancy, ...] = ()
    if request.rule is not None:
        scores, redundancies = varied(model, units, scores, request.rule, chosen)
        chosen = choose_units(units, scores, request, gone) if units.count else nothing
        criterion = f"{criterion}, variety {request.rule.rule}"
    removed = _annotated(removable, removable.removed(chosen), request.filter_ratio, redundancies)
    uncalled = {name: why for name, why in subject.obstacles.items() if name not in units.layers}
    return PrunePlan(
        {},
        {**uncalled, **units.fixed},
        {} if request.filter_ratio is None else request.filter_ratio,
        f"filter, {request.scope}",
        criterion,
        request.seed,
        removed=removed,
    )


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
