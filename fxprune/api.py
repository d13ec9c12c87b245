"""What users call: plan, mask, rewrite, verify in one step, and what is measured for it."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Never

from torch import nn

from fxprune.calibration import Calibration
from fxprune.calibration.subject import Subject
from fxprune.channels import ChannelAnalysis, analyze_channels
from fxprune.channels.capture import capture, check_output
from fxprune.criteria import Criterion, ScoreFunction
from fxprune.criteria.snapshots import Snapshot
from fxprune.criteria.variety import Variety
from fxprune.errors import CalibrationError, FxpruneError
from fxprune.exact.record import ACCELERATION, record_of
from fxprune.exact.reporting import Report
from fxprune.graph.baking import baked
from fxprune.graph.examples import Inputs, as_examples
from fxprune.graph.tracing import check_is_model
from fxprune.inference.acceleration import acceleration_report
from fxprune.planning.compiling import compiled_for
from fxprune.planning.hints import refuse_unknown
from fxprune.planning.kernels import sensitivity_of
from fxprune.planning.latency.network import WholeNetwork, check_target
from fxprune.planning.latency.table import LatencyTable
from fxprune.planning.latency.wanted import measure_for
from fxprune.planning.making import noted_as_baked, plan_for
from fxprune.planning.patterns import Ignored, ignored_patterns
from fxprune.planning.requests import Request
from fxprune.planning.sensitivity import Sensitivity
from fxprune.plans import PrunePlan
from fxprune.plans.shapes import Groups
from fxprune.vocabulary import (
    CriterionChoice,
    FormChoice,
    GranularityChoice,
    Method,
    Output,
    Precision,
    RuntimeName,
    Scope,
    Target,
    VarietyName,
)


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
    granularity: GranularityChoice | Mapping[str, float] = "kernel",
    scope: Scope | None = None,
    round_to: int | None = None,
    groups: Groups | Mapping[str, Groups] = "auto",
    method: Method = "auto",
    form: FormChoice = "auto",
    block: int | None = None,
    target: Target | None = None,
    runtime: RuntimeName | None = None,
    precision: Precision | None = None,
    share_groups: bool | None = None,
    criterion: CriterionChoice | Criterion | ScoreFunction | None = None,
    variety: VarietyName | Variety | None = None,
    snapshots: Iterable[Snapshot] | None = None,
    ignore: Ignored | Iterable[Ignored] = (),
    seed: int = 0,
    progress: bool = False,
    recover: bool | float | Mapping[str, Any] = False,
    verify: bool | None = None,
    bake: bool = False,
    fold_batch_norm: bool = False,
    output: Output = "auto",
    **unknown: Never,
) -> Any:
    """Prune a trained model and rewrite it into a smaller one that computes exactly what the masked model computes.

    The same as `make_plan`, `mask`, `recover` if asked for, `rewrite` and `verify` in turn. The model is never changed;
    the result shares no memory with it.

    Args:
        model: any module that runs, on any device, in any floating-point type. In whatever mode it is: layers are
            planned, refitted and judged in evaluation mode, and the result is left in the mode of the model.

        *How much goes.* A ratio, or one or more budgets (`macs`, `params`, `latency`), all of which are kept; ratio 0.5
        if none is given.

        ratio: share of kernel groups (or of filters, see `granularity`) to remove from each convolution, in `[0, 1)`,
            or a mapping from module-name pattern to share.
        macs: the share of the network's MACs that may remain, in `(0, 1]`. The ratio of each layer follows from its
            sensitivity, in overlap form, so that the total is met within 1 %. With calibration data other ways to spend
            it are tried too, a uniform ratio among them, and the best on held-out data is taken.
        params: the same for the parameters.
        latency: the share in `(0, 1]` of the time of the best dense form that may remain on `target`, in `runtime`, one
            of which it needs. Ratio, number of groups and form of each layer, or the widths of all, follow from
            measured times and from what a layer suffers; the whole network is measured too, and the choice corrected,
            see `fxprune.planning.latency.meeting`.
        latency_table: a table from `measure_latency` for it, also one of another machine to plan for that; measured
            anew if absent.
        sensitivity: a table from `measure_sensitivity` for a budget; measured anew if absent.

        *What goes.*

        granularity: `"kernel"`: convolutions become grouped, each group keeps some input channels. `"filter"`: whole
            filters go, with everything they feed, through residual additions, concatenations, depthwise convolutions,
            shuffles and slices; convolutions become narrower. A mapping gives both a ratio and does one after the
            other: `{"filter": 0.25, "kernel": 0.5}`. `"branch"`: whole residual branches go, those that are missed
            least, and the layers behind them are refitted (`fxprune.planning.branches`); a ratio is a share of the
            branches. `"auto"` divides a budget among all, in fixed ways and by an integer program, and takes what does
            best on held-out data (`fxprune.planning.auto`). Both need calibration data.
        scope: of filters: `"local"` removes the same share from each channel space, `"global"` ranks all filters of the
            network (`fxprune.planning.selection.choose_units`). None is `"local"`; but for a budget with calibration
            data both are tried, and one between, and what does best on held-out data is taken.
        round_to: each channel space keeps a multiple of this many filters. None is 4, and 1 in spaces of fewer than 16:
            runtimes are slow at other widths, ONNX Runtime twice as slow.
        groups: number of groups, `"auto"`, or a mapping from pattern to either. `"auto"` is wide groups, for time; with
            a budget, calibration data and no target it is 8 where that divides, for accuracy. One number for all is a
            wish: a layer whose filters it does not divide takes the nearest divisor, which is noted, or stays dense
            with the reason; a number in a mapping must divide.
        form: `"partition"`, `"overlap"` or `"auto"`.
        ignore: layers to leave dense: names or patterns of names, modules of the model, types of modules.

        *How it is chosen.*

        method: how the groups are chosen, see `fxprune.planning.METHODS`.
        criterion: importance of a kernel, for method `"cocluster"`, or summed over a filter: a name in
            `fxprune.criteria.CRITERIA`, a `Criterion`, or a function `(name, conv) -> (O, C)`. Of filters also
            `"reconstruction"`, the error that is left once all layers that read them are refitted, which is the default
            with calibration data and no variety.
        variety: make the criterion keep rare kernels or filters: a name in
            `fxprune.criteria.variety.VARIETIES` or a `Variety`.
        seed: of the planner's random starts and of the sampled positions.

        *Data.*

        example_inputs: arguments of forward: a tensor, a tuple by position, or a dict by name; their values may be of
            any kind. A list of these is several examples. With them shapes and MACs are exact and the result is
            verified; without, the first calibration batch serves, or else a usual image size is probed.
        calibration: a few hundred typical inputs: a tensor `(N, ...)`, a `DataLoader`, or any iterable of batches;
            labels are ignored. With it the kept weights are solved anew so that each layer gives what the dense one
            gave (`fxprune.calibration.refitting`), which is worth far more than any choice of groups. It is read once.
            A share is held out once more to see how well the result follows the dense network; the report tells.
        recover: after that train the kept weights on the calibration data until each block gives what the dense one
            gave, see `fxprune.recover`: True for its usual time (1500 steps, at most 180 seconds), a number of seconds,
            or a mapping of its arguments, such as `{"steps": 200, "augment": "flip", "checkpoint": "recovery.pt"}`.
        snapshots: earlier states of the same training run, oldest first, as state dicts, modules or paths; for method
            `"tmi"` and for the criteria `"movement"` and `"magnitude_increase"`, which take the first.

        *Device.*

        target: `"cpu"` or `"cuda"`: plan for this kind of device and return the inference form for it, see
            `fxprune.accelerate`; the model and the example inputs must be there. On `"cuda"` groups are wide enough for
            the tensor cores where their number is `"auto"`, and blocks are 16; None plans as for `"cpu"`.
        runtime: what will compute the network, see `fxprune.accelerate`: plan for it, and return the form for it:
            `"onnxruntime"`, `"openvino"` or `"inductor"`, for which the target is the CPU, or with a target `"torch"`
            or `"auto"`. With `latency` the times are those in this runtime, and the share is of the best dense form in
            it; there it must be `"torch"`, `"onnxruntime"` or `"openvino"`. None is `"torch"` if there is a target.
        precision: what `runtime` computes in, if that is less than float32: plan with the times that layers have there
            in it, and return that form, each layer as is fastest in it. `"int8"`, in `"onnxruntime"` or `"openvino"`,
            is quantized as by `fxprune.quantize`, with ranges measured on the calibration data, which it needs;
            `"bfloat16"`, in `"openvino"`, needs a processor that has it. None is the precision of the model.
        block: keep input channels in aligned blocks of this many, so that wide loads of a fused kernel bring a block:
            16 are a sector of memory in half precision. What it costs is in the report, as are layers that do not
            divide into blocks; these are pruned channel by channel. None is 16 for target `"cuda"`, else 1.
        share_groups: layers that write the same channels (the blocks of a residual stage) and have equally many groups
            get the same groups of filters, so that one order suits all and their outputs need no gather. It costs some
            accuracy. None is True with a target and channels kept one by one, else False.
        bake: make computed weights of convolutions plain ones first: weight and spectral normalisation, masks of
            `torch.nn.utils.prune`, subclasses that standardise their weight. These are pruned then as all others, and
            are free if trained further. Without it such layers stay as they are.
        fold_batch_norm: fold BatchNorm into the convolutions; the result is then exact in evaluation mode only.

        *Result.*

        output: `"graph"` traces the model and gives a `GraphModule`. `"module"` records it while it runs on the
            examples and gives a copy of the model, of its own class, with its attributes, its forward and the names of
            its state dict, in which the pruned layers are smaller: for models that no graph can hold, and for code
            that expects its own class. `"auto"` gives the graph where trace and recording agree, else the module, and
            the report says why. Without examples there is only the graph.

        *Checks.*

        verify: check the result against the masked model in float64; by default if inputs are given.
        progress: show progress bars on stderr.

    Returns:
        A `GraphModule`, or a module of the model's class, see `output`: it trains, scripts, exports, moves and copies
        as any module does. `fxprune.report` explains it.
        With `target` or `runtime`, an inference form for that device alone, as `fxprune.accelerate` gives it, which
        `fxprune.acceleration_report` explains as well: with `latency` it tells what was asked for and reached.

    Raises:
        PlanError: an argument is not legal, or nothing can be planned.
        AccelerationError: `target` or `runtime` without example inputs, or not the device of the model; or the runtime
            is not installed, or cannot take it.
        CalibrationError: the calibration data are malformed, or do not fit the model; or `recover` without them.
        StorageError: the checkpoint of `recover` is of another run, or cannot be written.
        TraceError: the model cannot be traced, or its shapes cannot be found.
        VerificationError: the result differs from the masked model.

    Warns:
        NothingRewrittenWarning: no convolution could be rewritten.
        PoorAgreementWarning: on calibration inputs that were held out, less than 90 % of what the dense network gives
            is reproduced.
        UnlikeTrainingWarning: the calibration data fit the model, but are not like what it was trained on: images that
            were not normalized, say.
    """
    request = request_of(locals())
    if verify and example_inputs is None and calibration is None:
        raise FxpruneError("verify=True needs example_inputs to run the models on; pass them, or leave verify out")
    check_output(output)
    if request.recovery is not None and calibration is None:
        raise CalibrationError("recover learns from calibration data; pass calibration=, or leave recover out")
    target = request.target
    if precision == "int8" and calibration is None:
        raise CalibrationError(
            f"precision={precision!r} measures the ranges of activations on data; pass calibration=, or plan without "
            "it by fxprune.make_plan"
        )
    check_target(model, request, example_inputs is not None or calibration is not None)
    model, computed = baked(model) if bake else (model, ())
    subject = Subject(model, example_inputs, calibration, output if target is None else "graph")
    done = compiled_for(subject, request, computed=computed, fold_batch_norm=fold_batch_norm, check=verify)
    pruned = done.pruned
    if target is None:
        return pruned
    network = WholeNetwork.of(subject, request)
    result = network.accelerated(pruned, subject.batches)
    if latency is not None:
        reached = network.share_of(result)
        said = acceleration_report(result)
        note = f"latency: asked for {latency:.2f} of the best dense time in {request.where}, reached {reached:.2f}"
        if latency_table is not None and not latency_table.is_from_here:
            note += f" here; it was planned for another machine: {latency_table.place()}"
        result.meta[ACCELERATION] = replace(said, notes=(*said.notes, note))
    return result


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
    granularity: GranularityChoice | Mapping[str, float] = "kernel",
    scope: Scope | None = None,
    round_to: int | None = None,
    groups: Groups | Mapping[str, Groups] = "auto",
    method: Method = "auto",
    form: FormChoice = "auto",
    block: int | None = None,
    target: Target | None = None,
    runtime: RuntimeName | None = None,
    precision: Precision | None = None,
    share_groups: bool | None = None,
    criterion: CriterionChoice | Criterion | ScoreFunction | None = None,
    variety: VarietyName | Variety | None = None,
    snapshots: Iterable[Snapshot] | None = None,
    ignore: Ignored | Iterable[Ignored] = (),
    seed: int = 0,
    progress: bool = False,
    after: PrunePlan | None = None,
    output: Output = "auto",
    bake: bool = False,
    **unknown: Never,
) -> PrunePlan:
    """Choose which convolutions are pruned and how. Arguments and errors are those of `compile`; the model is only
    read. Equal arguments give equal plans.

    With calibration data each layer is planned on what the layers before it, pruned and refitted, give it. `mask` with
    the same data then finds the same weights.

    Args:
        after: an earlier plan of filters for the same model: what it removes stays removed, and counts. For gradual
            schedules; `compile` has no such argument. The others are those of `compile`. What was made with `bake=True`
            is masked with it, too.
    """
    request = request_of(locals())
    check_output(output)
    model, computed = baked(model) if bake else (model, ())
    subject = Subject(model, example_inputs, calibration, output if request.target is None else "graph")
    return noted_as_baked(plan_for(subject, request)[0], computed)


def measure_latency(
    model: nn.Module,
    *,
    example_inputs: Inputs,
    target: Target | None = None,
    runtime: RuntimeName | None = None,
    precision: Precision | None = None,
    granularity: GranularityChoice | Mapping[str, float] = "kernel",
    groups: Groups | Mapping[str, Groups] = "auto",
    ignore: Ignored | Iterable[Ignored] = (),
    progress: bool = False,
) -> LatencyTable:
    """Measure how long each convolution takes, dense and at each ratio and number of groups, or at several widths.
    `print` the table, and pass it to `compile(..., latency=0.6, latency_table=table)` for one share after another.

    The table says where it was made. Kept with `to_json`, it can be used on another machine, to plan there for this
    one; the whole network is then not measured, since only the machine of the table could tell.

    Args:
        model: see `compile`, as for the others.
        example_inputs: of the sizes to be fast for.
        target: the device to measure, where the model must be; None is the device of the model.
        runtime: what computes the network: None or `"torch"`, `"onnxruntime"` or `"openvino"`. In a runtime each layer
            is timed with what is fused into it, as a model of its own; times are kept for the next network with such a
            layer.
        precision: see `compile`; `"int8"` times layers that are quantized, each by itself, on made-up ranges. The
            table says so in its `dtype`, and is for plans of that precision alone.
        granularity: what will go: `"kernel"` times grouped layers, `"filter"` narrower ones, `"auto"` both.
        groups: number of groups to measure; `"auto"` tries several.
        ignore: layers to leave out, see `compile`.
        progress: show bars on stderr.

    Raises:
        PlanError: an argument is not legal, or layers cannot be timed in the runtime.
        AccelerationError: the model is not on the target, or cannot be accelerated, or the runtime is not installed.
        TraceError: the model cannot be traced.
    """
    check_is_model(model)
    place = {"target": next((p.device.type for p in model.parameters()), "cpu")} if (target or runtime) is None else {}
    asked = {**locals(), **place, "latency": 1.0}  # what a share of the latency would need, whatever it is
    request = request_of(asked)
    return measure_for(Subject(model, example_inputs, None), request)


def measure_sensitivity(
    model: nn.Module,
    *,
    example_inputs: Inputs | None = None,
    calibration: Calibration | None = None,
    groups: Groups | Mapping[str, Groups] = "auto",
    target: Target | None = None,
    ignore: Ignored | Iterable[Ignored] = (),
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
        ignore: layers to leave out, see `compile`.
        seed: of the sampled positions and of the clustering.
        progress: show a bar on stderr.

    Raises:
        PlanError: nothing can be pruned, or the MACs are not known.
        CalibrationError: the calibration data are malformed, or do not fit the model.

    Warns:
        UnlikeTrainingWarning: see `compile`.
    """
    request = request_of(locals())
    return sensitivity_of(Subject(model, example_inputs, calibration, "auto"), request)


def analyze(model: nn.Module, example_inputs: Inputs | None = None) -> ChannelAnalysis:
    """Find the channel spaces of a model: which channels share an order, what ties them, and why some may not move.
    `print` it.

    Args:
        model: any module that runs; it is not changed.
        example_inputs: see `compile`. With them any model is recorded that cannot be traced; without, it is traced.

    Raises:
        TraceError: the model cannot be traced, and does not run on the example or has none.
    """
    check_is_model(model)
    examples = () if example_inputs is None else as_examples(example_inputs, model)
    captured = capture(model, examples, "auto")
    return analyze_channels(captured.module, captured.values)


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


def request_of(arguments: Mapping[str, Any]) -> Request:
    """What the arguments of a public function ask for; what is left out is as usual.

    Raises:
        TraceError: the model is none.
        PlanError: an argument is unknown or not legal.
    """
    check_is_model(arguments["model"])
    refuse_unknown(arguments.get("unknown", {}))
    given = {field.name: arguments[field.name] for field in fields(Request) if field.name in arguments}
    return Request(**given | {"ignore": ignored_patterns(arguments.get("ignore", ()), arguments["model"])})
