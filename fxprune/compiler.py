"""The steps of compilation: plan, mask, rewrite, verify. Only `mask` changes the function."""

import copy
import inspect
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.acceleration import ACCELERATION, accelerate, acceleration_report
from fxprune.calibration import FITS, Batch, Calibration, Choose, read_batches, reconstruct, survey
from fxprune.channels import ChannelAnalysis, analyze_channels
from fxprune.criteria import Criterion, ScoreFunction
from fxprune.errors import (
    AccelerationError,
    CalibrationError,
    FxpruneError,
    NothingRewrittenWarning,
    PlanError,
    TraceError,
)
from fxprune.latency import LatencyOption, LatencyTable, as_patterns, check_latency, damages, meet
from fxprune.layer_times import GROUP_COUNTS, measure_layers
from fxprune.pipeline import default_pipeline, run
from fxprune.planning import PUBLISHED, Planner, match_patterns, resolve_block, resolve_sharing
from fxprune.plans import GroupedKernels, PrunePlan
from fxprune.report import Report, layer_costs, make_report
from fxprune.rewriting import calls, first_reader, read_by_name
from fxprune.sensitivity import Cost, Sensitivity, check_share, measure
from fxprune.shapes import TARGETS, Groups
from fxprune.sharing import common_writers
from fxprune.snapshots import Snapshot
from fxprune.tracing import Inputs, Trace, as_inputs, meta_values, trace
from fxprune.variety import Variety
from fxprune.verification import RECORD
from fxprune.verification import verify as verify_models


@dataclass(frozen=True)
class Record:
    """What a compiled module remembers, under `gm.meta["fxprune"]`: survives deepcopy, not pickle.

    Attributes:
        plan: the plan that was applied.
        report: the account of the result.
        inputs: arguments of forward as meta tensors, as the shapes were known at compile time.
        modes: modes in which the graph follows the model.
        options: how the passes were configured.
        rounding: relative step of the weights' type if a pass rounded weights anew (folded BatchNorm), else 0.
    """

    plan: PrunePlan
    report: Report
    inputs: tuple[Any, ...]
    modes: tuple[str, ...]
    options: Mapping[str, Any]
    rounding: float = 0.0


def compile(
    model: nn.Module,
    ratio: float | Mapping[str, float] | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    latency_table: LatencyTable | None = None,
    sensitivity: Sensitivity | None = None,
    example_inputs: Inputs | None = None,
    calibration: Calibration | None = None,
    groups: Groups | Mapping[str, Groups] = "auto",
    method: str = "auto",
    form: str = "auto",
    block: int | None = None,
    target: str | None = None,
    share_groups: bool | None = None,
    criterion: str | Criterion | ScoreFunction | None = None,
    variety: str | Variety | None = None,
    snapshots: Iterable[Snapshot] | None = None,
    ignore: str | Iterable[str] = (),
    seed: int = 0,
    progress: bool = False,
    verify: bool | None = None,
    fold_batch_norm: bool = False,
) -> fx.GraphModule:
    """Prune a trained model and rewrite it into a smaller graph that computes exactly what the masked model computes.

    The same as `make_plan`, `mask`, `rewrite` and `verify` in turn. The model is never changed; the result shares no
    memory with it.

    Args:
        model: any traceable module, on any device, in any floating-point type.
        ratio: share of kernel groups to remove from each convolution, in `[0, 1)`, or a mapping from module-name
            pattern to share; 0.5 if no budget is given either.
        macs: instead of a ratio, the share of the network's MACs that may remain, in `(0, 1]`. The ratio of each layer
            follows from its sensitivity, in overlap form, so that the total is met within 1 %.
        params: the same for the parameters.
        latency: instead of a ratio, the share in `(0, 1]` of the time of the best dense form that may remain on
            `target`, which it needs. Ratio, number of groups and form of each layer follow from measured times and from
            its sensitivity; the whole network is measured too, and the choice corrected, see `fxprune.latency.meet`.
        latency_table: a table from `measure_latency` for it; measured anew if absent.
        sensitivity: a table from `measure_sensitivity` for the budget; measured anew if absent.
        example_inputs: positional arguments of forward. With them shapes and MACs are exact and the result is verified;
            without, the first calibration batch serves, or else a usual image size is probed.
        calibration: a few hundred typical inputs: a tensor `(N, ...)`, a `DataLoader`, or any iterable of batches;
            labels are ignored. With it the kept weights are solved anew so that each layer gives what the dense one
            gave (`fxprune.calibration.refit`), which is worth far more than any choice of groups. It is read once.
        groups: number of groups, `"auto"`, or a mapping from pattern to either.
        method: how the groups are chosen, see `fxprune.planning.METHODS`.
        form: `"partition"`, `"overlap"` or `"auto"`.
        block: keep input channels in aligned blocks of this many, so that one load of a fused kernel brings a block: 8
            are 16 bytes in half precision. What it costs is in the report, as are layers that do not divide into
            blocks; these are pruned channel by channel. None is 8 for target `"cuda"`, else 1.
        target: `"cpu"` or `"cuda"`: plan for this kind of device and return the inference form for it, see
            `fxprune.accelerate`; the model and the example inputs must be there. On `"cuda"` groups are wide enough for
            the tensor cores where their number is `"auto"`, and blocks are 8; None plans as for `"cpu"`.
        share_groups: layers that write the same channels (the blocks of a residual stage) and have equally many groups
            get the same groups of filters, so that one order suits all and their outputs need no gather. It costs some
            accuracy. None is True with a target and channels kept one by one, else False.
        criterion: importance of a kernel for method `"cocluster"`: a name in `fxprune.criteria.CRITERIA`, a
            `Criterion`, or a function `(name, conv) -> (O, C)`.
        variety: make the criterion keep rare kernels: a name in `fxprune.variety.VARIETIES` or a `Variety`.
        snapshots: earlier states of the same training run, oldest first, as state dicts, modules or paths; for method
            `"tmi"` and for the criteria `"movement"` and `"magnitude_increase"`, which take the first.
        ignore: patterns of layers to leave dense.
        seed: of the planner's random starts and of the sampled positions.
        progress: show progress bars on stderr.
        verify: check the result against the masked model in float64; by default if inputs are given.
        fold_batch_norm: fold BatchNorm into the convolutions; the result is then exact in evaluation mode only.

    Returns:
        A `GraphModule`: it trains, scripts, exports, moves and copies as any module does. `fxprune.report` explains it.
        With `target`, an inference form for that device alone, which `fxprune.acceleration_report` explains as well.

    Raises:
        PlanError: an argument is not legal, or nothing can be planned.
        AccelerationError: `target` without example inputs, or not the device of the model.
        CalibrationError: the calibration data are malformed, or do not fit the model.
        TraceError: the model cannot be traced, or its shapes cannot be found.
        VerificationError: the result differs from the masked model.

    Warns:
        NothingRewrittenWarning: no convolution could be rewritten.
    """
    if verify and example_inputs is None and calibration is None:
        raise FxpruneError("verify=True needs example_inputs to run the models on; pass them, or leave verify out")
    _check_target(model, target, example_inputs, calibration)
    data = _Data(model, example_inputs, calibration)
    plan, masked = _plan(
        model,
        data,
        ratio,
        macs,
        params,
        sensitivity,
        latency=latency,
        latency_table=latency_table,
        groups=groups,
        method=method,
        form=form,
        block=block,
        target=target,
        share_groups=share_groups,
        criterion=criterion,
        variety=variety,
        snapshots=snapshots,
        ignore=ignore,
        seed=seed,
        progress=progress,
    )
    if masked is None:
        masked = mask(model, plan)
    pruned = rewrite(masked, plan, data.example_inputs, fold_batch_norm=fold_batch_norm)
    if verify or (verify is None and data.example_inputs is not None):
        assert data.example_inputs is not None
        verify_models(pruned, masked, data.example_inputs)
    if target is not None:
        assert data.example_inputs is not None
        result = accelerate(pruned, data.example_inputs, progress=progress)
        if latency is not None:
            told = acceleration_report(result)
            note = f"latency: asked for {latency:.2f} of the best dense time, reached {told.relative:.2f}"
            result.meta[ACCELERATION] = replace(told, notes=(*told.notes, note))
        return result
    return pruned


def make_plan(
    model: nn.Module,
    ratio: float | Mapping[str, float] | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    latency_table: LatencyTable | None = None,
    sensitivity: Sensitivity | None = None,
    example_inputs: Inputs | None = None,
    calibration: Calibration | None = None,
    groups: Groups | Mapping[str, Groups] = "auto",
    method: str = "auto",
    form: str = "auto",
    block: int | None = None,
    target: str | None = None,
    share_groups: bool | None = None,
    criterion: str | Criterion | ScoreFunction | None = None,
    variety: str | Variety | None = None,
    snapshots: Iterable[Snapshot] | None = None,
    ignore: str | Iterable[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> PrunePlan:
    """Choose which convolutions are pruned and how. Arguments and errors are those of `compile`; the model is only
    read. Equal arguments give equal plans.

    With calibration data each layer is planned on what the layers before it, pruned and refitted, give it. `mask` with
    the same data then finds the same weights.
    """
    plan, _ = _plan(
        model,
        _Data(model, example_inputs, calibration),
        ratio,
        macs,
        params,
        sensitivity,
        latency=latency,
        latency_table=latency_table,
        groups=groups,
        method=method,
        form=form,
        block=block,
        target=target,
        share_groups=share_groups,
        criterion=criterion,
        variety=variety,
        snapshots=snapshots,
        ignore=ignore,
        seed=seed,
        progress=progress,
    )
    return plan


def mask(
    model: nn.Module, plan: PrunePlan, calibration: Calibration | None = None, *, progress: bool = False
) -> nn.Module:
    """Return a copy of `model` in which the kernels that `plan` drops are zero: the oracle of every later step.

    Args:
        model: the dense model. It is not changed.
        plan: what to drop.
        calibration: see `compile`; with it the kernels that stay are refitted.
        progress: show a bar on stderr.

    Raises:
        PlanError: the plan was made for another model.
        CalibrationError: the calibration data are malformed, or do not fit the model.
    """
    plan.check(model)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, kernels in plan.layers.items():
            weight = masked.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.mul_(kernels.mask().to(weight.device)[:, :, None, None])
    if calibration is not None:
        data = _Data(model, None, calibration)
        data.reconstruct(masked, plan.layers, lambda name, conv, samples: plan.layers[name], plan.seed, progress)
    return masked


class _Data:
    """The trace of a model, with the inputs that it was given: an example, calibration data, both or none."""

    def __init__(self, model: nn.Module, example_inputs: Inputs | None, calibration: Calibration | None) -> None:
        self.batches, self._inputs, self.example_inputs = None, example_inputs, example_inputs
        if calibration is not None:
            given = _arguments_needed(model) if example_inputs is None else len(as_inputs(example_inputs))
            self.batches = read_batches(calibration, given)
            if example_inputs is None:
                self._inputs, self.example_inputs = self.batches[0], _first_two(self.batches[0])
        try:
            self.trace = trace(model, self._inputs)
        except TraceError as error:
            if example_inputs is None and calibration is not None:
                trace(model)  # it fails too if the model is at fault
                raise CalibrationError(f"calibration batch 0 does not fit the model: {error}") from error
            raise

    def sensitivity(
        self,
        model: nn.Module,
        table: Sensitivity | None,
        groups: Groups | Mapping[str, Groups],
        target: str | None,
        ignore: str | Iterable[str],
        seed: int,
        progress: bool,
    ) -> Sensitivity:
        """The sensitivity of all convolutions that can be pruned, from `table` if there is one."""
        obstacles = _obstacles(model, self.trace)
        planner = Planner(model, groups=groups, form="overlap", ignore=ignore, obstacles=obstacles, target=target)
        shapes = {name: shape.groups for name, shape in planner.shapes.items()}
        if table is not None:
            return table.among(model, shapes)
        costs = layer_costs(self.trace.module, self.trace.values)
        return measure(self.trace.module, shapes, costs, self.batches, seed=seed, progress=progress)

    def reconstruct(
        self, masked: nn.Module, layers: Collection[str], choose: Choose, seed: int, progress: bool
    ) -> dict[str, GroupedKernels]:
        """Prune and refit `masked`, a copy of the model, in place."""
        assert self.batches is not None
        twin = trace(masked, self._inputs)
        kernels, fits = reconstruct(
            self.trace.module, twin.module, self.batches, layers, choose, seed=seed, progress=progress
        )
        setattr(masked, FITS, fits)
        return kernels


def _plan(
    model: nn.Module,
    data: _Data,
    ratio: float | Mapping[str, float] | None,
    macs: float | None,
    params: float | None,
    sensitivity: Sensitivity | None,
    *,
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
    """The plan, and the masked model if it was refitted on the way."""
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
        obstacles=_obstacles(model, data.trace),
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
    data: _Data,
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
    counts = _group_counts(model, data.trace, groups, target, ignore)
    _check_target(model, target, data.example_inputs, None)
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


def _group_counts(
    model: nn.Module,
    traced: Trace,
    groups: Groups | Mapping[str, Groups],
    target: str,
    ignore: str | Iterable[str],
) -> dict[str, tuple[int, ...]]:
    """The numbers of groups to time for each convolution that can be pruned."""
    planner = Planner(
        model, groups=groups, form="overlap", ignore=ignore, obstacles=_obstacles(model, traced), target=target
    )
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    wanted = match_patterns("groups", groups, convs) if isinstance(groups, Mapping) else dict.fromkeys(convs, groups)
    counts = ((name, wanted.get(name, "auto")) for name in planner.shapes)
    return {name: GROUP_COUNTS if count == "auto" else (count,) for name, count in counts}


def measure_latency(
    model: nn.Module,
    *,
    example_inputs: Inputs,
    target: str | None = None,
    groups: Groups | Mapping[str, Groups] = "auto",
    ignore: str | Iterable[str] = (),
    progress: bool = False,
) -> LatencyTable:
    """Measure how long each convolution takes, dense and at each ratio and number of groups. `print` the table, and
    pass it to `compile(..., latency=0.6, latency_table=table)` for one share after another.

    Args:
        model: see `compile`, as for the others.
        example_inputs: of the sizes to be fast for.
        target: the device to measure, where the model must be; None is the device of the model.
        groups: number of groups to measure; `"auto"` tries several.
        ignore: patterns of layers to leave out.
        progress: show bars on stderr.

    Raises:
        PlanError: an argument is not legal.
        AccelerationError: the model is not on the target, or cannot be accelerated.
        TraceError: the model cannot be traced.
    """
    data = _Data(model, example_inputs, None)
    target = target or next((p.device.type for p in model.parameters()), "cpu")
    counts = _group_counts(model, data.trace, groups, target, ignore)
    _check_target(model, target, example_inputs, None)
    return measure_layers(model, as_inputs(example_inputs), counts, progress=progress)


def measure_sensitivity(
    model: nn.Module,
    *,
    example_inputs: Inputs | None = None,
    calibration: Calibration | None = None,
    groups: Groups | Mapping[str, Groups] = "auto",
    target: str | None = None,
    ignore: str | Iterable[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> Sensitivity:
    """Measure how much each convolution suffers as it is pruned alone. `print` the table, `plot` it, and pass it to
    `compile(..., macs=0.5, sensitivity=table)` for one budget after another.

    Args:
        model: see `compile`, as for the others.
        example_inputs: for the MACs.
        calibration: what the damage is measured on. Without it, only the weights count.
        groups: number of groups to measure with.
        target: see `compile`; it decides how many `"auto"` is.
        ignore: patterns of layers to leave out.
        seed: of the sampled positions and of the clustering.
        progress: show a bar on stderr.

    Raises:
        PlanError: nothing can be pruned, or the MACs are not known.
        CalibrationError: the calibration data are malformed, or do not fit the model.
    """
    return _Data(model, example_inputs, calibration).sensitivity(model, None, groups, target, ignore, seed, progress)


def rewrite(
    masked: nn.Module, plan: PrunePlan, example_inputs: Inputs | None = None, *, fold_batch_norm: bool = False
) -> fx.GraphModule:
    """Rewrite a masked model into grouped convolutions. Exact: the result computes what `masked` computes.

    Args:
        masked: what `mask` returned, perhaps trained further with its zeros kept. It is not changed.
        plan: the plan it was masked with.
        example_inputs: positional arguments of forward, for shapes; probed if absent.
        fold_batch_norm: see `compile`.

    Raises:
        PlanError: the plan was made for another model.
        PassError: a kernel that the plan drops is not zero.
        TraceError: the model cannot be traced, or no usual image size fits it and no example is given.

    Warns:
        NothingRewrittenWarning: the plan names no convolution.
    """
    plan.check(masked)
    traced = trace(masked, example_inputs)
    gm = traced.module
    dense = layer_costs(gm, traced.values)
    params_dense = sum(p.numel() for p in gm.parameters())  # auxiliary heads that are never called are not pruned away
    run(gm, default_pipeline(plan, traced.inputs, fold_batch_norm=fold_batch_norm), traced.inputs)
    _own_tensors(gm, masked)
    notes = [*traced.notes, *(f"{name}: {note}" for name, note in plan.notes.items())]
    if traced.probed:
        notes.append(
            "no example_inputs: MACs are for an assumed input size, and the result was not verified"
            if traced.inputs
            else _NO_SHAPES
        )
    if fold_batch_norm:
        notes.append("BatchNorm is folded: the result equals the masked model in evaluation mode only")
    report = make_report(
        plan,
        dense,
        gm,
        meta_values(gm, traced.inputs)[0] if traced.inputs else {},
        errors={name: fit.refitted for name, fit in getattr(masked, FITS, {}).items()},
        params_dense=params_dense,
        input_shapes=tuple(tuple(leaf.shape) for leaf in tree_leaves(traced.inputs) if isinstance(leaf, Tensor)),
        notes=tuple(notes),
    )
    modes = ("eval",) if fold_batch_norm else traced.modes
    rounding = max((torch.finfo(p.dtype).eps for p in gm.parameters() if p.is_floating_point()), default=0.0)
    options = {"fold_batch_norm": fold_batch_norm}
    gm.meta[RECORD] = Record(plan, report, traced.inputs, modes, options, rounding if fold_batch_norm else 0.0)
    if not plan.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:3])
        warnings.warn(
            f"no convolution was rewritten, the result is as large as the model ({reasons})",
            NothingRewrittenWarning,
            stacklevel=2,
        )
    return gm


def analyze(model: nn.Module, example_inputs: Inputs | None = None) -> ChannelAnalysis:
    """Find the channel spaces of a model: which channels share an order, what ties them, and why some may not move.
    `print` it.

    Raises:
        TraceError: the model cannot be traced.
    """
    traced = trace(model, example_inputs)
    return analyze_channels(traced.module, traced.values)


def report(pruned: nn.Module) -> Report:
    """Return the report of a compiled model.

    Raises:
        FxpruneError: the module was not compiled by fxprune, or lost its record in pickling.
    """
    accelerated = getattr(pruned, "meta", {}).get(ACCELERATION)
    if accelerated is not None and accelerated.compiled is not None:
        compiled: Report = accelerated.compiled
        return compiled
    return record_of(pruned).report


_NO_SHAPES = (
    "no example_inputs, and no usual input size fits the model: "
    "all channels keep their order, and more gathers remain than need be"
)


def _check_target(
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


def _obstacles(model: nn.Module, traced: Trace) -> dict[str, str]:
    """Convolutions that the traced graph does not allow to be grouped, with the reason."""
    called = {str(node.target): conv for node, conv in calls(traced.module, nn.Conv2d)}
    named = read_by_name(traced.module)
    obstacles = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        whole = next((path for path in traced.opaque if name.startswith(f"{path}.")), None)
        if whole is not None:
            obstacles[name] = f"inside {whole}: {traced.opaque[whole]}"
        elif name not in called:
            obstacles[name] = "the traced graph never calls it"
        elif reader := first_reader(called[name].parameters(), named):
            obstacles[name] = f"its parameters are also read by {reader}, which needs them dense"
    return obstacles


def _arguments_needed(model: nn.Module) -> int:
    """How many positional arguments of forward have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def _first_two(batch: Batch) -> Batch:
    """Two samples are enough of an example, where all tensors agree on what a sample is."""
    sizes = {leaf.shape[:1] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or torch.Size() in sizes:
        return batch
    first: Batch = tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) else leaf, batch)
    return first


def record_of(pruned: nn.Module) -> Record:
    """Return what a compiled module remembers of its compilation.

    Raises:
        FxpruneError: the module was not compiled by fxprune, or lost its record in pickling.
    """
    meta = getattr(pruned, "meta", None)
    record = meta.get(RECORD) if isinstance(meta, dict) else None
    if isinstance(meta, dict) and ACCELERATION in meta:
        raise FxpruneError(
            "the model is accelerated: its weights are packed for one device; pass the module that it was made from"
        )
    if not isinstance(record, Record):
        raise FxpruneError(
            f"{type(pruned).__name__} carries no record of a compilation; "
            "pass the module that fxprune.compile, rewrite or load returned"
        )
    return record


def _own_tensors(gm: fx.GraphModule, masked: nn.Module) -> None:
    """Give `gm` its own copy of every tensor that it still shares with the masked model, one copy for each, so that
    ties stay.
    """
    shared = {id(t) for t in (*masked.parameters(), *masked.buffers())}
    copies: dict[int, Tensor] = {}
    for module in gm.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or id(tensor) not in shared:
                    continue
                if id(tensor) not in copies:
                    data = tensor.detach().clone()
                    copies[id(tensor)] = (
                        nn.Parameter(data, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else data
                    )
                store[name] = copies[id(tensor)]  # type: ignore[assignment]  # a parameter replaces a parameter


__all__ = [
    "Record",
    "analyze",
    "compile",
    "make_plan",
    "mask",
    "measure_latency",
    "measure_sensitivity",
    "report",
    "rewrite",
]
