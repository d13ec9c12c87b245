"""How far a network without some of its branches is from the dense one.

The branches are made their constants, and the outputs are compared on a sample of the calibration data. What the layers
behind a branch would see without it is another distribution, and the refit will mend that; so networks are compared in
two ways:

- *as they are*;
- *normalized anew*: BatchNorm takes the statistics of the sample itself (Li et al., "EagleEye: Fast Sub-net Evaluation
  for Efficient Neural Network Pruning", ECCV 2020, section 3.3, adaptive batch normalization).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxprune.calibration.agreement import measure_agreement
from fxprune.calibration.batches import Batch, rows_of, samples_in
from fxprune.calibration.subject import Subject
from fxprune.graph.copying import copied

SAMPLE = 128
"""Inputs on which branches are compared, at most."""
TRIED = 5
"""How many branches are tried for each place: those which alone are missed least."""
WAYS = {"as they are": False, "normalized anew": True}
"""Ways to compare, with whether BatchNorm takes the statistics of the sample."""

TRIALS = "trials"
"""The stage of a run in which that is done."""

Branches = tuple[str, ...]


def trial_count(branches: int, share: float = 0.5) -> int:
    """About how many networks are compared to plan without so many branches, or a share of them."""
    return round(len(WAYS) * branches * (1 + share * TRIED))


class Trials:
    """Distances of a network without some branches from the dense one, on a sample of the calibration data.

    Args:
        subject: the model, with calibration data.
        branches: how many can go.
    """

    def __init__(self, subject: Subject, branches: int) -> None:
        assert subject.batches is not None
        self._subject, self._count = subject, trial_count(branches)
        self._sample = list(_sample(subject.batches))
        self._dense, self._network = copied(subject.model).eval(), copied(subject.model).eval()
        self._given: dict[int, Any] = {}

    def suit(self, renews: bool) -> bool:
        """Whether the sample can be compared so: statistics need several inputs in a batch."""
        return not renews or all((samples_in(batch) or 1) > 1 for batch in self._sample)

    def distances(self, renews: bool) -> Callable[[Branches], float]:
        """The function that gives them; `renews`: with the statistics of the sample in BatchNorm."""
        known: dict[frozenset[str], float] = {}
        self._subject.begin(TRIALS, self._count)

        def distance(gone: Branches) -> float:
            key = frozenset(gone)
            if key not in known:
                known[key] = self._measured(key, renews)
                if self._subject.run is not None:
                    self._subject.run.advance(1.0)
            return known[key]

        return distance

    def _measured(self, gone: frozenset[str], renews: bool) -> float:
        with _without(self._network, gone), _renewed(self._network if renews else None):
            found = measure_agreement(self._dense, self._network, self._sample, self._call, False)
        return float("inf") if found is None else found.distance

    def _call(self, model: nn.Module, batch: Batch) -> Any:
        """What a model gives; the dense one is run once a batch."""
        if model is not self._dense:
            return self._subject.output_of(model, batch)
        if id(batch) not in self._given:
            self._given[id(batch)] = self._subject.output_of(model, batch)
        return self._given[id(batch)]


@contextmanager
def _without(network: nn.Module, gone: frozenset[str]) -> Iterator[None]:
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
def _renewed(network: nn.Module | None) -> Iterator[None]:
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


def _sample(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The first inputs, in batches as they are."""
    left = SAMPLE
    for batch in batches:
        size = samples_in(batch)
        yield batch if size is None or size <= left else rows_of(batch, range(left))
        left -= size or 1
        if left <= 0:
            return
