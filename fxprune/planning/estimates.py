"""About how long planning and refit will take: operations that the layers ask for, at a speed that is measured here.

Operations are those of the products and factors that a pass over the layers computes (`fxprune.calibration`); how far
they are from the speed of a plain product, and what it costs to gather and compare values one by one, was fitted to
what networks took (`benchmarks/results/planning_cost.json`: VGG-16, ResNet-18 and ResNet-50 within 11 %, ResNet-20
and MobileNetV2 take a fifth to a quarter less). Other load on the machine and disks make it longer: it is said as
"about".
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fxprune.calibration.batches import samples_in
from fxprune.calibration.effort import FULL, Effort
from fxprune.calibration.judging import LESS, TOLD
from fxprune.calibration.recovery import SECONDS
from fxprune.calibration.samples import rows_for
from fxprune.calibration.subject import Subject
from fxprune.channels.branches import residual_branches
from fxprune.graph.convolutions import convolutions, kernels_of
from fxprune.planning.branch_trials import SAMPLE, TRIALS, trial_count
from fxprune.planning.branch_trials import WAYS as WAYS_OF_BRANCHES
from fxprune.planning.requests import AUTO, BRANCH, DEFAULT_RATIO, Request

ROUNDS = 14
"""Rounds of the one-sided problem of a layer, as measured."""
WAYS = 3
"""Plans that are judged, at most, to spend a budget."""
FINALISTS = 3
"""Ways to divide a budget that are recovered for a tenth of the time where recovery is asked for, so that the best is
known (`fxprune.planning.recovery_trials`)."""
SLOWER = 1.3
"""By how much the work is slower than products of the same number of operations."""
READ, GIVEN = 1_000, 7_300
"""Each value that a layer reads, unfolded, and each that it should give, takes as long as so many multiplications: to
gather it, and to compare it in all rounds."""
CONVOLUTION = 2.0
"""The same for the forward passes."""
SIZE = 768
TIMED = 1.5
"""Seconds in which all forms of one convolution are timed, as those of ResNet-50 are in PyTorch."""


@dataclass(frozen=True)
class _Layer:
    """Outputs, unknowns of each, and positions in all images."""

    outputs: int
    unknowns: int
    positions: float


def foreseen(subject: Subject, request: Request, *, compiles: bool = False) -> dict[str, float]:
    """Seconds of each stage, in their order. Without calibration data, or where MACs are not known, only the timing of
    layers takes long.

    Args:
        subject: the model.
        request: what is asked for.
        compiles: whether what `compile` does after planning is counted.
    """
    timing = _timing(subject, request)
    if subject.batches is None or any(macs is None for _, macs in subject.costs.values()):
        return timing
    work = _Work.of(subject)
    ratio = request.ratio if isinstance(request.ratio, float) else DEFAULT_RATIO
    share = min(request.shares.values(), default=1 - ratio)
    judged = WAYS * work.refit(share, LESS)
    counts: dict[str, float] = {}
    if request.granularity == "kernel":
        if request.has_budget and request.sensitivity is None:
            counts[SENSITIVITY] = work.sensitivity()
        if request.has_budget and request.latency is None:
            counts[JUDGING] = judged
        counts[PLAN] = work.plan(share)
    elif request.granularity == AUTO:
        trials = _trials(subject, work, share)
        counts = {TRIALS: trials, SENSITIVITY: 4 * work.sensitivity(), JUDGING: 4 * judged, PLAN: work.plan(share)}
    elif request.granularity == BRANCH:
        counts = {TRIALS: _trials(subject, work, share), JUDGING: len(WAYS_OF_BRANCHES) * work.refit(share, LESS)}
        if compiles:
            counts[REFIT] = work.refit(share)
    else:
        counts = {SENSITIVITY: work.sensitivity(), JUDGING: judged if request.has_budget else 0.0}
        if not isinstance(request.granularity, str):  # kernels of what filters leave
            counts[PLAN] = work.plan(share)
        if compiles:
            counts[REFIT] = work.refit(share)
    if compiles and request.recovery is None:
        counts[TELLING] = work.refit(share, TOLD)
    seconds = _timed(counts)
    before = {SENSITIVITY: seconds[SENSITIVITY]} if request.granularity == "kernel" and SENSITIVITY in seconds else {}
    seconds = before | timing | seconds  # what comes first stands first
    if compiles and request.recovery is not None:
        seconds[RECOVERY] = request.recovery.seconds or SECONDS
        if request.granularity == AUTO:
            seconds[JUDGING] += FINALISTS * (request.recovery.tenth().seconds or SECONDS / 10)
    return seconds


def foreseen_refit(subject: Subject, *, agreement: bool = True) -> dict[str, float]:
    """The same for `mask` and `refit`."""
    if subject.batches is None or any(macs is None for _, macs in subject.costs.values()):
        return {}
    work = _Work.of(subject)
    counts = {REFIT: work.refit(1 - DEFAULT_RATIO)}
    return _timed(counts | ({TELLING: work.refit(1 - DEFAULT_RATIO, TOLD)} if agreement else {}))


SENSITIVITY, TIMING, JUDGING, PLAN, REFIT, TELLING, RECOVERY = (
    "sensitivity",
    "timing",
    "judging",
    "plan",
    "refit",
    "agreement",
    "recovery",
)
"""The stages: measuring layers, timing them, plans that are judged, plan with its refit, refit, judging the result, and
training."""


def _timing(subject: Subject, request: Request) -> dict[str, float]:
    """Seconds of timing layers, none of which was timed before."""
    if request.latency is None or request.latency_table is not None or request.granularity == BRANCH:
        return {}
    return {TIMING: TIMED * len(convolutions(subject.layers))}


def _trials(subject: Subject, work: "_Work", share: float) -> float:
    """Multiplications of comparing networks without some of their branches."""
    branches, _ = residual_branches(subject.trace.module, subject.trace.values)
    return trial_count(len(branches), 1 - share) * CONVOLUTION * work.forward * min(1.0, SAMPLE / work.images)


@dataclass(frozen=True)
class _Work:
    """Multiplications of passes over the layers of a network, forward passes included."""

    layers: tuple[_Layer, ...]
    images: int
    forward: float

    @classmethod
    def of(cls, subject: Subject) -> "_Work":
        assert subject.batches is not None
        images = sum(samples_in(batch) or 1 for batch in subject.batches)
        return cls(
            tuple(_layers(subject, images)), images, images * sum(macs or 0 for _, macs in subject.costs.values())
        )

    def refit(self, share: float, effort: Effort = FULL) -> float:
        """Both networks pass, and each layer is solved with a share of its columns."""
        total, rounds = 2 * CONVOLUTION * self.forward, min(ROUNDS, effort.rounds)
        for layer in self.layers:
            count, kept = self._rows(layer, effort), share * layer.unknowns
            total += count * (READ * layer.unknowns + GIVEN * layer.outputs)
            if count < kept:
                total += count**2 * kept + count**3 + 2 * rounds * count**2 * layer.outputs
            else:
                total += count * layer.unknowns**2 / 2 + 2 * rounds * count * kept * layer.outputs
                total += kept**3 + rounds * kept**2 * layer.outputs
        return total

    def plan(self, share: float) -> float:
        """The same, and kernels are chosen."""
        return self.refit(share) + sum(4 * layer.unknowns**3 for layer in self.layers)

    def sensitivity(self) -> float:
        """One network passes, and each layer is fitted on one half for several numbers of channels."""
        total = CONVOLUTION * self.forward
        for layer in self.layers:
            total += self._rows(layer) * (READ * layer.unknowns + GIVEN * layer.outputs)
            total += self._rows(layer) * layer.unknowns**2 / 2 + 8 * layer.unknowns**3
            total += 3 * layer.unknowns**2 * layer.outputs
        return total

    @staticmethod
    def _rows(layer: _Layer, effort: Effort = FULL) -> float:
        return min(rows_for(layer.unknowns, effort.rows), layer.positions)


def _layers(subject: Subject, images: int) -> Iterator[_Layer]:
    for name, conv in convolutions(subject.layers).items():
        _, macs = subject.costs.get(name, (0, 0))
        weight = kernels_of(conv)
        if conv.groups == 1 and macs:
            yield _Layer(len(weight), weight[0].numel(), images * macs / weight.numel())


def _timed(counts: Mapping[str, float]) -> dict[str, float]:
    """Seconds from numbers of multiplications."""
    speed = _speed()
    return {stage: SLOWER * count / speed for stage, count in counts.items() if count}


def _speed() -> float:
    """Multiplications each second in a product of float32 matrices, with the threads that torch has: some
    milliseconds are spent on it.
    """
    left, right = torch.ones(SIZE, SIZE), torch.ones(SIZE, SIZE)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return SIZE**3 / best
