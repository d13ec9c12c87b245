"""What a refit errs on images that it was not fitted to: one half of them is fitted, the other one predicted, each in
turn. So the pull toward the dense weights is chosen, and damages are measured.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from fxprune.calibration.least_squares import Part, columns_of, pull_of
from fxprune.calibration.samples import Moments, Samples
from fxprune.methods import cocluster
from fxprune.methods.reconstruction import kernel_energy

# Weights of the pull toward the dense weights, relative to the mean diagonal of the Gram matrix. With PLENTY of rows
# for each unknown the first is right; with fewer the one that does best on images that it was not fitted to.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
PLENTY = 64
# Groups that choose it for all, spread over the layer: it is one of five numbers, and wide layers take long.
JUDGES = 2

Trial = Callable[[float], float]
"""The error on images that were not fitted, for a ridge."""


class Halved(Protocol):
    """Rows of a layer, of which one half can be predicted from the other: `Samples`, or what is left of them."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def halves(self) -> tuple[Moments, Moments]:
        """See `Samples.halves`."""


def choose_ridge(samples: Halved, parts: Sequence[Part], prior: Tensor) -> float:
    """The pull that does best when one half of the images is fitted and the other one predicted.

    Args:
        samples: of the layer.
        parts: outputs and columns of each group.
        prior: `(O, D)` float64, the dense weights.
    """
    if samples.rows >= PLENTY * prior.shape[1]:
        return RIDGES[0]
    if samples.rows < 2:
        return RIDGES[-1]
    judges = parts[:: max(1, len(parts) // JUDGES)]
    trials = [trial for part in judges for trial in _trials(samples, part, prior)]

    @cache
    def error(index: int) -> float:
        return sum(trial(RIDGES[index]) for trial in trials)

    best = len(RIDGES) // 2  # downhill from the middle: too weak a pull errs more the weaker it is, as does too strong
    while (better := min(range(max(0, best - 1), min(best + 2, len(RIDGES))), key=error)) != best:
        best = better
    return RIDGES[best]


def held_out_errors(
    samples: Halved, parts: Sequence[Part], prior: Tensor, ridge: float, counts: Sequence[int]
) -> Tensor:
    """The mean squared error of each output if its group has only the first columns, for several numbers of these.

    One factor of all columns holds those of the first few: it is computed once.

    Args:
        samples: of the layer.
        parts: outputs and columns of each group, the columns in the order in which they count; outputs that are in none
            have no error.
        prior: `(O, D)` float64, the dense weights.
        ridge: the pull toward them, see `RIDGES`.
        counts: how many columns each group has.

    Returns:
        `(len(counts), O)` float64.
    """
    errors = prior.new_zeros(len(counts), len(prior))
    first, second = samples.halves
    for seen, unseen in ((first, second), (second, first)):
        pull = pull_of(float(seen.gram.diagonal().mean()), ridge)
        for outputs, columns in parts:
            columns = columns[: max(counts)]
            index = outputs[:, None], columns
            system = seen.gram[columns[:, None], columns]
            system.diagonal().add_(pull)
            factor = torch.linalg.cholesky(system)
            half_way = torch.linalg.solve_triangular(factor, (seen.cross[index] + pull * prior[index]).T, upper=False)
            gram, cross = unseen.gram[columns[:, None], columns], unseen.cross[index]
            for errors_of, count in zip(errors, counts, strict=True):
                upper = factor[:count, :count].mT
                own = torch.linalg.solve_triangular(upper, half_way[:count], upper=True).T
                explained = ((2 * cross[:, :count] - own @ gram[:count, :count]) * own).sum(1)
                errors_of[outputs] += (unseen.energy[outputs] - explained) / 2
    return errors


def regularized(
    samples: Samples, weight: Tensor, groups: int, kept: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fxprune.methods.reconstruction` needs to choose for the error that the refit will have, pull included.

    The pull toward the dense weights counts as further rows; it is the one that suits the channels that `cocluster`
    would keep. Each filter counts by what the next layer reads of it, after the BatchNorm.

    Args:
        samples: of the layer.
        weight: `(O, C, *kernel)` of the dense layer.
        groups: see `cocluster`, as for the others.
        kept: input channels of each group.
        seed: of the clustering.

    Returns:
        Gram matrix `(D, D)`, cross products `(O, D)` and energy of the targets `(O,)`, float64.
    """
    prior = weight.detach().double().flatten(1)
    gram, cross, energy = samples.moments()
    start = cocluster(kernel_energy(weight, gram), groups, kept, seed=seed)
    parts = columns_of(start.out_order, start.kept, weight[0, 0].numel(), prior.device)
    pull = choose_ridge(samples, parts, prior) * float(gram.diagonal().mean())
    scale = samples.scale.double()
    gram.diagonal().add_(pull)
    return gram, (cross + pull * prior) * scale[:, None], (energy + pull * prior.square().sum(1)) * scale.square()


def _trials(samples: Halved, part: Part, prior: Tensor) -> list[Trial]:
    """For one group: each half predicted from the other. A ridge is one of few numbers, so float32 will do."""
    outputs, columns = part
    own = prior[outputs[:, None], columns]
    if isinstance(samples, Samples) and (samples.rows + 1) // 2 < len(columns):
        return _trials_by_rows(samples, part, own)
    halves = [
        (
            Moments(
                half.gram[columns[:, None], columns].float(),
                half.cross[outputs[:, None], columns].float(),
                half.energy[outputs],
            ),
            float(half.gram.diagonal().mean()),
        )
        for half in samples.halves
    ]
    own = own.float()

    def trial(seen: Moments, unseen: Moments, mean_square: float, ridge: float) -> float:
        pull = pull_of(mean_square, ridge)
        weights = _solved(seen.gram, pull, (seen.cross + pull * own).T).T
        explained = ((2 * unseen.cross - weights @ unseen.gram) * weights).sum(dtype=torch.float64)
        return float(unseen.energy.sum() - explained) / 2

    (first, scale), (second, other_scale) = halves
    return [
        lambda ridge: trial(first, second, scale, ridge),
        lambda ridge: trial(second, first, other_scale, ridge),
    ]


def _trials_by_rows(samples: Samples, part: Part, prior: Tensor) -> list[Trial]:
    """The same through the products of rows with each other, of which there are fewer than columns."""
    outputs, columns = part
    first, second = (
        (half.inputs[:, columns], half.centered_targets()[:, outputs], half.mean_square) for half in samples.parts()
    )
    across = first[0] @ second[0].T

    def trial_of(seen: tuple[Tensor, Tensor, float], unseen: tuple[Tensor, Tensor, float], across: Tensor) -> Trial:
        rows, _, mean_square = seen
        kernel, across = rows @ rows.T / len(rows), across / len(rows)  # (N, N), (M, N)
        missing, wanted = (targets - rows @ prior.T.float() for rows, targets, _ in (seen, unseen))

        def trial(ridge: float) -> float:
            error = wanted - across @ _solved(kernel, pull_of(mean_square, ridge), missing)
            return float(error.square().mean(0, dtype=torch.float64).sum()) / 2

        return trial

    return [trial_of(first, second, across.T), trial_of(second, first, across)]


def _solved(gram: Tensor, pull: float, right: Tensor) -> Tensor:
    """`(gram + pull)^-1 right` in float32, by way of float64 where float32 sees no positive definite matrix."""
    system = gram.clone()
    system.diagonal().add_(pull)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        system = gram.double()
        system.diagonal().add_(pull)
        factor = torch.linalg.cholesky(system).float()
    return torch.cholesky_solve(right, factor)
