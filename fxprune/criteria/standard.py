"""The criteria that work by name: from the weights, an earlier state of them, or the energy of the inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fxprune.criteria.criterion import Criterion, Evidence, ScoreFunction, as_criterion
from fxprune.errors import PlanError, near_matches
from fxprune.graph.convolutions import Convolution

# A kernel is `weight[o, c]`; all scores below are computed in float64 on the CPU.


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Sum over the kernel of `|w| ** power`.

    Power 1 is the norm of Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017,
    section 3.1, for one kernel. Power 2 is the energy and not its root, because energies of kernels add up: the kept
    importance is the energy of the weight that stays.
    """

    name: str
    power: int

    def bind(self, evidence: Evidence) -> ScoreFunction:
        return lambda name, conv: _weight(conv).abs().pow(self.power).sum(_kernel(conv))


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform in [0, 1), the baseline. It depends on the seed, the name of the layer and its shape only.

    The grouping is still chosen for the scores: co-clustering finds groups that agree by chance.
    """

    name: str = "random"

    def bind(self, evidence: Evidence) -> ScoreFunction:
        def score(name: str, conv: Convolution) -> Tensor:
            generator = np.random.default_rng([evidence.seed, *name.encode()])
            return torch.from_numpy(generator.random(conv.weight.shape[:2]))

        return score


@dataclass(frozen=True)
class Movement(Criterion):
    """Sum over the kernel of `|w - w_earlier|`.

    "Movement" of Zhou, Lan, Liu, Yosinski, "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask", NeurIPS
    2019, section on mask criteria, which takes the initial weights as the earlier ones. It is not the gradient-based
    movement pruning of Sanh et al., 2020.
    """

    name: str = "movement"

    def bind(self, evidence: Evidence) -> ScoreFunction:
        earlier = _earlier(self.name, evidence)
        return lambda name, conv: (_weight(conv) - earlier(name, conv)).abs().sum(_kernel(conv))


@dataclass(frozen=True)
class MagnitudeIncrease(Criterion):
    """Sum over the kernel of `|w| - |w_earlier|`, less the lowest such sum of the layer.

    "Magnitude increase" of Zhou et al., see `Movement`. The sums have either sign and scores must not. Taking the
    minimum off adds the same to every kernel, hence the same to every kernel group, so each comparison inside a layer
    is that of the signed sums; clipping at 0 would make kernels that shrank equal. The price: the scores of two layers
    have different zeros and cannot be compared.
    """

    name: str = "magnitude_increase"

    def bind(self, evidence: Evidence) -> ScoreFunction:
        earlier = _earlier(self.name, evidence)

        def score(name: str, conv: Convolution) -> Tensor:
            increase = (_weight(conv).abs() - earlier(name, conv).abs()).sum(_kernel(conv))
            return increase - increase.min()

        return score


@dataclass(frozen=True)
class Activation(Criterion):
    """Energy of the kernel times the second moment of its input channel: `sum(w^2) * E[x_c^2]`.

    It is the mean energy that the kernel adds to the output, if the values under it are uncorrelated (exact for 1x1
    kernels). The square of the weight criterion of Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for
    Large Language Models", ICLR 2024, section 3 (Wanda), `|w| * |x_c|_2`, summed over the kernel.
    """

    name: str = "activation"

    def bind(self, evidence: Evidence) -> ScoreFunction:
        moments = evidence.moments
        if moments is None:
            raise PlanError(f"criterion {self.name!r} needs the second moments of the inputs; pass calibration=")

        def score(name: str, conv: Convolution) -> Tensor:
            who = f"{name}: criterion {self.name!r}"
            if name not in moments:
                raise PlanError(
                    f"{who}: no second moments were measured here; the calibration data must run through the layer, "
                    f"or leave it alone with ignore=({name!r},)"
                )
            moment = moments[name].to("cpu", torch.float64)
            if tuple(moment.shape) != (conv.in_channels,):
                raise PlanError(
                    f"{who}: the second moments have shape {tuple(moment.shape)}, not ({conv.in_channels},)"
                )
            if not bool((moment.isfinite() & (moment >= 0)).all()):
                raise PlanError(f"{who}: second moments are negative, NaN or infinite; look at the calibration data")
            return _weight(conv).square().sum(_kernel(conv)) * moment

        return score


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        criterion.name: criterion
        for criterion in (
            Magnitude("l1", 1),
            Magnitude("l2", 2),
            Random(),
            Movement(),
            MagnitudeIncrease(),
            Activation(),
        )
    }
)
"""Criteria by name. `Taylor` is not among them: it needs a loss."""


def criterion_of(criterion: object) -> Criterion:
    """Turn what a user passes as `criterion=` into a criterion.

    Args:
        criterion: a name in `CRITERIA`, a `Criterion`, or a function `(name, conv) -> (O, C)`.

    Raises:
        PlanError: it is none of these.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            if criterion == "taylor":
                raise PlanError("criterion 'taylor' needs a loss and data to differentiate; pass Taylor(loss, data)")
            raise PlanError(f"criterion is {criterion!r}{near_matches(criterion, CRITERIA)}; it must be {_LEGAL}")
        criterion = CRITERIA[criterion]
    found = as_criterion(criterion)
    if found is None:
        raise PlanError(f"criterion is {criterion!r}; it must be {_LEGAL}")
    return found


def resolve(criterion: object, evidence: Evidence) -> tuple[str, ScoreFunction]:
    """The name of a criterion and its score function.

    Args:
        criterion: see `criterion_of`.
        evidence: what is known of the model.

    Raises:
        PlanError: see `criterion_of`, or evidence is missing.
    """
    found = criterion_of(criterion)
    return found.name, found.bind(evidence)


_LEGAL = f"one of {', '.join(map(repr, CRITERIA))}, a Criterion, or a function (name, conv) -> scores (O, C)"


def _kernel(conv: Convolution) -> tuple[int, ...]:
    """The dimensions of one kernel in the weight."""
    return tuple(range(2, conv.weight.dim()))


def _weight(conv: Convolution) -> Tensor:
    return conv.weight.detach().to("cpu", torch.float64)


def _earlier(criterion: str, evidence: Evidence) -> Callable[[str, Convolution], Tensor]:
    """The earlier weight `(O, C, *kernel)` of a layer, checked."""
    state = evidence.earlier
    if state is None:
        raise PlanError(
            f"criterion {criterion!r} needs an earlier state of the weights; pass snapshots=[state_dict, ...]"
        )

    def earlier(name: str, conv: Convolution) -> Tensor:
        who, key = f"{name}: criterion {criterion!r}", f"{name}.weight"
        if key not in state:
            raise PlanError(
                f"{who}: the earlier state has no {key!r}{near_matches(key, state)}; pass a snapshot of this model"
            )
        if state[key].shape != conv.weight.shape:
            raise PlanError(
                f"{who}: the earlier weight has shape {tuple(state[key].shape)}, the present one "
                f"{tuple(conv.weight.shape)}; pass a snapshot of this model"
            )
        weight = state[key].detach().to("cpu", torch.float64)
        if not bool(weight.isfinite().all()):
            raise PlanError(f"{who}: the earlier weight holds NaN or infinity; pass another snapshot")
        return weight

    return earlier
