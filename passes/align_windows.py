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
from typing import TypeAlias

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxprune.channels import Blocks, ChannelAnalysis, Reordering, analyze_channels
from fxprune.channels.atoms import Array
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
        unmoved = np.arange(blocks.classes.size, dtype=np.int64)
        moved = unmoved
        found = _reads(gm, analysis, blocks, self.block)
        for together in _sharing_spaces(found, blocks):
            orders = [order for order in _orders(together, blocks) if all(r.stays_aligned(order) for r in together)]
            # The first of the best: where no order has fewer runs, nothing changes.
            best = min([unmoved, *orders], key=lambda order: _total_runs(together, order))
            moved = np.where(best == unmoved, moved, best)
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
    return int(index.numel() > 0) + int((index.diff() != 1).sum())


def _total_runs(reads: Sequence[_Read], moved: Array) -> int:
    return sum(runs(torch.from_numpy(read.reindexed(moved))) for read in reads)


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
    for port in analysis.ports:
        if first_reader(called_module(gm, port.node).parameters(), named):
            block_of[analysis.blocks.classes[port.atoms]] = -1
    return replace(analysis.blocks, block_of=block_of)


def _sharing_spaces(reads: Sequence[_Read], blocks: Blocks) -> Iterator[list[_Read]]:
    """The gathers in sets that have no block in common."""
    graph = nx.Graph()
    for i, read in enumerate(reads):
        found = np.unique(blocks.block_of[blocks.classes[np.concatenate([read.before, read.after])]])
        graph.add_edges_from((("gather", i), ("block", b)) for b in found.tolist() if b >= 0)
    for members in nx.connected_components(graph):
        yield [reads[i] for i in sorted(i for kind, i in members if kind == "gather")]


def _orders(reads: Sequence[_Read], blocks: Blocks) -> Iterator[Array]:
    """Orders worth trying, each with, for each atom, the one that takes its place."""
    choosing = [read for read in reads if read.block > 1] or reads
    slots = _slots(choosing, blocks)
    sets = _sets(choosing, blocks)
    for choose in (_as_they_come, _by_gray_code, _by_nearest):
        reordering = Reordering(blocks)
        last = np.zeros(sets.shape[1], dtype=bool)
        for classes in slots:
            here = sets[classes].any(axis=0)  # most sets of a large network are elsewhere
            if not here.any():
                continue
            chosen = classes[choose(sets[classes][:, here], last[here])]
            place, atom = (np.array([blocks.members[c][0] for c in order]) for order in (classes, chosen))
            reordering.wish(place, atom, "the windows of other gathers")
            last = sets[chosen[-1]]
        ahead = reordering.permutation()
        for read in reads:
            _follow(read, reordering, ahead)
        yield reordering.permutation()


def _slots(reads: Sequence[_Read], blocks: Blocks) -> list[Array]:
    """The classes of each block on the leading side, in the order in which they stand in the first gather that has
    them.
    """
    seen: dict[int, dict[int, None]] = {}
    for read in reads:
        for c in blocks.classes[read.leading[0]].tolist():
            if blocks.block_of[c] >= 0:
                seen.setdefault(int(blocks.block_of[c]), {})[c] = None
    return [np.array(list(classes), dtype=np.int64) for classes in seen.values()]


def _sets(reads: Sequence[_Read], blocks: Blocks) -> Sets:
    """Whether class i is in set j, shape (all classes, sets): a set holds what one gather moves to or from one block on
    the side that follows.
    """
    columns = []
    for read in reads:
        atoms, which = read.leading
        following = blocks.block_of[blocks.classes[read.following]]
        for block in dict.fromkeys(following.tolist()):
            column = np.zeros(blocks.block_of.size, dtype=bool)
            column[blocks.classes[atoms[which[following == block]]]] = block >= 0
            columns.append(column)
    return np.stack(columns, axis=1)


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
    distinct, kind = np.unique(sets, axis=0, return_inverse=True)
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
