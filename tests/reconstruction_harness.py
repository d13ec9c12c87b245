"""Least squares problems with correlated inputs, for the methods that choose by the error after a refit."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.methods import Clustering, Labels, Mask, cocluster, reconstruction
from fxprune.methods.reconstruction import DAMPING, kernel_energy
from fxprune.plans import Form


@dataclass(frozen=True)
class Problem:
    """Rows `u`, targets `t = u w`, and their moments."""

    weight: Tensor
    inputs: Tensor
    targets: Tensor

    @property
    def gram(self) -> Tensor:
        return self.inputs.T @ self.inputs / len(self.inputs)

    @property
    def cross(self) -> Tensor:
        return self.targets.T @ self.inputs / len(self.inputs)

    @property
    def energy(self) -> Tensor:
        return self.targets.square().mean(0)

    @property
    def damped(self) -> Tensor:
        return self.gram + DAMPING * self.gram.diagonal().mean() * torch.eye(len(self.gram), dtype=torch.float64)

    def solve(self, groups: int, kept: int, form: Form = "overlap", seed: int = 0) -> Clustering:
        return reconstruction(self.weight, self.gram, self.cross, self.energy, groups, kept, form, seed)

    def start(self, groups: int, kept: int, form: Form = "overlap") -> Clustering:
        return cocluster(kernel_energy(self.weight, self.gram), groups, kept, form)

    def error(self, clustering: Clustering) -> float:
        """Damped mean squared error of the best weights for a clustering, summed over the filters."""
        labels = labels_of(clustering)
        chosen = mask_of(clustering, self.weight.shape[1])
        return sum(
            ridge_error(self, columns_of(chosen[label], area_of(self.weight)), filter_)
            for filter_, label in enumerate(labels)
        )


def problem(filters: int, channels: int, area: int = 1, seed: int = 0, rank: float = 0.5) -> Problem:
    """Inputs that are correlated, so that the choice of channels is not that of the largest weights."""
    generator = torch.Generator().manual_seed(seed)
    unknowns = channels * area
    factors = max(1, int(rank * unknowns))
    mixing = torch.randn(factors, unknowns, generator=generator, dtype=torch.float64) / factors**0.5
    inputs = torch.randn(3 * unknowns + 40, factors, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(filters, channels, 1, area, generator=generator, dtype=torch.float64)
    return Problem(weight, inputs, inputs @ weight.flatten(1).T)


def area_of(weight: Tensor) -> int:
    return weight[0, 0].numel()


def columns_of(channels: Mask, area: int) -> Tensor:
    return torch.from_numpy(np.flatnonzero(np.repeat(channels, area)))


def ridge_error(given: Problem, columns: Tensor, filter_: int) -> float:
    """`min_w mean (u w - t)^2 + damping |w|^2` over the rows themselves, by least squares on an augmented system."""
    rows, target = given.inputs[:, columns], given.targets[:, filter_, None]
    pull = (len(rows) * DAMPING * given.gram.diagonal().mean()) ** 0.5
    system = torch.cat([rows, pull * torch.eye(len(columns), dtype=rows.dtype)])
    right = torch.cat([target, torch.zeros(len(columns), 1, dtype=rows.dtype)])
    solution = torch.linalg.lstsq(system, right, driver="gelsd").solution
    return float((system @ solution - right).square().sum() / len(rows))


def labels_of(clustering: Clustering) -> Labels:
    labels = np.empty(len(clustering.out_order), dtype=np.intp)
    labels[list(clustering.out_order)] = np.arange(len(labels)) * len(clustering.kept) // len(labels)
    return labels


def mask_of(clustering: Clustering, channels: int) -> Mask:
    chosen = np.zeros((len(clustering.kept), channels), dtype=np.bool_)
    np.put_along_axis(chosen, np.array(clustering.kept), True, axis=1)
    return chosen
