"""Minibatches that are drawn from calibration data, and a part of the data that is held out."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxprune.calibration.batches import Batch, samples_in
from fxprune.errors import CalibrationError
from fxprune.graph.containers import convert_tensors, tensors_in

HELD_OUT = 10
"""One of so many samples is held out."""


class Drawing:
    """Samples of calibration batches: some are held out, the others are drawn in random order, all equally often.

    A sample is one entry along the first dimension of all tensors of a batch; a batch whose tensors disagree on that
    dimension is one sample. Samples of different shapes never come together.

    Args:
        batches: arguments of forward; they are read where they are, and only what is drawn is copied.
        seed: of what is held out, and of the order.
        largest: samples of a minibatch at most.
        smallest: samples of a minibatch at least, but for the rests of those of one shape.
        parts: into how many minibatches all that are drawn are divided at least, as far as `smallest` allows.

    Raises:
        CalibrationError: there is only one sample.
    """

    def __init__(self, batches: Sequence[Batch], seed: int, largest: int, smallest: int, parts: int) -> None:
        self._batches, self._seed = batches, seed
        places = [(number, i) for number, batch in enumerate(batches) for i in range(samples_in(batch) or 1)]
        if len(places) < 2:
            raise CalibrationError(
                "the calibration data holds one sample; recovery learns from some and judges by others: pass at least "
                "2, better a few hundred, or leave recover out"
            )
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
        held = max(1, len(places) // HELD_OUT)
        self.held, self.drawn = held, len(places) - held
        self._largest, self._size = largest, min(largest, max(smallest, self.drawn // parts))
        self._held = self._alike([places[i] for i in sorted(order[:held])])
        self._drawn = self._alike([places[i] for i in sorted(order[held:])])
        self._epoch, self._parts = -1, [[(0, 0)]]
        self.steps_per_epoch = len(self._parts_of(0))

    def held_out(self) -> Iterator[tuple[Batch, int]]:
        """The held-out samples in minibatches, with their sizes."""
        for places in self._held:
            for start in range(0, len(places), self._largest):
                part = places[start : start + self._largest]
                yield self._together(part), len(part)

    def minibatch(self, step: int) -> Batch:
        """That of a step, from 0; it depends on the seed and the step alone."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._together(self._parts_of(epoch)[position])

    def tensors(self) -> list[Tensor]:
        """All tensors of the calibration data."""
        return [tensor for batch in self._batches for tensor in tensors_in(batch)]

    def _parts_of(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The minibatches of an epoch."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + 1 + epoch)
            parts = []
            for places in self._drawn:
                order = torch.randperm(len(places), generator=generator)
                for part in order.tensor_split(-(-len(places) // self._size)):
                    parts.append([places[i] for i in part.tolist()])
            self._parts = [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
            self._epoch = epoch
        return self._parts

    def _alike(self, places: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """The samples, sorted into those that may come together."""
        kinds: list[tuple[Any, list[tuple[int, int]]]] = []
        of_batch: dict[int, int] = {}
        for place in places:
            number = place[0]
            if number not in of_batch:
                kind = _kind(self._batches[number])
                found = next((i for i, (known, _) in enumerate(kinds) if kind is not None and known == kind), None)
                if found is None:
                    found = len(kinds)
                    kinds.append((kind, []))
                of_batch[number] = found
            kinds[of_batch[number]][1].append(place)
        return [members for _, members in kinds]

    def _together(self, places: Sequence[tuple[int, int]]) -> Batch:
        first = self._batches[places[0][0]]
        if samples_in(first) is None:
            return first
        rows = [[tensor[i] for tensor in tensors_in(self._batches[number])] for number, i in places]
        stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
        joined = {id(tensor): whole for tensor, whole in zip(tensors_in(first), stacked, strict=True)}
        return convert_tensors(first, lambda tensor: joined[id(tensor)])


def _kind(batch: Batch) -> Any:
    """What batches have in common whose samples may come together; None for one that stays whole."""
    if samples_in(batch) is None:
        return None
    tensors = [(tensor.shape[1:], tensor.dtype) for tensor in tensors_in(batch)]
    return tensors, tree_map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, batch)
