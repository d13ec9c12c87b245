"""Plan which residual branches are removed: the one that the network misses least for what it costs, then the next.

What a branch is worth depends on which others are gone, so each is chosen anew, by trying: the branch is made its
constant, and the output is compared with that of the dense network. What the layers behind it would see is another
distribution, and the refit will mend that; so networks are compared in two ways, and what comes of each is refitted and
judged (`fxprune.calibration.judging`):

- *as they are*;
- *normalized anew*: BatchNorm takes the statistics of the sample itself (Li et al., "EagleEye: Fast Sub-net Evaluation
  for Efficient Neural Network Pruning", ECCV 2020, section 3.3, adaptive batch normalization).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxprune.calibration.agreement import measure_agreement
from fxprune.calibration.batches import Batch, rows_of, samples_in
from fxprune.calibration.judging import Judge, best
from fxprune.calibration.subject import Subject
from fxprune.channels.branches import residual_branches
from fxprune.errors import PlanError
from fxprune.graph.copying import copied
from fxprune.planning.candidates import told
from fxprune.planning.lossy import masked_by
from fxprune.planning.patterns import match_patterns
from fxprune.planning.requests import Request
from fxprune.plans import PrunePlan

SAMPLE = 128
"""Inputs on which branches are compared, at most."""
TRIED = 5
"""How many branches are tried for each place: those which alone are missed least."""
WAYS = {"as they are": False, "normalized anew": True}
"""Ways to compare, with whether BatchNorm takes the statistics of the sample."""


@dataclass(frozen=True)
class Removable:
    """The branches of a network that can go.

    Attributes:
        layers: of each, by name, in graph order: the module paths of its layers.
        cost: what each costs, in the unit of the budget.
        total: what the network costs.
        refused: those that cannot go, with the reason.
    """

    layers: Mapping[str, tuple[str, ...]]
    cost: Mapping[str, float]
    total: float
    refused: Mapping[str, str]


def plan_branches(subject: Subject, request: Request) -> PrunePlan:
    """Choose the branches to remove. A graph is needed: a user's own forward computes them.

    Raises:
        PlanError: there are no calibration data or no branches, the result is to be the user's own module, or so much
            cannot be removed.
        CalibrationError: the calibration data do not fit the model.
    """
    plans = branch_plans(subject, request)
    if len(plans) == 1:
        return next(iter(plans.values()))
    judge = Judge(subject)
    found = {way: judge.agreement(masked_by(judge.fitted, plan)) for way, plan in plans.items()}
    way = best(found)
    return replace(plans[way], remarks=(told("ways to choose branches", found, way),))


def branch_plans(subject: Subject, request: Request) -> dict[str, PrunePlan]:
    """Plans of branches by the way in which they were compared.

    Raises:
        PlanError: see `plan_branches`.
        CalibrationError: see there.
    """
    if subject.batches is None:
        raise PlanError("branches are compared on data; pass calibration= for granularity='branch'")
    if subject.is_recorded:
        raise PlanError(
            "whole branches go from a graph only, the model's own forward computes them; pass output='graph', or "
            "granularity='kernel' or 'filter'"
        )
    removable = removable_branches(subject, request)
    trials = _Trials(subject, request.progress)
    plans: dict[str, PrunePlan] = {}
    for way, renews in WAYS.items():
        if renews and not trials.has_statistics:
            continue
        chosen = _chosen(removable, request, trials.distances(renews))
        branches = {name: layers for name, layers in removable.layers.items() if name in chosen}
        if any(branches.keys() == plan.branches.keys() for plan in plans.values()):
            continue
        plans[way] = PrunePlan(
            {},
            {},
            {} if request.filter_ratio is None else request.filter_ratio,
            f"branch, {way}",
            "distance",
            request.seed,
            branches=branches,
        )
    return plans


def removable_branches(subject: Subject, request: Request) -> Removable:
    """The branches that can go, none of whose layers is to be ignored, and what they cost.

    Raises:
        PlanError: there are none.
    """
    found, refused = residual_branches(subject.trace.module, subject.trace.values)
    layers = {name: branch.modules for name, branch in found.items()}
    names = [name for name, _ in subject.layers.named_modules() if name]
    kept = match_patterns("ignore", dict.fromkeys(request.patterns, True), names)
    layers = {name: names for name, names in layers.items() if kept.keys().isdisjoint(names)}
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3])
        raise PlanError(
            "no residual branch of the network can go as a whole"
            + (f" ({reasons})" if reasons else ": nothing is added to what it was computed from")
            + "; use granularity='kernel' or 'filter'"
        )
    if request.budget is not None and request.budget[0] == "params":
        modules = dict(subject.layers.named_modules())
        cost = {name: float(sum(_parameters(modules[layer]) for layer in names)) for name, names in layers.items()}
        total = float(sum(parameter.numel() for parameter in subject.trace.module.parameters()))
    else:
        macs = {name: float(count or 0) for name, (_, count) in subject.costs.items()}
        cost = {name: sum(macs.get(layer, 0.0) for layer in names) for name, names in layers.items()}
        total = sum(macs.values())
    return Removable(layers, cost, total, refused)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _chosen(removable: Removable, request: Request, distance: Callable[[Sequence[str]], float]) -> tuple[str, ...]:
    """The branches to remove, in the order of their choice.

    A ratio is a share of the branches. A budget is met from below, by no more than the last branch.
    """
    names, cost = list(removable.layers), removable.cost
    if request.budget is None:
        ratio = request.filter_ratio
        if isinstance(ratio, Mapping):
            raise PlanError("ratio maps patterns to shares, but branches go one by one; pass one ratio, or macs=")
        assert ratio is not None
        count, saving = min(len(names), round(ratio * len(names))), 0.0
    else:
        what, share = request.budget
        count, saving = 0, (1 - share) * removable.total
        if saving > sum(cost.values()):
            least = 1 - sum(cost.values()) / removable.total
            raise PlanError(
                f"{what}={share:.4g} cannot be reached by branches alone: without all {len(names)} that can go "
                f"{least:.4g} remain; ask for that or more, or use granularity='auto'"
            )
    alone = {name: distance((name,)) for name in names}
    gone: list[str] = []
    while len(gone) < count or sum(cost[name] for name in gone) < saving * (1 - 1e-9):
        left = saving - sum(cost[name] for name in gone)
        worth = {name: alone[name] / max(min(cost[name], left), 1.0) if saving else alone[name] for name in names}
        open_ = sorted((name for name in names if name not in gone), key=worth.__getitem__)[:TRIED]
        after = {name: distance((*gone, name)) for name in open_}
        before = distance(gone)
        gone.append(
            min(open_, key=lambda name: (after[name] - before) / (max(min(cost[name], left), 1.0) if saving else 1.0))
        )
    return tuple(gone)


class _Trials:
    """Distances of a network without some branches from the dense one, on a sample of the calibration data.

    Args:
        subject: the model, with calibration data.
        progress: show a bar on stderr.
    """

    def __init__(self, subject: Subject, progress: bool) -> None:
        assert subject.batches is not None
        self._subject, self._progress = subject, progress
        self._sample = _sample(subject.batches)
        self._dense, self._network = copied(subject.model).eval(), copied(subject.model).eval()
        self._known: dict[int, Any] = {}

    @property
    def has_statistics(self) -> bool:
        """Whether each batch of the sample has more than one input."""
        return all((samples_in(batch) or 1) > 1 for batch in self._sample)

    def distances(self, renews: bool) -> Callable[[Sequence[str]], float]:
        """The function that gives them; `renews`: with the statistics of the sample in BatchNorm."""
        known: dict[frozenset[str], float] = {}
        bar = tqdm(desc="trying branches", unit="trial", disable=not self._progress)

        def distance(gone: Sequence[str]) -> float:
            key = frozenset(gone)
            if key not in known:
                known[key] = self._measured(key, renews)
                bar.update()
            return known[key]

        return distance

    def _measured(self, gone: frozenset[str], renews: bool) -> float:
        with _without(self._network, gone), _renewed(self._network if renews else None):
            found = measure_agreement(self._dense, self._network, self._sample, self._call, False)
        return float("inf") if found is None else found.distance

    def _call(self, model: nn.Module, batch: Batch) -> Any:
        if model is self._dense and id(batch) in self._known:
            return self._known[id(batch)]
        own = torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        given = self._subject.example(own).call(model)
        if model is self._dense:
            self._known[id(batch)] = given
        return given


@contextmanager
def _without(network: nn.Module, gone: frozenset[str]) -> Any:
    """Make branches constant for a while."""
    weights = [network.get_parameter(f"{name}.weight") for name in gone]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        try:
            yield
        finally:
            for weight, values in zip(weights, kept, strict=True):
                weight.copy_(values)


@contextmanager
def _renewed(network: nn.Module | None) -> Any:
    """Let BatchNorm take the statistics of each batch for a while, and keep its own."""
    norms = [] if network is None else [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    state = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, state, strict=True):
            norm.eval()
            for name, values in buffers.items():
                norm.get_buffer(name).copy_(values)


def _sample(batches: Sequence[Batch]) -> list[Batch]:
    """The first inputs, in batches as they are."""
    found: list[Batch] = []
    count = 0
    for batch in batches:
        size = samples_in(batch)
        if size is not None and count + size > SAMPLE:
            batch = rows_of(batch, range(SAMPLE - count)) if count < SAMPLE else ()
        if batch:
            found.append(batch)
        count += size or 1
        if count >= SAMPLE:
            break
    return found
