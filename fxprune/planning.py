"""Make a plan: decide for each convolution whether it is pruned, into how many groups, and which kernels stay."""

import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm import tqdm

from fxprune.eligibility import check_model, check_weight, parameters_of_several_modules, skip_reason
from fxprune.errors import PlanError
from fxprune.methods import Matrix, cocluster
from fxprune.plans import Form, GroupedKernels, PrunePlan, check_divisible, freeze_ratio, near_matches

Groups = int | Literal["auto"]
Value = TypeVar("Value")

# Overlap form under groups="auto": the most groups whose width stays at 16 filters or more. More groups fit the weights
# better; narrower ones waste the processor (1 thread, oneDNN 3.13, AVX2, 64 channels of 56x56, ratio 0.5, time relative
# to dense: 32 filters a group .55 to .59, 16 filters .70 to .78, 8 filters .96 to 1.02; the work is .5 in each).
AUTO_GROUPS = (8, 4, 2)
AUTO_GROUP_WIDTH = 16
# Partition form, where the ratio dictates the number of groups: below 4 filters a group the convolution is slower than
# the dense one whatever the ratio saves (16 channels of 32x32, 2 filters a group: 1.5 to 5.4 times the dense time).
MIN_PARTITION_WIDTH = 4
# How far a ratio may be from 1 - 1/n and still mean it, so that 0.6667 is 2/3. The channels kept are the same.
PARTITION_TOLERANCE = 1e-4

CRITERIA: Mapping[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda weight: weight.abs().sum(dim=(2, 3)),
    "l2": lambda weight: weight.square().sum(dim=(2, 3)),  # not its root: energies of kernels add up, norms do not
}
"""Importance `(O, C)` of each kernel from a float64 weight `(O, C, kh, kw)`; that of a group is the sum of its kernels.

`"l1"`: sum of absolute values (Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017,
section 3.1). `"l2"`: sum of squares, so the kept importance is the energy of the weight that stays.
"""

METHODS = ("cocluster",)
FORMS = ("auto", "partition", "overlap")


class Shape(NamedTuple):
    """The form of a grouped convolution, its number of groups and the channels that each group keeps."""

    form: Form
    groups: int
    kept: int


def make_plan(
    model: nn.Module,
    ratio: float | Mapping[str, float] = 0.5,
    *,
    groups: Groups | Mapping[str, Groups] = "auto",
    method: str = "cocluster",
    form: str = "auto",
    criterion: str = "l2",
    ignore: str | Iterable[str] = (),
    seed: int = 0,
    progress: bool = False,
    obstacles: Mapping[str, str] = MappingProxyType({}),
) -> PrunePlan:
    """Choose what to prune in a model. The model is only read; equal arguments give equal plans.

    A pattern is a module name with the wildcards of `fnmatch`; it also matches all below the modules it names:
    `"layer1"` matches `"layer1.0.conv1"`. Of several patterns the first that matches counts. A module that has several
    names goes by the first.

    Args:
        model: any module with `Conv2d` layers, on any device, in any floating-point type.
        ratio: share of kernel groups to remove, in `[0, 1)`; or pattern to share, other layers stay dense.
        groups: number of groups, `"auto"`, or pattern to either; layers that no pattern matches get `"auto"`.
        method: how the groups are chosen, one of `METHODS`.
        form: `"partition"`, `"overlap"`, or `"auto"`: partition where the ratio is `1 - 1/n` and the layer allows it.
        criterion: how much a kernel weighs, one of `CRITERIA`.
        ignore: patterns of layers to leave dense.
        seed: of the random starts. Global random state is neither read nor changed.
        progress: show a bar on stderr.
        obstacles: convolutions that the graph does not allow to be grouped, with the reason.

    Raises:
        PlanError: an argument is not legal, a pattern matches nothing, the model has no `Conv2d` or is quantized, a
            weight has no finite values, or an explicit `groups` does not divide the filters of a layer.
    """
    ratio = freeze_ratio(ratio)
    for count in groups.values() if isinstance(groups, Mapping) else (groups,):
        if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise PlanError(f"groups is {count!r}; it must be a positive integer, 'auto', or map patterns to these")
    _check_choice("method", method, METHODS)
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("form", form, FORMS)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise PlanError(f"seed is {seed!r}; it must be an integer, 0 or more")
    check_model(model)
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if not convs:
        raise PlanError(f"{type(model).__name__} has no Conv2d; fxprune prunes only these")
    if "" in convs:
        raise PlanError("the model is itself a Conv2d; wrap it: torch.nn.Sequential(conv)")
    ignored = match_patterns("ignore", dict.fromkeys([ignore] if isinstance(ignore, str) else ignore, True), convs)
    ratios = match_patterns("ratio", ratio, convs) if isinstance(ratio, Mapping) else dict.fromkeys(convs, ratio)
    wanted = match_patterns("groups", groups, convs) if isinstance(groups, Mapping) else dict.fromkeys(convs, groups)
    shared = parameters_of_several_modules(model)

    layers: dict[str, GroupedKernels] = {}
    skipped: dict[str, str] = {}
    # One thread: the matrices are small, and on a busy machine threads that wait for each other cost ten times the
    # work.
    with threadpool_limits(1):
        for name, conv in tqdm(convs.items(), desc="planning", unit="conv", disable=not progress):
            reason = ""
            if name in ignored:
                reason = "ignored on request"
            elif name not in ratios:
                reason = "no pattern of ratio matches"
            elif ratios[name] == 0:
                reason = "ratio is 0"
            elif name in obstacles:
                reason = obstacles[name]
            else:
                reason = skip_reason(conv, shared)
            if reason:
                skipped[name] = reason
                continue
            try:
                shape = choose_shape(conv.out_channels, conv.in_channels, ratios[name], wanted.get(name, "auto"), form)
            except PlanError as error:
                raise PlanError(f"{name}: {error}") from error
            if isinstance(shape, str):
                skipped[name] = shape
                continue
            clustering = cocluster(kernel_importance(name, conv, criterion), shape.groups, shape.kept, shape.form, seed)
            layers[name] = GroupedKernels(clustering.out_order, clustering.kept, conv.in_channels, ratios[name])
    return PrunePlan(layers, skipped, ratio, method, criterion, seed)


def choose_shape(filters: int, channels: int, ratio: float, groups: Groups = "auto", form: str = "auto") -> Shape | str:
    """Choose the form and number of groups of one convolution, or say why it has to stay dense.

    Args:
        filters: `O`.
        channels: `C`.
        ratio: share of kernel groups to remove, in `(0, 1)`.
        groups: number of groups or `"auto"`.
        form: one of `FORMS`.

    Raises:
        PlanError: `groups` does not divide `filters`, or the partition form contradicts `ratio` or `groups`.

    >>> choose_shape(64, 64, 0.5)
    Shape(form='partition', groups=2, kept=32)
    >>> choose_shape(64, 64, 0.6)
    Shape(form='overlap', groups=4, kept=26)
    """
    if groups != "auto":
        try:
            check_divisible(filters, groups)
        except PlanError as error:
            raise PlanError(f"{error}, or use groups='auto', a mapping from patterns, or ignore the layer") from error
    kept = kept_channels(channels, ratio)
    if kept == channels:
        return f"ratio {ratio:.4g} removes none of {channels} channels"
    parts = partition_groups(ratio)
    if form == "partition":
        if parts is None:
            raise PlanError(_no_partition(ratio))
        if groups not in ("auto", parts):
            raise PlanError(
                f"groups={groups} contradicts ratio {ratio:.4g}, whose partition form has 1 / (1 - ratio) = {parts} "
                f"groups; use groups={parts}, groups='auto' or form='overlap'"
            )
    if form != "overlap" and parts is not None and groups in ("auto", parts):
        reason = _partition_obstacle(filters, channels, parts, explicit=groups == parts)
        if not reason:
            return Shape("partition", parts, channels // parts)
        if form == "partition":
            return reason
    if groups == "auto":
        return _auto_overlap(filters, kept)
    return Shape("overlap", groups, kept)


def kept_channels(channels: int, ratio: float) -> int:
    """`(1 - ratio) * channels` rounded to the nearest integer, half up, at least 1.

    >>> kept_channels(25, 0.9)  # 2.5; the float product is 2.4999999999999996
    3
    """
    return max(1, math.floor((1 - ratio) * channels + 0.5 + 1e-9))


def partition_groups(ratio: float) -> int | None:
    """The integer `n >= 2` for which `ratio` is `1 - 1/n`, up to `PARTITION_TOLERANCE`; None if there is none."""
    parts = round(1 / (1 - ratio))
    return parts if parts >= 2 and abs(ratio - (1 - 1 / parts)) <= PARTITION_TOLERANCE else None


def kernel_importance(name: str, conv: nn.Conv2d, criterion: str) -> Matrix:
    """Importance of each kernel of a convolution: `(O, C)` float64 on the CPU, whatever the type of the weight.

    Raises:
        PlanError: the weight has no finite values; the message begins with `name`.
    """
    check_weight(name, conv.weight)
    with torch.no_grad():
        importance: Matrix = CRITERIA[criterion](conv.weight.to("cpu", torch.float64)).numpy()
    return importance


def match_patterns(what: str, patterns: Mapping[str, Value], names: Collection[str]) -> dict[str, Value]:
    """Map each name that a pattern matches to the value of the first such pattern.

    Raises:
        PlanError: a pattern matches no name; the message says what argument it came from and names near ones.
    """
    values: dict[str, Value] = {}
    for pattern, value in patterns.items():
        if not isinstance(pattern, str):
            raise PlanError(f"{what}: {pattern!r} is not a string; use patterns of module names")
        matches = [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")]
        if not matches:
            known = {prefix: None for n in names for prefix in _prefixes(n)}
            raise PlanError(f"{what}: pattern {pattern!r} matches no Conv2d of the model{near_matches(pattern, known)}")
        for match in matches:
            values.setdefault(match, value)
    return values


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _partition_obstacle(filters: int, channels: int, parts: int, explicit: bool) -> str:
    if filters % parts or channels % parts:
        return f"{filters} filters of {channels} channels do not divide into {parts} parts"
    width = min(filters, channels) // parts
    if width < MIN_PARTITION_WIDTH and not explicit:
        return f"too small: {parts} parts of {width} filters or channels, fewer than {MIN_PARTITION_WIDTH}"
    return ""


def _auto_overlap(filters: int, kept: int) -> Shape | str:
    for groups in AUTO_GROUPS:
        if filters % groups == 0 and filters // groups >= AUTO_GROUP_WIDTH:
            return Shape("overlap", groups, kept)
    if filters % 2:
        return f"{filters} filters do not divide into 2 groups"
    return Shape("overlap", 2, kept)


def _no_partition(ratio: float) -> str:
    below = math.floor(1 / (1 - ratio))
    near = " or ".join(f"{1 - 1 / parts:.4g}" for parts in (below, below + 1) if parts >= 2)
    return (
        f"ratio {ratio:.4g} has no partition form, because 1 / (1 - ratio) is not a whole number; "
        f"use {near}, or form='overlap'"
    )


def _check_choice(what: str, value: object, legal: Collection[str]) -> None:
    if value not in legal:
        close = near_matches(str(value), legal)
        raise PlanError(f"{what} is {value!r}{close}; it must be one of {', '.join(map(repr, legal))}")
