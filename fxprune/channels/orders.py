"""What another order of the channel spaces means for a value, for the index of a gather, and for aligned blocks.

An index reads *aligned blocks* of b channels if it is made of runs of b consecutive ascending channels that start at
multiples of b. A kernel loads each in one piece, so that an order of the channels that tears blocks apart costs time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import fx

from fxprune.channels import ChannelAnalysis
from fxprune.channels.atoms import Array
from fxprune.errors import PassError
from fxprune.graph.convolutions import Convolution
from fxprune.graph.editing import called_module, calls
from fxprune.graph.layers import ChannelGather


def new_order(atoms: Array, moved: Array) -> Array:
    """Old position of what stands at each position after the reordering.

    Args:
        atoms: that stand in a value, one a channel.
        moved: for each atom the one that takes its place, as `Reordering.permutation` returns it.

    Raises:
        PassError: `moved` takes an atom out of the value.
    """
    sorter = np.argsort(atoms)
    index: Array = sorter[np.searchsorted(atoms, moved[atoms], sorter=sorter).clip(max=atoms.size - 1)]
    if not np.array_equal(atoms[index], moved[atoms]):
        raise PassError(
            "the order of a channel space moves channels out of a value; this is a defect of the channel analysis"
        )
    return index


def alignment(index: Array, block: int) -> int:
    """The largest divisor of `block` such that an index reads aligned blocks of so many channels.

    >>> alignment(np.array([8, 9, 10, 11, 4, 5, 6, 7]), 8)
    4
    >>> alignment(np.array([8, 9, 10, 11, 5, 6, 7, 4]), 8)
    1
    """
    starts = np.flatnonzero(np.diff(index, prepend=-2) != 1)  # of the runs; those in the index give their lengths too
    return int(np.gcd.reduce(np.concatenate([[block, index.size], starts, index[starts]])))


def feeds_convolution(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a convolution reads the value itself."""
    return any(user.op == "call_module" and isinstance(called_module(gm, user), Convolution) for user in node.users)


@dataclass(frozen=True)
class Read:
    """A gather whose channels are known.

    Attributes:
        node: the call of the gather.
        before: the atoms that stand before it, `(C,)`.
        after: the atoms that stand after it, `(A,)`.
        index: the positions that it reads, `(A,)`.
        block: it shall go on reading aligned blocks of so many channels; 1 is no rule.
    """

    node: fx.Node
    before: Array
    after: Array
    index: Array
    block: int

    def reindexed(self, moved: Array) -> Array:
        """The index once the spaces before and after have another order."""
        place = np.argsort(new_order(self.before, moved))
        new: Array = place[self.index[new_order(self.after, moved)]]
        return new

    def stays_aligned(self, moved: Array) -> bool:
        """Whether it reads aligned blocks in another order of the spaces too."""
        if all(np.array_equal(moved[atoms], atoms) for atoms in (self.before, self.after)):
            return True
        return alignment(self.reindexed(moved), self.block) == self.block


def known_reads(gm: fx.GraphModule, analysis: ChannelAnalysis, block: int) -> Iterator[Read]:
    """The gathers, but for boundaries, of whose channels nothing is known.

    Args:
        gm: the analyzed graph.
        analysis: of `gm`.
        block: a gather that a convolution reads, and that reads aligned blocks now, shall go on doing so: blocks of
            this many channels, or of a divisor of it.
    """
    atoms = {(port.node, port.kind): port.atoms for port in analysis.ports}
    for node, gather in calls(gm, ChannelGather):
        if (node, "reads") in atoms:
            index = gather.index.cpu().numpy()
            keep = alignment(index, block) if feeds_convolution(gm, node) else 1
            yield Read(node, atoms[node, "reads"], atoms[node, "writes"], index, keep)
