"""gather(x[p], index) == gather(x, p[index]) and gather(x, index)[q] == gather(x, index[q]): where layers can store the
orders before and after a gather in their weights, its index is free up to p and q.

x (N, C, H, W), index (A,) long; p (C,) and q (A,) permutations. A *run* of an index is a maximal stretch of consecutive
ascending channels: one copy of memory, or a window that a kernel reads in place.

1. Channels that the same groups read stand side by side, and from one channel to the next few groups change: with two
   groups `A only, A and B, B only, neither`, so that each reads one window. Only channels that nothing else tells apart
   change places; filters of a grouped convolution stay in their group.
2. Each group reads its channels in ascending order; the columns of its weight move with them.
3. Where convolutions read aligned blocks, these alone choose the order, so that blocks which the same groups read stand
   side by side; other gathers follow.
Layers at the ends get permutations that `AbsorbGathers` then stores in their weights; a gather gets another index.
Left alone: all gathers that share a channel space, where no order tried lowers the number of runs in total and keeps
aligned blocks whole.

Fewest runs is the consecutive block minimisation problem, which is NP-hard (Kou 1977, SIAM J. Comput. 6(1)), and the
same as a shortest path through the channels where the distance is the number of groups that change (Haddadi and Layouni
2008, Inf. Process. Lett. 108(3)). Two paths are tried. The order of the Gray code visits four groups in two runs each,
even if all sixteen combinations occur; from eight groups up nearest neighbours are better (random halves of 256
channels: 12 runs a group against 14, and 64 as they come).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from fxprune.channels import Blocks, ChannelAnalysis, Reordering, analyze_channels
from fxprune.channels.atoms import Array, Excerpt
from fxprune.channels.orders import Read, known_reads, new_order
from fxprune.graph.editing import Outcome, call_sites, called_module, calls, first_reader, new_path, read_by_name
from fxprune.graph.layers import ChannelGather
from fxprune.graph.values import CarriedValues
from fxprune.passes.sink_gathers import reorder

Sets: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class AlignWindows:
    """Choose the order inside every channel space so that the gathers that remain read few windows.

    Attributes:
        values: what the nodes give, to know shapes.
        block: convolutions that read aligned blocks of this many channels, or of a divisor of it, shall go on doing so.
    """

    values: CarriedValues
    block: int = 1

    def __call__(self, gm: fx.GraphModule) -> Outcome:
        values = self.values.of(gm)
        if not values or not any(calls(gm, ChannelGather)):
            return Outcome()
        analysis = analyze_channels(gm, values)
        blocks = _movable(gm, analysis)
        moved = np.arange(blocks.classes.size, dtype=np.int64)
        found = _reads(gm, analysis, blocks, self.block)
        for together in _sharing_spaces(found, blocks):
            here = Excerpt.around(blocks, np.concatenate([read.atoms for read in together]))
            moved[here.atoms] = here.atoms[_best_order([read.among(here) for read in together], here.blocks)]
        layers = replace(analysis, ports=tuple(p for p in analysis.ports if not _is_gather(gm, p.node)))
        return Outcome((*_reindex(gm, found, moved), *reorder(gm, layers, moved)))


@dataclass(frozen=True)
class _Read(Read):
    """A gather, and on which of its sides the order of the channels is chosen.

    Attributes:
        leads: whether the order before the gather is chosen, and the order after it follows; else the other way round.
    """

    leads: bool

    @property
    def atoms(self) -> Array:
        """All that it moves or reads."""
        return np.concatenate([self.before, self.after])

    def among(self, here: Excerpt) -> "_Read":
        """The same read with the numbers that its atoms have in an excerpt."""
        return replace(self, before=here.numbered(self.before), after=here.numbered(self.after))

    @property
    def leading(self) -> tuple[Array, Array]:
        """The atoms on the side that leads, and which of them each channel that follows is."""
        return (self.before, self.index) if self.leads else (self.after, np.argsort(self.index))

    @property
    def following(self) -> Array:
        """The atoms on the side that follows."""
        return self.after if self.leads else self.before


def runs(index: Tensor) -> int:
    """Number of maximal stretches of consecutive ascending channels in an index.

    >>> runs(torch.tensor([4, 5, 6, 0, 1, 6]))
    3
    """
    return _runs(index.cpu().numpy())


def _runs(index: Array) -> int:
    return int(index.size > 0) + int(np.count_nonzero(np.diff(index) != 1))


def _total_runs(reads: Sequence[_Read], moved: Array) -> int:
    return sum(_runs(read.reindexed(moved)) for read in reads)


def _reads(gm: fx.GraphModule, analysis: ChannelAnalysis, blocks: Blocks, block: int) -> list[_Read]:
    """The gathers, those that write most channels first."""
    found = []
    for read in known_reads(gm, analysis, block):
        parts = [np.unique(blocks.block_of[blocks.classes[atoms]]).size for atoms in (read.before, read.after)]
        is_permutation = np.array_equal(np.sort(read.index), np.arange(read.before.size))
        found.append(_Read(**vars(read), leads=not is_permutation or parts[0] <= parts[1]))
    return sorted(found, key=lambda read: -read.index.size)


def _movable(gm: fx.GraphModule, analysis: ChannelAnalysis) -> Blocks:
    """The blocks of the analysis, without the channels of layers that cannot store another order: the graph reads their
    parameters by name too.
    """
    named, block_of = read_by_name(gm), analysis.blocks.block_of.copy()
    for port in analysis.ports if named else ():
        if first_reader(called_module(gm, port.node).parameters(), named):
            block_of[analysis.blocks.classes[port.atoms]] = -1
    return replace(analysis.blocks, block_of=block_of)


def _sharing_spaces(reads: Sequence[_Read], blocks: Blocks) -> Iterator[list[_Read]]:
    """The gathers in sets that have no block in common, but for those none of whose channels may move."""
    touched = [np.unique(blocks.block_of[blocks.classes[read.atoms]]) for read in reads]
    touched = [found[found >= 0] for found in touched]
    gather = np.repeat(np.arange(len(reads)), [found.size for found in touched])
    block = len(reads) + np.concatenate([*touched, np.zeros(0, dtype=np.int64)])
    size = len(reads) + int(blocks.block_of.max(initial=-1)) + 1
    graph = coo_matrix((np.ones(gather.size, dtype=np.int8), (gather, block)), shape=(size, size))
    together: dict[int, list[_Read]] = {}
    for read, found, component in zip(reads, touched, connected_components(graph, directed=False)[1], strict=False):
        if found.size:
            together.setdefault(int(component), []).append(read)
    yield from together.values()


def _best_order(reads: Sequence[_Read], blocks: Blocks) -> Array:
    """The order with the fewest runs, the first of equals: where no order has fewer, nothing changes."""
    orders = [order for order in _orders(reads, blocks) if all(read.stays_aligned(order) for read in reads)]
    unmoved = np.arange(blocks.classes.size, dtype=np.int64)
    return min([unmoved, *orders], key=lambda order: _total_runs(reads, order))


def _orders(reads: Sequence[_Read], blocks: Blocks) -> Iterator[Array]:
    """Orders worth trying, each with, for each atom, the one that takes its place."""
    slots = _slots([read for read in reads if read.block > 1] or reads, blocks)
    for choose in (_as_they_come, _by_gray_code, _by_nearest):
        reordering = Reordering(blocks)
        chosen, last = [], np.zeros(0, dtype=np.int64)
        for slot in slots:
            order = choose(slot.inside, np.isin(slot.sets, last))
            chosen.append(slot.classes[order])
            last = slot.sets[slot.inside[order[-1]]]
        if slots:
            places = blocks.first[np.concatenate([slot.classes for slot in slots])]
            reordering.wish(places, blocks.first[np.concatenate(chosen)], "the windows of other gathers")
        ahead = reordering.permutation()
        for read in reads:
            _follow(read, reordering, ahead)
        yield reordering.permutation()


class _Slot(NamedTuple):
    """The classes of a block on the leading side, and the sets that they are in: a set holds what one gather moves to
    or from one block on the side that follows.

    Attributes:
        classes: `(c,)` in the order in which they stand in the first gather that has them.
        sets: `(s,)` numbers of the sets, ascending; most sets of a large network are elsewhere.
        inside: `(c, s)` whether a class is in a set.
    """

    classes: Array
    sets: Array
    inside: Sets


def _slots(reads: Sequence[_Read], blocks: Blocks) -> list[_Slot]:
    """The blocks on the leading side in the order in which they first appear there, but for those in no set."""
    members, numbers, count = [], [], 0
    for read in reads:
        atoms, which = read.leading
        following = blocks.block_of[blocks.classes[read.following]]
        number = count + _by_appearance(following)
        count = int(number.max(initial=count - 1)) + 1
        members.append(blocks.classes[atoms[which[following >= 0]]])
        numbers.append(number[following >= 0])
    where = np.concatenate(members), np.concatenate(numbers)
    in_set = coo_matrix((np.ones(where[0].size, dtype=bool), where), shape=(blocks.count, count)).tocsr()
    classes = np.concatenate([blocks.classes[read.leading[0]] for read in reads])
    classes = classes[np.sort(np.unique(classes, return_index=True)[1])]
    classes = classes[blocks.block_of[classes] >= 0]
    slot = _by_appearance(blocks.block_of[classes])
    found = []
    for together in np.split(classes[np.argsort(slot, kind="stable")], np.cumsum(np.bincount(slot))[:-1]):
        rows = in_set[together].tocoo()
        sets, column = np.unique(rows.col, return_inverse=True)
        if sets.size:
            inside = np.zeros((together.size, sets.size), dtype=bool)
            inside[rows.row, column] = True
            found.append(_Slot(together, sets, inside))
    return found


def _by_appearance(values: Array) -> Array:
    """Each value by a number that counts up from 0 in the order in which distinct ones first appear."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    numbers: Array = np.argsort(np.argsort(first))[inverse]
    return numbers


def _follow(read: _Read, reordering: Reordering, ahead: Array) -> None:
    """Let the channels of each block on the side that follows stand in the order of those that lead, which `ahead` has
    ordered.
    """
    atoms, which = read.leading
    place = np.argsort(new_order(atoms, ahead))[which]
    block = reordering.blocks.block_of[reordering.blocks.classes[read.following]]
    places = np.flatnonzero(block >= 0)
    slots, chosen = places[np.argsort(block[places], kind="stable")], places[np.lexsort((place[places], block[places]))]
    reordering.wish(read.following[slots], read.following[chosen], read.node.name)


# --- orders of the classes of one block: sets (classes, sets) bool, after the sets of what stands before -------------


def _as_they_come(sets: Sets, last: Sets) -> Array:
    return np.arange(len(sets))


def _by_gray_code(sets: Sets, last: Sets) -> Array:
    """Those of the first set first; from one to the next combination in the code, one set changes."""
    order: Array = np.lexsort(~np.bitwise_xor.accumulate(sets, axis=1).T[::-1])
    return order


def _by_nearest(sets: Sets, last: Sets) -> Array:
    """From each combination of sets to the one left that differs least."""
    rows = np.packbits(sets, axis=1)  # bytes in place of bits sort in the same order, and much faster
    _, first, kind = np.unique(
        rows.view(np.dtype((np.void, rows.shape[1])))[:, 0], return_index=True, return_inverse=True
    )
    distinct = sets[first]
    stops = np.concatenate([last[None], distinct]).astype(np.float32)
    size = stops.sum(axis=1)
    distance = size[:, None] + size[None, :] - 2 * stops @ stops.T
    distance[:, 0] = np.inf
    rank = np.zeros(len(stops), dtype=np.int64)
    here = 0
    for i in range(len(distinct)):
        here = int(distance[here].argmin())
        rank[here] = i
        distance[:, here] = np.inf
    order: Array = np.argsort(rank[1:][kind.reshape(-1)], kind="stable")
    return order


# --- the graph --------------------------------------------------------------------------------------------------------


def _is_gather(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(called_module(gm, node), ChannelGather)


def _reindex(gm: fx.GraphModule, reads: Sequence[_Read], moved: Array) -> Iterator[str]:
    """Give the gathers the index that the new orders ask for; one that is called elsewhere too gets a module of its
    own.
    """
    sites = call_sites(gm)
    for read in reads:
        index = read.reindexed(moved)
        if np.array_equal(index, read.index):
            continue
        gather = called_module(gm, read.node)
        assert isinstance(gather, ChannelGather)
        if len(sites[gather]) > 1:
            sites[gather].remove(read.node)
            gather = copy.deepcopy(gather)
            read.node.target = new_path(gm, str(read.node.target))
            gm.add_submodule(read.node.target, gather)
            sites[gather] = [read.node]
        gather.index = torch.from_numpy(index).to(gather.index.device)
        yield read.node.name
