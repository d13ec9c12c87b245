"""Plan which whole filters are removed: find the units, score them, choose, and say what goes in each module."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from fxprune.calibration import survey
from fxprune.criteria import Criterion, Evidence, ScoreFunction, resolve
from fxprune.eligibility import check_model, check_weight
from fxprune.errors import PlanError
from fxprune.filters.removal import Removable, find_removable
from fxprune.filters.selection import Scope, choose_units, unit_scores, varied
from fxprune.filters.units import STAYS, Chosen
from fxprune.planning import match_patterns
from fxprune.plans import PrunePlan, RemovedChannels
from fxprune.report import layer_costs
from fxprune.snapshots import Snapshot, load_snapshots
from fxprune.subject import Subject, find_obstacles
from fxprune.variety import Array, Redundancy, Variety


def plan_filters(
    model: nn.Module,
    data: Subject,
    *,
    ratio: float | Mapping[str, float] | None,
    macs: float | None,
    params: float | None,
    scope: Scope,
    round_to: int,
    criterion: str | Criterion | ScoreFunction | None,
    variety: str | Variety | None,
    snapshots: Iterable[Snapshot] | None,
    ignore: str | Iterable[str],
    seed: int,
    progress: bool,
    after: PrunePlan | None,
) -> PrunePlan:
    """Choose the filters to remove. Arguments are those of `fxprune.make_plan`.

    Raises:
        PlanError: an argument is not legal, the shapes of the model are not known, or so much cannot be removed.
    """
    removable = removable_of(model, data, ignore)
    units = removable.units
    for name, layer in units.layers.items():
        if layer.prunable:
            check_weight(name, _conv(model, name).weight)
    moments = _moments(data, removable, criterion, seed, progress)
    earlier = () if snapshots is None else load_snapshots(snapshots, model)
    evidence = Evidence(model, next(iter(earlier), None), moments, seed)
    criterion_name, score = resolve("l2" if criterion is None else criterion, evidence)
    scores = unit_scores(model, units, score, criterion_name)
    gone = removed_units(removable, after)
    asked = 0.5 if ratio is None and macs is None and params is None else ratio

    def choose(ranked: Array) -> Chosen:
        if not units.count:
            return np.zeros(0, dtype=np.bool_)
        return choose_units(
            units, ranked, ratio=asked, macs=macs, params=params, scope=scope, round_to=round_to, gone=gone
        )

    chosen = choose(scores)
    redundancies: tuple[Redundancy, ...] = ()
    rule = Variety.parse(variety)
    if rule is not None:
        scores, redundancies = varied(model, units, scores, rule, chosen)
        chosen = choose(scores)
        criterion_name = f"{criterion_name}, variety {rule.rule}"
    removed = _annotated(removable, removable.removed(chosen), asked, redundancies)
    uncalled = {name: why for name, why in find_obstacles(model, data.trace).items() if name not in units.layers}
    return PrunePlan(
        {},
        {**uncalled, **units.fixed},
        {} if asked is None else asked,
        f"filter, {scope}",
        criterion_name,
        seed,
        removed=removed,
    )


def removable_of(model: nn.Module, data: Subject, ignore: str | Iterable[str] = ()) -> Removable:
    """The units of filters of a model.

    Raises:
        PlanError: the shapes of the model are not known, it has no convolution, or a pattern matches none.
    """
    check_model(model)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if not convs:
        raise PlanError(f"{type(model).__name__} has no Conv2d; fxprune prunes only these")
    if not data.trace.inputs:
        raise PlanError(
            "which channels go together depends on the shapes of the model, and no usual input size fits it; pass "
            "example_inputs"
        )
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    ignored = match_patterns("ignore", dict.fromkeys(patterns, True), convs)
    graph, values = data.trace.module, data.trace.values
    return find_removable(graph, values, layer_costs(graph, values), ignored.keys(), find_obstacles(model, data.trace))


def _moments(
    data: Subject, removable: Removable, criterion: object, seed: int, progress: bool
) -> dict[str, Tensor] | None:
    """Second moments of what the prunable convolutions read, if the criterion may ask for them."""
    if data.batches is None or (isinstance(criterion, str | None) and criterion != "activation"):
        return None
    names = [name for name, layer in removable.units.layers.items() if layer.prunable]
    samples = survey(data.trace.module, data.batches, names, seed=seed, progress=progress)
    graph = data.trace.module
    return {name: sample.second_moment(_conv(graph, name).in_channels) for name, sample in samples}


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


def _conv(module: nn.Module, name: str) -> nn.Conv2d:
    conv = module.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv
