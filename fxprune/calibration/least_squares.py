"""Ridge least squares of a grouped convolution: each group of filters over its own input channels."""

from collections.abc import Sequence
from functools import cache
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fxprune.calibration.samples import Moments, Samples
from fxprune.methods import cocluster
from fxprune.methods.reconstruction import kernel_energy

Part: TypeAlias = tuple[Tensor, Tensor]
"""Indices of the outputs of one group, and of the columns of the flattened weight that it keeps."""

# Weights of the pull toward the dense weights, relative to the mean diagonal of the Gram matrix. With PLENTY of rows
# for each unknown the first is right; with fewer the one that does best on images that it was not fitted to.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
PLENTY = 64
# Groups that choose it for all, spread over the layer: it is one of five numbers, and wide layers take long.
JUDGES = 2


class Halved(Protocol):
    """Rows of a layer, of which one half can be predicted from the other: `Samples`, or what is left of them."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def halves(self) -> tuple[Moments, Moments]:
        """See `Samples.halves`."""


def columns_of(out_order: ArrayLike, kept: ArrayLike, area: int, device: torch.device) -> list[Part]:
    """Filters of each group, and the columns of the flattened weight that it keeps.

    Args:
        out_order: the filters of one group after those of the other.
        kept: `(n, k)`, the input channels of each group.
        area: weights of one kernel.
        device: of the result.
    """
    channels = torch.as_tensor(np.array(kept), device=device)
    filters = torch.as_tensor(np.array(out_order), device=device).reshape(len(channels), -1)
    columns = (channels[:, :, None] * area + torch.arange(area, device=device)).flatten(1)
    return list(zip(filters, columns, strict=True))


class GroupedRidge:
    """Least squares of several groups of outputs, each from its own columns, with a pull toward given weights.

    Minimizes `mean |u w - t|^2 + ridge |w - w0|^2` for each output `t` over rows `u`.

    Args:
        gram: `(D, D)` float64, mean of `u^T u`.
        parts: for each group its outputs and its columns.
        prior: `(O, D)` float64, the weights `w0`.
        ridge: relative to the mean diagonal of `gram`.
    """

    def __init__(self, gram: Tensor, parts: Sequence[Part], prior: Tensor, ridge: float = RIDGES[0]) -> None:
        self._gram, self._parts, self._prior = gram, parts, prior
        scale = float(gram.diagonal().mean())
        self._pull = ridge * scale if scale > 0 else 1.0  # all inputs are zero: keep the prior
        self._factors = []
        for _, columns in parts:
            system = gram[columns[:, None], columns]
            system.diagonal().add_(self._pull)
            self._factors.append(torch.linalg.cholesky(system))

    def solve(self, cross: Tensor) -> Tensor:
        """Return the weights `(O, D)`, zero outside the columns of each group, for `cross (O, D)`, mean of `t^T u`."""
        weights = torch.zeros_like(self._prior)
        for (outputs, columns), factor in zip(self._parts, self._factors, strict=True):
            index = outputs[:, None], columns
            right = cross[index] + self._pull * self._prior[index]
            weights[index] = torch.cholesky_solve(right.T, factor).T
        return weights

    def mask(self, weights: Tensor) -> Tensor:
        """Return a copy that is zero outside the columns of each group."""
        masked = torch.zeros_like(weights)
        for outputs, columns in self._parts:
            masked[outputs[:, None], columns] = weights[outputs[:, None], columns]
        return masked

    def error(self, weights: Tensor, cross: Tensor, energy: float) -> float:
        """Mean squared error relative to `energy`, the mean square of all targets."""
        explained = 2 * (weights * cross).sum() - ((weights @ self._gram) * weights).sum()
        return max(0.0, 1 - float(explained) / energy) if energy > 0 else 0.0


def choose_ridge(samples: Halved, parts: Sequence[Part], prior: Tensor) -> float:
    """The pull that does best when one half of the images is fitted and the other one predicted.

    Args:
        samples: of the layer.
        parts: see `GroupedRidge`, as for `prior`.
        prior: the dense weights.
    """
    if samples.rows >= PLENTY * prior.shape[1]:
        return RIDGES[0]
    if samples.rows < 2:
        return RIDGES[-1]
    judges = parts[:: max(1, len(parts) // JUDGES)]

    @cache
    def error(index: int) -> float:
        return float(held_out_errors(samples, judges, prior, RIDGES[index]).sum())

    best = len(RIDGES) // 2  # downhill from the middle: too weak a pull errs more the weaker it is, as does too strong
    while (better := min(range(max(0, best - 1), min(best + 2, len(RIDGES))), key=error)) != best:
        best = better
    return RIDGES[best]


def held_out_errors(samples: Halved, parts: Sequence[Part], prior: Tensor, ridge: float) -> Tensor:
    """The mean squared error of each output, `(O,)`, when one half of the images is fitted and the other one predicted.

    Args:
        samples: of the layer.
        parts: see `GroupedRidge`, as for the others; outputs that are in none have no error.
        prior: the dense weights.
        ridge: the pull toward them.
    """
    errors = prior.new_zeros(len(prior))
    first, second = samples.halves
    for seen, unseen in ((first, second), (second, first)):
        weights = GroupedRidge(seen.gram, parts, prior, ridge).solve(seen.cross)
        for outputs, columns in parts:
            own, cross = weights[outputs[:, None], columns], unseen.cross[outputs[:, None], columns]
            explained = ((2 * cross - own @ unseen.gram[columns[:, None], columns]) * own).sum(1)
            errors[outputs] += (unseen.energy[outputs] - explained) / 2
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
    gram, cross, energy = samples.gram(), samples.cross(), samples.energy()
    start = cocluster(kernel_energy(weight, gram), groups, kept, seed=seed)
    parts = columns_of(start.out_order, start.kept, weight[0, 0].numel(), prior.device)
    pull = choose_ridge(samples, parts, prior) * float(gram.diagonal().mean())
    scale = samples.scale.double()
    return (
        gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device),
        (cross + pull * prior) * scale[:, None],
        (energy + pull * prior.square().sum(1)) * scale.square(),
    )
