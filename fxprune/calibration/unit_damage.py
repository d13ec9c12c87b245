"""How much the readers of a channel space suffer as it gives up channels, and in which order these should go.

A channel that is removed is lost to every layer that reads it, and to nobody else. What each of them suffers is the
error that a refit of its other weights leaves, as for kernels (`fxprune.calibration.damage`), with one group of all
filters. The order is second-order elimination of whole units: again and again the unit goes whose loss costs all its
readers together least when their other weights adapt (`fxprune.methods.reconstruction.Elimination`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fxprune.calibration.damage import error_weights, interpolated, loss_of
from fxprune.calibration.following import Bounds
from fxprune.calibration.held_out import choose_ridge, held_out_errors
from fxprune.calibration.least_squares import Part
from fxprune.calibration.samples import Moments, Samples, column_means
from fxprune.graph.convolutions import Layer, kernels_of
from fxprune.methods import Labels, Matrix
from fxprune.methods.reconstruction import Elimination, Summation, damped_inverse, give_up_together


@dataclass(frozen=True)
class Reader:
    """What is kept of the samples of a layer: all that a refit without some of its inputs needs to know.

    Attributes:
        weight: `(O, D)` float64 of the dense layer, `D = C * taps`.
        rows: how many there were.
        halves: see `Samples.halves`.
        counts: `(O,)` float64, what a squared error of each output counts, see `error_weights`.
    """

    weight: Tensor
    rows: int
    halves: tuple[Moments, Moments]
    counts: Tensor

    @classmethod
    def of(cls, layer: Layer, samples: Samples, bounds: Bounds | None) -> "Reader":
        """That of a layer whose result a rectifier with `bounds` reads."""
        weight = kernels_of(layer).detach().double().flatten(1)
        return cls(weight, samples.rows, samples.halves, error_weights(samples, bounds))

    def weighed(self, share: float) -> "Reader":
        """The same if errors count by this share only."""
        return replace(self, counts=self.counts * share)


@dataclass(frozen=True)
class StiffReader:
    """What is kept of the samples of a layer that no refit changes: the errors of its inputs are taken to add up, as if
    they were uncorrelated.

    Attributes:
        costs: `(D,)` float64, the damage without each of its inputs.
    """

    costs: Tensor

    @classmethod
    def of(cls, layer: Layer, samples: Samples, bounds: Bounds | None) -> "StiffReader":
        """That of a layer whose result a rectifier with `bounds` reads."""
        energy = kernels_of(layer).detach().double().flatten(1).square()
        return cls((error_weights(samples, bounds) @ energy) * column_means(samples.inputs, Tensor.square))

    def weighed(self, share: float) -> "StiffReader":
        """The same if errors count by this share only."""
        return replace(self, costs=self.costs * share)


class _Stiff:
    """A stiff reader that loses units."""

    def __init__(self, reader: StiffReader, unit_of: Labels, units: int) -> None:
        owner = torch.from_numpy(np.repeat(unit_of, len(reader.costs) // len(unit_of))).to(reader.costs.device)
        self._costs = reader.costs.new_zeros(units).index_add_(0, owner[owner >= 0], reader.costs[owner >= 0])
        self.inputs, self.device = 0, reader.costs.device

    def elimination(self) -> Summation:
        """See `_Losing`, as for the other."""
        return Summation(self._costs)

    def losses(self, order: Tensor, counts: Sequence[int]) -> list[float]:
        """See there."""
        return [loss_of(float(self._costs[order[:count]].sum())) for count in counts]


class _Losing:
    """A reader that loses units: which of its inputs belong to which, and the pull of its refit."""

    def __init__(self, reader: Reader, unit_of: Labels, units: int) -> None:
        self.reader, self._units, self.inputs = reader, units, reader.weight.shape[1]
        self.device = reader.weight.device
        taps = reader.weight.shape[1] // len(unit_of)
        self.owner = torch.from_numpy(np.repeat(unit_of, taps)).to(reader.weight.device)
        first, second = reader.halves
        self._gram, self._cross = (first.gram + second.gram) / 2, (first.cross + second.cross) / 2
        kept = (~torch.isin(self.owner, self._lighter_half())).nonzero().flatten()
        self._ridge = choose_ridge(reader, [self._part(kept)], reader.weight)

    def elimination(self) -> Elimination:
        """Its weights, as units go one by one; an error counts as the reader says."""
        pull = self._ridge * float(self._gram.diagonal().mean())
        gram = self._gram + pull * torch.eye(len(self._gram), dtype=self._gram.dtype, device=self._gram.device)
        cross = (self._cross + pull * self.reader.weight) * self.reader.counts.sqrt()[:, None]
        return Elimination(damped_inverse(gram), cross, self.owner, self._units)

    def losses(self, order: Tensor, counts: Sequence[int]) -> list[float]:
        """What is lost of its signal, on images that it was not fitted to, without the first few units of an order, for
        several numbers of these, which fall.
        """
        place = order.argsort()
        stays = torch.where(self.owner < 0, self._units, place[self.owner.clamp(min=0)])
        columns = stays.argsort(descending=True, stable=True)  # what no unit owns, then the last units to go
        sizes = [int((stays >= count).sum()) for count in counts]
        errors = held_out_errors(self.reader, [self._part(columns)], self.reader.weight, self._ridge, sizes)
        return [loss_of(damage) for damage in (errors @ self.reader.counts).tolist()]

    def _part(self, columns: Tensor) -> Part:
        return torch.arange(len(self.reader.weight), device=columns.device), columns

    def _lighter_half(self) -> Tensor:
        """Half of the units that it reads, those that add least energy to its outputs: the pull has to suit a layer
        that lost some.
        """
        read = self.owner >= 0
        energy = (self.reader.weight.square() * self.reader.counts[:, None]).sum(0) * self._gram.diagonal()
        energies = torch.zeros(self._units, dtype=energy.dtype, device=energy.device)
        energies.index_add_(0, self.owner[read], energy[read])
        own = self.owner[read].bincount().nonzero().flatten()
        return own[energies[own].argsort(stable=True)[: len(own) // 2]]


def space_damage(
    readers: Sequence[tuple[Reader | StiffReader, Labels]], units: int, gone: Labels, given: Labels | None = None
) -> tuple[Labels, Matrix]:
    """In which order the units of a space go, and what their readers lose.

    Args:
        readers: the layers that read units of the space, and the unit `0..units - 1` of each of their `C` input
            channels, -1 for those of other spaces, which stay.
        units: how many the space has.
        gone: those that went before, in no order; they go first.
        given: `(units,)` the order, if it is not to be found.

    Returns:
        the units `(units,)`, the first to go first, and the loss `(units,)`, entry `k - 1` if the last `k` of them
        stay: the sum over the readers of `loss_of` their damage, interpolated as for kernels. Where no reader is
        known, all units are taken to matter alike, and the last goes first.
    """
    if not readers:
        rest = np.setdiff1d(np.arange(units), gone)[::-1]
        damages = 1 - np.arange(1, units + 1) / units
        order = np.concatenate([gone, rest]).astype(np.intp) if given is None else given
        return order, np.array([loss_of(damage) for damage in damages])
    losing = [
        _Losing(reader, unit_of, units) if isinstance(reader, Reader) else _Stiff(reader, unit_of, units)
        for reader, unit_of in readers
    ]
    places = _eliminated(losing, gone) if given is None else torch.as_tensor(given, device=losing[0].device)
    path = interpolated(
        units,
        max(reader.inputs for reader in losing),
        lambda kept: np.sum(
            [reader.losses(places, [units - count for count in kept]) for reader in losing], 0
        ).tolist(),
    )
    found: Labels = places.cpu().numpy()
    return found, np.maximum.accumulate(np.maximum(path, 0)[::-1])[::-1]


def _eliminated(losing: Sequence[_Losing | _Stiff], gone: Labels) -> Tensor:
    """The units in the order of elimination, those that are gone first."""
    eliminations = [reader.elimination() for reader in losing]
    before = torch.as_tensor(gone, dtype=torch.long, device=losing[0].device)
    if len(before):
        for elimination in eliminations:
            elimination.drop(before)
    return torch.cat([before, give_up_together(eliminations, 0)])
