"""How well a pruned network follows the dense one: on inputs held back from the fit, for a fit flatters itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.calibration.batches import Batch, rows_of, samples_in
from fxprune.graph.containers import tensors_in

# One input of eight is held back, but at least FEW if that is no more than a quarter of all, and at most MANY, on which
# an agreement of 90 % is known to 3 %.
SHARE = 1 / 8
FEW = 16
MANY = 128
GOOD = 0.9
"""From this agreement on a result needs no warning."""
COARSE = 0.05
"""Wider intervals are given in whole percent."""

AGREEMENT = "fxprune_agreement"
"""Attribute of a masked model under which its agreement is kept for the report."""


@dataclass(frozen=True)
class Agreement:
    """What a pruned network has in common with the dense one. `str()` is a sentence.

    Attributes:
        share: in `[0, 1]`. Of networks that give scores of classes `(N, K)`: the share of inputs for which both put the
            same class first. Of others: the share of the variance of the dense output that the pruned one reproduces.
        inputs: number of inputs it was measured on.
        held_out: whether the pruned network was refitted without these. Else the share flatters.
        classes: whether there are scores of classes.
        distance: what agreements are ranked by, 0 or more, for it makes more of few inputs. With classes the mean
            total variation distance of both distributions (after softmax), else the relative squared error.
        one_class: whether the dense network puts all of several inputs into one class, so that the share says little.
    """

    share: float
    inputs: int
    held_out: bool
    classes: bool
    distance: float
    one_class: bool = False

    @property
    def is_poor(self) -> bool:
        """Whether the user should be warned."""
        return self.share < GOOD

    @property
    def figure(self) -> str:
        """The share in percent and, of classes, what so few inputs leave open: `93.3 % (70 to 99)`."""
        return f"{100 * self.share:.1f} %" + (f" ({interval(self.share, self.inputs)})" if self.classes else "")

    def __str__(self) -> str:
        where = "held-out calibration inputs" if self.held_out else "calibration inputs, which were fitted and flatter"
        what = (
            f"95 % interval {interval(self.share, self.inputs)}"
            if self.classes
            else "share of the variance of its output; there are no scores of classes"
        )
        found = f"agreement with the dense network on {self.inputs} {where}: {100 * self.share:.1f} % ({what})"
        if self.one_class:
            found = f"{found}; the dense network puts all of them into one class, so that this says little"
        return found


def interval(share: float, inputs: int) -> str:
    """The 95 % interval, in percent, of what a share of so many inputs estimates (Wilson, Probable Inference, the Law
    of Succession, and Statistical Inference, 1927).

    >>> interval(14 / 15, 15), interval(0.95, 10_000)
    ('70 to 99', '94.6 to 95.4')
    """
    from scipy.stats import binomtest  # half a second

    found = binomtest(round(share * inputs), inputs).proportion_ci(0.95, method="wilson")
    digits = int(found.high - found.low < COARSE)
    return f"{100 * found.low:.{digits}f} to {100 * found.high:.{digits}f}"


def hold_out(batches: Sequence[Batch], sliceable: bool = True) -> tuple[list[Batch], list[Batch]] | None:
    """Split calibration data into what is fitted and what is held back, spread evenly; None if there is too little.

    Args:
        batches: arguments of each batch.
        sliceable: whether batches may lose some of their samples; else, and where the tensors of a batch do not agree
            on what a sample is, whole batches are held back.
    """
    sizes = [samples_in(batch) for batch in batches]
    if not sliceable or None in sizes:
        held = _spread(len(batches), math.ceil(SHARE * len(batches))) if len(batches) >= 1 / SHARE else set()
        return _nothing_if_empty(
            [batch for i, batch in enumerate(batches) if i not in held],
            [batch for i, batch in enumerate(batches) if i in held],
        )
    counts = [size or 0 for size in sizes]
    total = sum(counts)
    held = _spread(total, min(MANY, max(int(SHARE * total), min(FEW, total // 4))))
    fitted: list[Batch] = []
    judged: list[Batch] = []
    start = 0
    for batch, count in zip(batches, counts, strict=True):
        inside = [start + i in held for i in range(count)]
        for part, rows in ((fitted, [i for i in range(count) if not inside[i]]), (judged, _where(inside))):
            if rows:
                part.append(batch if len(rows) == count else rows_of(batch, rows))
        start += count
    return _nothing_if_empty(fitted, judged)


def measure_agreement(
    dense: nn.Module, pruned: nn.Module, batches: Sequence[Any], call: Callable[[nn.Module, Any], Any], held_out: bool
) -> Agreement | None:
    """Run two networks over the same inputs and compare what they give. None if that cannot be compared: there is no
    floating-point tensor in it, or their shapes differ.

    Args:
        dense: in evaluation mode, as `pruned`. Its forward may write to its buffers.
        pruned: see `dense`.
        batches: what they are called with.
        call: calls one with a batch.
        held_out: whether `pruned` has not seen the batches.
    """
    tally = _Tally()
    with torch.no_grad():
        for batch in batches:
            given = []
            for network in (dense, pruned):
                with torch.random.fork_rng(devices=[]):  # what draws numbers in evaluation mode draws the same
                    torch.manual_seed(0)
                    given.append([t for t in tensors_in(call(network, batch)) if t.is_floating_point()])
            if not tally.add(*given):
                return None
    found = tally.agreement()
    return None if found is None else replace(found, held_out=held_out)


class _Tally:
    """Sums over batches, float64."""

    def __init__(self) -> None:
        self.inputs = self.same = 0
        self.apart = self.error = 0.0
        self.moments: dict[int, tuple[int, float, float]] = {}  # of each output: count, sum, sum of squares
        self.classes = True
        self.chosen: set[int] = set()

    def add(self, dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> bool:
        """Count a batch; False if the outputs cannot be compared."""
        if not dense or [t.shape for t in dense] != [t.shape for t in pruned]:
            return False
        scores, other = dense[0].double(), pruned[0].double()
        self.classes &= scores.dim() == 2 and scores.shape[1] > 1
        self.inputs += len(scores) if scores.dim() else 1
        if self.classes:
            first = scores.argmax(1)
            self.same += int((first == other.argmax(1)).sum())
            self.chosen |= set(first.tolist())
            self.apart += float((scores.softmax(1) - other.softmax(1)).abs().sum()) / 2
        for i, (t, p) in enumerate(zip(dense, pruned, strict=True)):
            t, p = t.double(), p.double()
            count, total, squares = self.moments.get(i, (0, 0.0, 0.0))
            self.moments[i] = count + t.numel(), total + float(t.sum()), squares + float(t.square().sum())
            self.error += float((t - p).square().sum())
        return True

    def agreement(self) -> Agreement | None:
        if not self.inputs:
            return None
        if self.classes:
            share, distance = self.same / self.inputs, self.apart / self.inputs
            return Agreement(share, self.inputs, False, True, distance, one_class=len(self.chosen) == 1 < self.inputs)
        variance = sum(squares - total**2 / count for count, total, squares in self.moments.values() if count)
        error = self.error / variance if variance > 0 else float(self.error > 0)
        if not math.isfinite(error):
            error = math.inf
        return Agreement(max(0.0, 1 - error), self.inputs, False, False, error)


def _spread(total: int, count: int) -> set[int]:
    """`count` of `total` indices, evenly spaced."""
    return {int((i + 0.5) * total / count) for i in range(count)}


def _where(flags: Sequence[bool]) -> list[int]:
    return [i for i, flag in enumerate(flags) if flag]


def _nothing_if_empty(fitted: list[Batch], judged: list[Batch]) -> tuple[list[Batch], list[Batch]] | None:
    return (fitted, judged) if fitted and judged else None
