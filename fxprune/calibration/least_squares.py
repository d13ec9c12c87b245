"""Ridge least squares of a grouped convolution: each group of filters over its own input channels.

It minimizes `mean |u w - t|^2 + pull |w - w0|^2` for each output `t` over rows `u` of the columns that its group keeps.
With more rows than columns the weights are found through the Gram matrix of the columns, with fewer through that of the
rows, which is smaller and has the same solution: `w = w0 + u^T a / N` (Saunders, Gammerman, Vovk, "Ridge Regression
Learning Algorithm in Dual Variables", ICML 1998).
"""

from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fxprune.calibration.samples import Samples, mean_product

Part: TypeAlias = tuple[Tensor, Tensor]
"""Indices of the outputs of one group, and of the columns of the flattened weight that it keeps."""


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


def pull_of(mean_square: float, ridge: float) -> float:
    """The pull for a ridge that is relative to the mean square of the inputs; where they are all zero, the prior stays
    as it is.
    """
    return ridge * mean_square if mean_square > 0 else 1.0


class Problem(Protocol):
    """Least squares of one group of `o` outputs over its `d` columns. What is being solved for, weights or what takes
    their place, is called coefficients here; all is linear in them.
    """

    def prior(self) -> Tensor:
        """The coefficients of the weights toward which it is pulled."""

    def solve(self, targets: Tensor) -> Tensor:
        """The best coefficients for targets `(N, o)` float32, less their mean where there is an intercept."""

    def answer(self, coefficients: Tensor) -> Tensor:
        """What they give for the rows, `(N, o)` float32."""

    def step(self, coefficients: Tensor, missing: Tensor) -> Tensor:
        """The best coefficients if the targets are what these give and `missing (N, o)` more. It is computed in
        float32, but for the sum: repeated, it corrects itself.
        """

    def weights(self, coefficients: Tensor) -> Tensor:
        """The weights `(o, d)` float64."""


def problem_of(samples: Samples, gram: Tensor | None, part: Part, prior: Tensor, pull: float) -> Problem:
    """That of one group, in the form that is smaller.

    Args:
        samples: of the layer.
        gram: `(D, D)` float64 of all its inputs; None where every group has fewer rows than columns.
        part: the outputs and columns of the group.
        prior: `(O, D)` float64, the weights `w0` of the layer.
        pull: toward them.
    """
    outputs, columns = part
    own = prior[outputs[:, None], columns]
    rows = samples.inputs if len(columns) == samples.inputs.shape[1] else samples.inputs[:, columns]
    if samples.rows < len(columns):
        return _ByRows(rows, own, pull)
    assert gram is not None
    return _ByColumns(rows, gram[columns[:, None], columns], own, pull)


class _ByColumns:
    """Coefficients are the weights `(o, d)`."""

    def __init__(self, rows: Tensor, gram: Tensor, prior: Tensor, pull: float) -> None:
        self._rows, self._prior, self._pull = rows, prior, pull
        gram.diagonal().add_(pull)
        self._factor = torch.linalg.cholesky(gram)
        self._coarse = self._factor.float()

    def prior(self) -> Tensor:
        return self._prior

    def solve(self, targets: Tensor) -> Tensor:
        right = mean_product(targets, self._rows) + self._pull * self._prior
        return torch.cholesky_solve(right.T, self._factor).T

    def answer(self, coefficients: Tensor) -> Tensor:
        return self._rows @ coefficients.T.float()

    def step(self, coefficients: Tensor, missing: Tensor) -> Tensor:
        right = mean_product(missing, self._rows) - self._pull * (coefficients - self._prior)
        return coefficients + torch.cholesky_solve(right.T.float(), self._coarse).T

    def weights(self, coefficients: Tensor) -> Tensor:
        return coefficients


class _ByRows:
    """Coefficients are what each row counts, `(N, o)`."""

    def __init__(self, rows: Tensor, prior: Tensor, pull: float) -> None:
        self._rows, self._prior, self._pull = rows, prior, pull
        self._start = rows @ prior.T.float()
        self._kernel = rows @ rows.T / len(rows)
        system = self._kernel.double()
        system.diagonal().add_(pull)
        self._factor = torch.linalg.cholesky(system)
        self._coarse = self._factor.float()

    def prior(self) -> Tensor:
        return self._start.new_zeros(self._start.shape, dtype=torch.float64)

    def solve(self, targets: Tensor) -> Tensor:
        return torch.cholesky_solve((targets - self._start).double(), self._factor)

    def answer(self, coefficients: Tensor) -> Tensor:
        return self._start + self._kernel @ coefficients.float()

    def step(self, coefficients: Tensor, missing: Tensor) -> Tensor:
        right = missing - self._pull * coefficients.float()
        return coefficients + torch.cholesky_solve(right, self._coarse)

    def weights(self, coefficients: Tensor) -> Tensor:
        return self._prior + (coefficients.T.float() @ self._rows / len(self._rows)).double()
