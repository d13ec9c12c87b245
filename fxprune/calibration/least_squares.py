"""Ridge least squares of a grouped convolution: each group of filters over its own input channels.

It minimizes `mean |u w - t|^2 + pull |w - w0|^2` for each output `t` over rows `u` of the columns that its group keeps.
With more rows than columns the weights are found through the Gram matrix of the columns, with fewer through that of the
rows, which is smaller and has the same solution: `w = w0 + u^T a / N` (Saunders, Gammerman, Vovk, "Ridge Regression
Learning Algorithm in Dual Variables", ICML 1998).
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fxprune.calibration.samples import Moments, Samples

Part: TypeAlias = tuple[Tensor, Tensor]
"""Indices of the outputs of one group, and of the columns of the flattened weight that it keeps."""


Missing: TypeAlias = Callable[[Tensor, slice], Tensor]
"""What an answer `(n, o)` to some rows misses, `(n, o)` float32; it may be written over."""
AT_ONCE = 2_048
"""Rows that are answered and solved for before the next ones are read, so that they are in the cache: with 32 outputs
both products take two thirds to three quarters of the time (two cores of an AMD EPYC)."""
TOGETHER = 32
"""Filters that are solved at a time at least, unless the layer has fewer."""


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


def parts_that_stay(stays: Tensor, area: int) -> list[Part]:
    """The same from the kernels that stay, `(O, C)` bool: filters that read the same channels come together, and those
    of which nothing stays are in no part.
    """
    kinds, kind = torch.unique(stays, dim=0, return_inverse=True)
    taps = torch.arange(area, device=stays.device)
    return [
        ((kind == i).nonzero().flatten(), (channels.nonzero() * area + taps).flatten())
        for i, channels in enumerate(kinds)
        if channels.any()
    ]


def pull_of(mean_square: float, ridge: float) -> float:
    """The pull for a ridge that is relative to the mean square of the inputs; where they are all zero, the prior stays
    as it is.
    """
    return ridge * mean_square if mean_square > 0 else 1.0


def bundles(parts: Sequence[Part], rows: int) -> list[list[Part]]:
    """Groups that are solved together: as many as make `TOGETHER` filters. Products with fewer spend their time on
    reading the rows. A group with fewer rows than columns is solved alone.
    """
    found: list[list[Part]] = []
    for outputs, columns in parts:
        last = sum(len(others) for others, _ in found[-1]) if found else TOGETHER
        if last >= TOGETHER or rows < len(columns) or rows < len(found[-1][0][1]):
            found.append([])
        found[-1].append((outputs, columns))
    return found


class Problem(Protocol):
    """Least squares of `o` outputs, each over the columns of its group. What is being solved for, weights or what takes
    their place, is called coefficients here; all is linear in them.

    Attributes:
        outputs: `(o,)` their numbers.
        columns: `(d,)` all columns that any of them has.
    """

    outputs: Tensor
    columns: Tensor

    def prior(self) -> Tensor:
        """The coefficients of the weights toward which it is pulled."""

    def solve(self) -> Tensor:
        """The best coefficients for the targets of the samples."""

    def error(self, coefficients: Tensor) -> float:
        """The squared error that they leave, of all outputs, the mean over the rows."""

    def follow(self, coefficients: Tensor, mean: Tensor, missing: Missing) -> tuple[Tensor, Tensor]:
        """The way of all answers, with their mean `(o,)`, through `missing`, some at a time: what they miss, as `step`
        takes it, and what the intercept has to make up for, where there is one, `(o,)` float64.
        """

    def step(self, coefficients: Tensor, missed: Tensor) -> Tensor:
        """The best coefficients if the targets are what these give and what `follow` found missing more, but for what
        is left to the intercept. It is computed in float32, but for the sum: repeated, it corrects itself.
        """

    def weights(self, coefficients: Tensor) -> Tensor:
        """The weights `(o, d)` float64."""


def problem_of(samples: Samples, moments: Moments | None, parts: Sequence[Part], prior: Tensor, pull: float) -> Problem:
    """That of a bundle of groups, in the form that is smaller.

    Args:
        samples: of the layer.
        moments: of them all; None where every group has fewer rows than columns.
        parts: the outputs and columns of each group.
        prior: `(O, D)` float64, the weights `w0` of the layer.
        pull: toward them.
    """
    if samples.rows < len(parts[0][1]):
        return _ByRows(samples, parts[0], prior, pull)
    assert moments is not None
    return _ByColumns(samples, moments, parts, prior, pull)


class _ByColumns:
    """Coefficients are the weights `(o, d)`, zero outside the columns of each group."""

    def __init__(self, samples: Samples, moments: Moments, parts: Sequence[Part], prior: Tensor, pull: float) -> None:
        self.outputs = torch.cat([outputs for outputs, _ in parts])
        self.columns = torch.unique(torch.cat([columns for _, columns in parts])) if len(parts) > 1 else parts[0][1]
        self._rows, self._pull, self._centered = _rows_of(samples, self.columns), pull, samples.centered
        place = torch.empty(prior.shape[1], dtype=torch.long, device=prior.device)
        place[self.columns] = torch.arange(len(self.columns), device=prior.device)
        self._prior = prior.new_zeros(len(self.outputs), len(self.columns))
        self._cross, self._energy = moments.cross[self.outputs[:, None], self.columns], moments.energy[self.outputs]
        self._groups = []
        start = 0
        for outputs, columns in parts:
            gram = moments.gram[columns[:, None], columns]
            system = gram.clone()
            system.diagonal().add_(pull)
            factor = torch.linalg.cholesky(system)
            own = torch.arange(start, start + len(outputs), device=prior.device)[:, None], place[columns]
            self._prior[own] = prior[outputs[:, None], columns]
            self._groups.append((own, gram, factor, factor.float()))
            start += len(outputs)

    def prior(self) -> Tensor:
        return self._prior

    def solve(self) -> Tensor:
        right = self._cross + self._pull * self._prior
        solution = torch.zeros_like(right)
        for own, _, factor, _ in self._groups:
            solution[own] = torch.cholesky_solve(right[own].T, factor).T
        return solution

    def error(self, coefficients: Tensor) -> float:
        error = self._energy.sum() - 2 * (coefficients * self._cross).sum()
        for own, gram, _, _ in self._groups:
            error += (coefficients[own] @ gram * coefficients[own]).sum()
        return max(0.0, float(error))

    def follow(self, coefficients: Tensor, mean: Tensor, missing: Missing) -> tuple[Tensor, Tensor]:
        missed, drift = torch.zeros_like(coefficients), coefficients.new_zeros(len(coefficients))
        weights, mean = coefficients.T.float(), mean.float()
        for start in range(0, len(self._rows), AT_ONCE):
            rows = self._rows[start : start + AT_ONCE]
            some = missing(torch.addmm(mean, rows, weights), slice(start, start + AT_ONCE))
            missed += some.T @ rows
            drift += some.sum(0)
        # With an intercept rows are less their mean: what is left to it makes no difference to their products.
        return missed / len(self._rows), self._centered * drift / len(self._rows)

    def step(self, coefficients: Tensor, missed: Tensor) -> Tensor:
        right = (missed - self._pull * (coefficients - self._prior)).float()
        solution = coefficients.clone()
        for own, _, _, coarse in self._groups:
            solution[own] += torch.cholesky_solve(right[own].T, coarse).T
        return solution

    def weights(self, coefficients: Tensor) -> Tensor:
        return coefficients


class _ByRows:
    """Coefficients are what each row counts, `(N, o)`. There is one group."""

    def __init__(self, samples: Samples, part: Part, prior: Tensor, pull: float) -> None:
        self.outputs, self.columns = part
        rows, own = _rows_of(samples, self.columns), prior[self.outputs[:, None], self.columns]
        self._targets = samples.of(self.outputs).centered_targets()
        self._rows, self._prior, self._pull, self._centered = rows, own, pull, samples.centered
        self._start = rows @ own.T.float()
        self._kernel = rows @ rows.T / len(rows)
        system = self._kernel.double()
        system.diagonal().add_(pull)
        self._factor = torch.linalg.cholesky(system)
        self._coarse = self._factor.float()

    def prior(self) -> Tensor:
        return self._start.new_zeros(self._start.shape, dtype=torch.float64)

    def solve(self) -> Tensor:
        return torch.cholesky_solve((self._targets - self._start).double(), self._factor)

    def error(self, coefficients: Tensor) -> float:
        missing = self._targets - self._answer(coefficients)
        return float(missing.square().sum(dtype=torch.float64)) / len(missing)

    def _answer(self, coefficients: Tensor) -> Tensor:
        return self._start + self._kernel @ coefficients.float()

    def follow(self, coefficients: Tensor, mean: Tensor, missing: Missing) -> tuple[Tensor, Tensor]:
        missed = missing(self._answer(coefficients) + mean.float(), slice(None))
        drift = self._centered * missed.mean(0, dtype=torch.float64)
        return missed - drift.float(), drift

    def step(self, coefficients: Tensor, missed: Tensor) -> Tensor:
        right = missed - self._pull * coefficients.float()
        return coefficients + torch.cholesky_solve(right, self._coarse)

    def weights(self, coefficients: Tensor) -> Tensor:
        return self._prior + (coefficients.T.float() @ self._rows / len(self._rows)).double()


def _rows_of(samples: Samples, columns: Tensor) -> Tensor:
    """Some columns of the inputs."""
    inputs = samples.inputs
    if torch.equal(columns, torch.arange(inputs.shape[1], device=columns.device)):
        return inputs
    if inputs.is_cpu:  # in a third of the time
        return torch.from_numpy(np.take(inputs.numpy(), columns.numpy(), axis=1))
    return inputs[:, columns]
