"""The pruners that are compared: each makes of one network one with a given share of its MACs.

Filters here are removed by the l1 norm (Li et al. 2017, section 3.1) or for the error that the refit leaves; *variety*
is `fxprune.criteria.variety`. Networks that are *refitted* have their kept weights solved anew on images to calibrate
with, and those that are *recovered* are then trained on these without labels. The published methods, SR-GKP and
TMI-GKP, do not know of that and have it as a variant; Torch-Pruning has nothing of the kind, so that what fxprune makes
of its choice of channels is a row of its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

import fxprune
from fxprune.comparison.layer_calls import count_macs
from fxprune.comparison.torch_pruning import Importance, Narrowed, as_plan, prune_channels
from fxprune.criteria.snapshots import Snapshot
from fxprune.graph.convolutions import convolutions
from fxprune.graph.costs import layer_costs
from fxprune.graph.tracing import trace
from fxprune.planning import Request
from fxprune.planning.planner import PUBLISHED_GROUPS, Planner
from fxprune.plans.shapes import Groups
from fxprune.vocabulary import GranularityChoice, VarietyName

ROUND_TO = 4
"""Where kernels go after filters, layers keep a multiple of so many filters, or they would not divide into groups."""
RECOVERY_STEPS = 1500
"""Of the recovery, as `compile(..., recover=True)` takes if there is time; steps and not seconds, to be repeatable."""
RATIO_STEPS = 12
"""Halvings of the range of uniform ratios; layers of up to 1,024 channels tell no finer ones apart."""


@dataclass(frozen=True)
class Case:
    """What every method is given.

    Attributes:
        model: the dense network, in evaluation mode; it is not changed.
        share: of its MACs that is to remain, in (0, 1].
        images: `(N, C, H, W)`, normalized, to calibrate with.
        labels: int64 `(N,)`, for what needs a loss.
        seed: of the plan.
        snapshots: earlier states of its training, oldest first; empty if there are none.
    """

    model: nn.Module
    share: float
    images: Tensor
    labels: Tensor
    seed: int = 0
    snapshots: Sequence[Snapshot] = ()

    @property
    def example(self) -> Tensor:
        """Two of the images."""
        return self.images[:2]


@dataclass(frozen=True)
class Pruned:
    """A pruned network in evaluation mode.

    Attributes:
        network: of fxprune the masked one, else the smaller one itself.
        plan: what fxprune pruned.
    """

    network: nn.Module
    plan: fxprune.PrunePlan | None = None


def dense(case: Case) -> Pruned:
    """The network as it is: the control of fine-tuning."""
    return Pruned(case.model)


def kernels(case: Case, *, groups: Groups = "auto") -> Pruned:
    """Grouped convolutions, planned by reconstruction, their ratios by sensitivity; refitted."""
    plan = _planned(case.model, case, case.share, groups)
    return _masked(case, plan, refit=True)


def published(case: Case, *, method: str, refit: bool) -> Pruned:
    """Grouped convolutions with 8 groups and one ratio for all layers, as the papers have them."""
    options: dict[str, Any] = {"method": method, "groups": PUBLISHED_GROUPS, "form": "overlap", "seed": case.seed}
    if method == "tmi":
        options["snapshots"] = case.snapshots
    ratio = uniform_ratio(case.model, case.example, case.share, options)
    plan = fxprune.make_plan(case.model, ratio, example_inputs=case.example, **options)
    return _masked(case, plan, refit)


def filters(case: Case, *, refit: bool, variety: VarietyName | None = None) -> Pruned:
    """Whole filters, the same share of each channel space."""
    return _masked(case, _filter_plan(case, case.share, variety), refit)


def combined(case: Case) -> Pruned:
    """Filters first, then kernels of what is left; each step leaves the square root of the share. Refitted."""
    plan = _filter_plan(case, math.sqrt(case.share), round_to=ROUND_TO)
    smaller = fxprune.rewrite(fxprune.mask(case.model, plan, case.images), plan, case.example).eval()
    left = count_macs(smaller, case.example) / count_macs(case.model, case.example)
    grouped = _planned(smaller, case, case.share / left)
    return _masked(case, replace(grouped, removed=plan.removed), refit=True)


def by_error(case: Case, *, granularity: GranularityChoice) -> Pruned:
    """Whole filters for the error that the refit leaves, whole branches by what the output loses without them, or
    whatever is best on held-out images; refitted.
    """
    plan = fxprune.make_plan(
        case.model, macs=case.share, calibration=case.images, granularity=granularity, seed=case.seed
    )
    return _masked(case, plan, refit=True)


def recovered(case: Case, *, prune: Callable[[Case], Pruned]) -> Pruned:
    """What another method gives, recovered on the images it was calibrated with, without their labels."""
    pruned = prune(case)
    assert pruned.plan is not None
    network = fxprune.recover(
        case.model, pruned.network, pruned.plan, case.images, steps=RECOVERY_STEPS, augment="flip+crop", seed=case.seed
    )
    return Pruned(network.eval(), pruned.plan)


def torch_pruning(case: Case, *, importance: Importance) -> Pruned:
    """Whole channels, the same share of each layer, by Torch-Pruning."""
    return Pruned(_narrowed(case, importance).network.eval())


def torch_pruning_refitted(case: Case, *, importance: Importance) -> Pruned:
    """The channels that Torch-Pruning chooses, removed and refitted by fxprune."""
    return _masked(case, as_plan(case.model, _narrowed(case, importance).removed, case.example), refit=True)


def _narrowed(case: Case, importance: Importance) -> Narrowed:
    macs = round(case.share * count_macs(case.model, case.example))
    batches = list(zip(case.images.split(100), case.labels.split(100), strict=True))  # type: ignore[no-untyped-call]
    return prune_channels(case.model, case.example, macs, importance, batches)


def _planned(model: nn.Module, case: Case, share: float, groups: Groups = "auto") -> fxprune.PrunePlan:
    """Kernels by reconstruction. Where their number is open, groups are wide enough to be fast, as with a target, for
    times are compared too; each layer has its own, as without one.
    """
    options: dict[str, Any] = {"groups": groups, "target": "cpu", "share_groups": False, "seed": case.seed}
    return fxprune.make_plan(model, macs=share, calibration=case.images, **options)


def _filter_plan(case: Case, share: float, variety: VarietyName | None = None, round_to: int = 1) -> fxprune.PrunePlan:
    return fxprune.make_plan(
        case.model,
        macs=share,
        example_inputs=case.example,
        granularity="filter",
        criterion="l1",
        variety=variety,
        round_to=round_to,
        seed=case.seed,
    )


def _masked(case: Case, plan: fxprune.PrunePlan, refit: bool) -> Pruned:
    return Pruned(fxprune.mask(case.model, plan, case.images if refit else None).eval(), plan)


def uniform_ratio(model: nn.Module, example: Tensor, share: float, options: dict[str, Any]) -> float:
    """The ratio that, the same in all layers, leaves nearest to `share` of the MACs.

    Args:
        model: the dense network.
        example: `(N, C, H, W)`.
        share: of its MACs.
        options: of `fxprune.make_plan`.

    Raises:
        PlanError: it cannot be planned so.
    """
    traced = trace(model, example)
    macs = {name: cost or 0 for name, (_, cost) in layer_costs(traced.module, traced.values).items()}
    channels = {name: conv.in_channels for name, conv in convolutions(model).items()}
    target = share * sum(macs.values())

    def remaining(ratio: float) -> float:
        shapes = Planner(model, Request(ratio=ratio, **options)).shapes
        return sum(macs.values()) - sum(macs[name] * (1 - s.kept / channels[name]) for name, s in shapes.items())

    low, high = 0.0, 1 - 0.5**RATIO_STEPS
    for _ in range(RATIO_STEPS):
        ratio = (low + high) / 2
        low, high = (ratio, high) if remaining(ratio) > target else (low, ratio)
    return min((low, high), key=lambda ratio: abs(remaining(ratio) - target))


@dataclass(frozen=True)
class Method:
    """A pruner that is compared.

    Attributes:
        name: on the command line and in records.
        label: in tables and plots.
        prune: what it does.
        snapshots: whether it looks at earlier states of the training.
        package: one of `fxprune.comparison.extras` that it needs; empty if none.
    """

    name: str
    label: str
    prune: Callable[[Case], Pruned]
    snapshots: bool = False
    package: str = ""


DENSE = Method("dense", "dense", dense)
EIGHT_GROUPS = partial(kernels, groups=PUBLISHED_GROUPS)
FILTERS, BRANCHES, AUTO = (partial(by_error, granularity=name) for name in ("filter", "branch", "auto"))
METHODS = {
    method.name: method
    for method in (
        DENSE,
        Method("tmi", "TMI-GKP", partial(published, method="tmi", refit=False), snapshots=True),
        Method("tmi-refit", "TMI-GKP, refitted", partial(published, method="tmi", refit=True), snapshots=True),
        Method("srgkp", "SR-GKP", partial(published, method="srgkp", refit=False)),
        Method("srgkp-refit", "SR-GKP, refitted", partial(published, method="srgkp", refit=True)),
        Method("fxprune", "fxprune, kernels", kernels),
        Method("fxprune-8", "fxprune, kernels, 8 groups", EIGHT_GROUPS),
        Method("filters", "filters, not refitted", partial(filters, refit=False)),
        Method("filters-refit", "filters", partial(filters, refit=True)),
        Method("pairs", "filters, variety", partial(filters, refit=True, variety="pairs")),
        Method("pairs-pure", "filters, variety (pure)", partial(filters, refit=True, variety="pairs-pure")),
        Method("filters-error", "filters, by the error", FILTERS),
        Method("combined", "filters and kernels", combined),
        Method("branches", "branches", BRANCHES),
        Method("auto", "auto", AUTO),
        Method("fxprune-8-recovered", "kernels, 8 groups, recovered", partial(recovered, prune=EIGHT_GROUPS)),
        Method("filters-error-recovered", "filters, recovered", partial(recovered, prune=FILTERS)),
        Method("branches-recovered", "branches, recovered", partial(recovered, prune=BRANCHES)),
        Method("auto-recovered", "auto, recovered", partial(recovered, prune=AUTO)),
        Method(
            "tp-magnitude",
            "Torch-Pruning, magnitude",
            partial(torch_pruning, importance="magnitude"),
            package="torch_pruning",
        ),
        Method(
            "tp-magnitude-recovered",
            "Torch-Pruning, magnitude, recovered",
            partial(recovered, prune=partial(torch_pruning_refitted, importance="magnitude")),
            package="torch_pruning",
        ),
        Method("tp-fpgm", "Torch-Pruning, FPGM", partial(torch_pruning, importance="fpgm"), package="torch_pruning"),
        Method(
            "tp-taylor", "Torch-Pruning, Taylor", partial(torch_pruning, importance="taylor"), package="torch_pruning"
        ),
    )
}
"""By name, in the order of tables."""
