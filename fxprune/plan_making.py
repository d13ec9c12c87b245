"""From what was asked for, a ratio, a budget or a latency, to a plan."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fxprune.acceleration import accelerate, acceleration_report
from fxprune.calibration import Calibration, survey
from fxprune.errors import AccelerationError, PlanError, near_matches
from fxprune.filters.planning import plan_filters
from fxprune.filters.selection import Scope
from fxprune.latency import LatencyOption, LatencyTable, as_patterns, check_latency, damages, meet
from fxprune.layer_times import GROUP_COUNTS, measure_layers
from fxprune.planning import PUBLISHED, Planner, match_patterns, resolve_block, resolve_sharing
from fxprune.plans import PrunePlan
from fxprune.sensitivity import Cost, Sensitivity, check_share
from fxprune.shapes import TARGETS, Groups
from fxprune.sharing import common_writers
from fxprune.steps import mask, masked_by, put_back, rewrite, without_removed
from fxprune.subject import Subject, find_obstacles
from fxprune.tracing import Inputs, as_inputs

GRANULARITIES = ("kernel", "filter")
"""What is removed: kernels, so that convolutions become grouped, or whole filters, so that they become narrower."""


def plan_for(
    model: nn.Module,
    data: Subject,
    ratio: float | Mapping[str, float] | None,
    *,
    granularity: str | Mapping[str, float],
    scope: Scope,
    round_to: int,
    after: PrunePlan | None,
    **options: Any,
) -> tuple[PrunePlan, nn.Module | None]:
    """The plan, and the masked model if it was refitted on the way."""
    shares = _by_granularity(granularity, ratio, scope, round_to, after, options)
    if "filter" not in shares:
        return _plan_kernels(model, data, shares["kernel"], **options)
    if after is not None:
        after.check(model)
    common = {name: options[name] for name in ("criterion", "snapshots", "ignore", "seed", "progress")}
    budget = {name: options[name] for name in ("macs", "params")} if "kernel" not in shares else _NO_BUDGET
    variety, progress = options["variety"], options["progress"]
    plan = plan_filters(
        model,
        data,
        ratio=shares["filter"],
        scope=scope,
        round_to=round_to,
        after=after,
        variety=variety,
        **budget,
        **common,
    )
    if "kernel" not in shares:
        return plan, None
    masked = masked_by(model, plan, None if data.batches is None else data, progress=progress)
    smaller = without_removed(masked, plan, data.example_inputs)
    kernels, refitted = _plan_kernels(smaller, data.of(smaller), shares["kernel"], **options)
    together = _joined(plan, kernels)
    if refitted is None:
        return together, None
    put_back(masked, refitted, plan)
    return together, masked


def _joined(filters: PrunePlan, kernels: PrunePlan) -> PrunePlan:
    """One plan of both; why a layer keeps its filters is said beside why it stays dense, or noted."""
    skipped, notes = dict(kernels.skipped), dict(kernels.notes)
    for name, reason in filters.skipped.items():
        said = notes if name in kernels.layers else skipped
        before = f"{said[name]}; " if name in said else ""
        said[name] = f"{before}keeps its filters: {reason}"
    method = f"{filters.method}; {kernels.method}"
    return replace(kernels, removed=filters.removed, ratio={}, method=method, skipped=skipped, notes=notes)


_NO_BUDGET: Mapping[str, None] = {"macs": None, "params": None}


def _by_granularity(
    granularity: str | Mapping[str, float],
    ratio: float | Mapping[str, float] | None,
    scope: Scope,
    round_to: int,
    after: PrunePlan | None,
    options: Mapping[str, Any],
) -> dict[str, float | Mapping[str, float] | None]:
    """The ratio of each granularity, filters first; arguments that the others do not have are refused."""
    names = list(granularity) if isinstance(granularity, Mapping) else [granularity]
    for name in names:
        if name not in GRANULARITIES:
            close = near_matches(str(name), GRANULARITIES)
            raise PlanError(
                f"granularity is {name!r}{close}; it must be 'kernel', 'filter', or map both to their ratios: "
                "granularity={'filter': 0.25, 'kernel': 0.5}"
            )
    if isinstance(granularity, Mapping):
        _check_both(names, ratio, options)
        return {"filter": granularity["filter"], "kernel": granularity["kernel"]}
    if granularity == "filter":
        for name, default in _KERNELS_ONLY.items():
            if options[name] != default:
                raise PlanError(f"{name}={_short(options[name])} is for granularity='kernel'; leave it out for filters")
        if options["latency"] is not None:
            raise PlanError(
                f"latency={options['latency']!r} chooses groups of kernels; give filters a ratio or macs= instead"
            )
    else:
        given = {"scope": (scope, "local"), "round_to": (round_to, 1), "after": (after, None)}
        for name, (value, usual) in given.items():
            if value != usual:
                raise PlanError(f"{name}={_short(value)} is for granularity='filter'; leave it out for kernels")
    return {granularity: ratio}


def _check_both(names: list[str], ratio: object, options: Mapping[str, Any]) -> None:
    """See that a mapping from granularity to ratio is the only answer to how much goes."""
    if set(names) != set(GRANULARITIES):
        raise PlanError(f"granularity names {names} only; give both ratios, or granularity={names[0]!r} with ratio=")
    for name in ("macs", "params", "latency"):
        if options[name] is not None or ratio is not None:
            raise PlanError(f"granularity has a ratio for each already; leave ratio and {name} out")
    if options["snapshots"] is not None:
        raise PlanError("snapshots do not fit the network that removed filters leave; plan one granularity at a time")


def _short(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"


_KERNELS_ONLY = {
    "sensitivity": None,
    "latency_table": None,
    "groups": "auto",
    "method": "auto",
    "form": "auto",
    "block": None,
    "share_groups": None,
}
"""Arguments that say how kernels are grouped, with their defaults."""


def _plan_kernels(
    model: nn.Module,
    data: Subject,
    ratio: float | Mapping[str, float] | None,
    *,
    macs: float | None,
    params: float | None,
    sensitivity: Sensitivity | None,
    latency: float | None,
    latency_table: LatencyTable | None,
    groups: Groups | Mapping[str, Groups],
    method: str,
    form: str,
    block: int | None,
    target: str | None,
    share_groups: bool | None,
    ignore: str | Iterable[str],
    seed: int,
    progress: bool,
    **options: Any,
) -> tuple[PrunePlan, nn.Module | None]:
    """A plan of kernels, and the masked model if it was refitted on the way."""
    budgets: dict[Cost, float] = {}
    if macs is not None:
        budgets["macs"] = macs
    if params is not None:
        budgets["params"] = params
    if len(budgets) + (ratio is not None) + (latency is not None) > 1:
        raise PlanError("ratio, macs, params and latency exclude one another; pass one of them")
    if (budgets or latency is not None) and form == "partition":
        raise PlanError("a budget needs ratios of any value, which the partition form has not; leave form out")
    if sensitivity is not None and not isinstance(sensitivity, Sensitivity):
        raise PlanError(
            f"sensitivity is a {type(sensitivity).__name__}; pass what fxprune.measure_sensitivity returned, or "
            "Sensitivity.from_json"
        )
    if sensitivity is not None and not budgets and latency is None:
        raise PlanError("sensitivity is for a budget; pass macs= or params= or latency= with it, or leave it out")
    if latency_table is not None and not isinstance(latency_table, LatencyTable):
        raise PlanError(
            f"latency_table is a {type(latency_table).__name__}; pass what fxprune.measure_latency returned, or "
            "LatencyTable.from_json"
        )
    if latency_table is not None and latency is None:
        raise PlanError("latency_table is for a share of the latency; pass latency= with it, or leave it out")
    for cost, share in budgets.items():
        check_share(share, cost)
        together = resolve_block(block, target, method)
        table = data.sensitivity(model, sensitivity, groups, target, ignore, seed, progress)
        ratio = table.ratios(share, cost, together)
        form = "overlap" if form == "auto" else form
    shares = resolve_sharing(share_groups, resolve_block(block, target, method), target, method)
    writers = common_writers(data.trace.module, data.trace.values) if shares else ()
    if latency is not None:
        ratio, groups = _for_latency(
            model,
            data,
            latency,
            latency_table,
            sensitivity,
            groups=groups,
            form="overlap" if method in PUBLISHED else form,
            target=target,
            ignore=ignore,
            seed=seed,
            progress=progress,
            block=resolve_block(block, target, method),
            writers=writers,
        )
    planner = Planner(
        model,
        0.5 if ratio is None else ratio,
        groups=groups,
        method=method,
        form=form,
        block=block,
        target=target,
        ignore=ignore,
        seed=seed,
        calibrated=data.batches is not None,
        obstacles=find_obstacles(model, data.trace),
        writers=writers,
        **options,
    )
    if data.batches is None:
        return planner.from_weights(progress), None
    if planner.sharing:
        for name, samples in survey(data.trace.module, data.batches, planner.sharing, seed=seed, progress=progress):
            planner.survey(name, samples)
    masked = copy.deepcopy(model)
    return planner.plan(data.reconstruct(masked, planner.shapes, planner.choose, seed, progress)), masked


def _for_latency(
    model: nn.Module,
    data: Subject,
    latency: float,
    table: LatencyTable | None,
    sensitivity: Sensitivity | None,
    *,
    groups: Groups | Mapping[str, Groups],
    form: str,
    target: str | None,
    ignore: str | Iterable[str],
    seed: int,
    progress: bool,
    **options: Any,
) -> tuple[dict[str, float], Mapping[str, Groups]]:
    """Ratio and number of groups of each layer, by pattern, with which a share of the dense latency remains."""
    check_latency(latency)
    if target is None:
        raise PlanError(f"latency={latency:.4g} needs the device to be fast on; pass target='cpu' or target='cuda'")
    counts = group_counts(model, data, groups, target, ignore)
    check_target(model, target, data.example_inputs, None)
    assert data.example_inputs is not None
    inputs = as_inputs(data.example_inputs)
    measured = measure_layers(model, inputs, counts, progress=progress) if table is None else table
    open_ = measured.among(model, inputs, counts, form)
    known = data.sensitivity(model, sensitivity, groups, target, ignore, seed, progress)

    def share_of(choice: Mapping[str, LatencyOption]) -> float:
        # Which kernels stay changes no time: the cheapest plan will do.
        ratios, groups = as_patterns(open_, choice)
        planner = Planner(model, ratios, groups=groups, form=form, target=target, ignore=ignore, seed=seed, **options)
        plan = planner.from_weights(progress)
        pruned = rewrite(mask(model, plan), plan, inputs)
        return acceleration_report(accelerate(pruned, inputs, progress=progress)).relative

    return as_patterns(open_, meet(open_, latency, damages(model, open_, known, seed), share_of))


def group_counts(
    model: nn.Module,
    data: Subject,
    groups: Groups | Mapping[str, Groups],
    target: str,
    ignore: str | Iterable[str],
) -> dict[str, tuple[int, ...]]:
    """The numbers of groups to time for each convolution that can be pruned."""
    planner = data.overlap_planner(model, groups, target, ignore)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    wanted = match_patterns("groups", groups, convs) if isinstance(groups, Mapping) else dict.fromkeys(convs, groups)
    counts = ((name, wanted.get(name, "auto")) for name in planner.shapes)
    return {name: GROUP_COUNTS if count == "auto" else (count,) for name, count in counts}


def check_target(
    model: nn.Module, target: str | None, example_inputs: Inputs | None, calibration: Calibration | None
) -> None:
    """See that a model can be accelerated for `target` before hours of planning."""
    if target not in TARGETS:
        return  # None, or what the planner will refuse
    if example_inputs is None and calibration is None:
        raise AccelerationError(
            f"target={target!r} needs example_inputs to time the model on; pass them, or leave target out"
        )
    found = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if found - {target}:
        raise AccelerationError(
            f"target={target!r}, but the model is on {', '.join(sorted(found))}; move model and example_inputs to "
            f"{target} first, or plan with make_plan(target={target!r}) and accelerate there"
        )
