"""Atoms: the identities behind channel labels, and which of them may change places.

An *atom* is one channel of one producer. Every value of the graph carries an int64 *label tensor* of its own rank that
says which atom stands at each position; a dimension along which the labels do not vary has size one. Three kinds of
facts are collected while the graph is interpreted, all as arrays:

- a *tie*: two atoms stand at the same position of tensors that are combined, so they move together;
- a *pin*: an atom stands where the order is observed (a model output, an operator without a rule), so it may not move;
- a *site*: a set of atoms stands in one value, each in a *role*, so atoms inside and outside, or in different roles,
    are told apart.

Ties partition the atoms into classes. Two classes may change places if nothing tells them apart: same number of atoms,
same sites, same roles. Sets of such classes are *blocks*. Any permutation of the classes inside blocks, applied to
every label tensor and every parameter, leaves the function of the network unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Array = npt.NDArray[np.int64]

UNLABELLED = -1

TOLD_APART = "other layers tell the channels apart"
"""Refusal of an order that would move channels between blocks."""


@dataclass(frozen=True)
class Tie:
    """Atoms `left[i]` and `right[i]` move together because of `cause`."""

    left: Array
    right: Array
    cause: str


@dataclass(frozen=True)
class Pin:
    """The atoms keep their place, for `reason`."""

    atoms: Array
    reason: str


class AtomTable:
    """Collects atoms, ties, pins and sites; `solve` turns them into blocks."""

    def __init__(self) -> None:
        self.producers: list[str] = []
        self.starts: list[int] = []
        self.count = 0
        self.ties: list[Tie] = []
        self.pins: list[Pin] = []
        self.sites: list[tuple[Array, Array | None]] = []

    def mint(self, count: int, producer: str) -> Array:
        """Return `count` new atoms of `producer` (a node name)."""
        self.producers.append(producer)
        self.starts.append(self.count)
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def tie(self, left: Array, right: Array, cause: str) -> None:
        """Make `left[i]` and `right[i]` move together; both have the same number of elements."""
        left, right = left.reshape(-1), right.reshape(-1)
        if not np.array_equal(left, right):
            self.ties.append(Tie(left, right, cause))

    def pin(self, atoms: Array, reason: str) -> None:
        """Keep `atoms` in place."""
        atoms = np.unique(atoms[atoms != UNLABELLED])
        if atoms.size:
            self.pins.append(Pin(atoms, reason))

    def site(self, atoms: Array, roles: Array | None = None) -> None:
        """Tell `atoms` apart from all others, and from each other where their integer `roles` differ."""
        self.sites.append((atoms.reshape(-1), None if roles is None else roles.reshape(-1)))

    def solve(self) -> "Blocks":
        """Group the atoms into classes and the classes into blocks. Time: sorting the recorded arrays."""
        classes = self._classes()
        colours = self._colours()
        order = np.lexsort((colours, classes))
        bounds = np.flatnonzero(np.diff(classes[order], prepend=-1, append=-1))
        members = tuple(order[a:b] for a, b in pairwise(bounds))
        pinned: dict[int, str] = {}
        for pin in self.pins:
            for c in np.unique(classes[pin.atoms]):
                pinned.setdefault(int(c), pin.reason)
        block_of = np.full(len(members), -1, dtype=np.int64)
        keys: dict[bytes, int] = {}
        for c, atoms in enumerate(members):
            palette = colours[atoms]
            if c in pinned or (palette[1:] == palette[:-1]).any():
                continue  # two atoms of one class that nothing tells apart: which replaces which would be a guess
            block_of[c] = keys.setdefault(palette.tobytes(), len(keys))
        rank = np.empty(self.count, dtype=np.int64)
        rank[order] = np.arange(self.count) - np.repeat(bounds[:-1], np.diff(bounds))
        return Blocks(
            classes, members, rank, block_of, pinned, tuple(self.producers), np.asarray(self.starts, dtype=np.int64)
        )

    def _classes(self) -> Array:
        left = np.concatenate([tie.left for tie in self.ties]) if self.ties else np.zeros(0, dtype=np.int64)
        right = np.concatenate([tie.right for tie in self.ties]) if self.ties else np.zeros(0, dtype=np.int64)
        graph = coo_matrix((np.ones(left.size, dtype=np.int8), (left, right)), shape=(self.count, self.count))
        return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)

    def _colours(self) -> Array:
        """Refine one colour for all atoms by every site in turn; equal colours mean equal sites and roles."""
        colours = np.zeros(self.count, dtype=np.int64)
        fresh = 1
        for atoms, roles in self.sites:
            key = colours[atoms] if roles is None else colours[atoms] * (int(roles.max(initial=0)) + 1) + roles
            distinct, inverse = np.unique(key, return_inverse=True)
            colours[atoms] = fresh + inverse
            fresh += distinct.size
        return np.unique(colours, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class Blocks:
    """The solution: which atoms move together, and which classes may change places.

    Attributes:
        classes: class of each atom, shape `(atoms,)`.
        members: the atoms of each class, in an order that matches between the classes of a block.
        rank: position of each atom among the members of its class.
        block_of: block of each class, or -1 if the class must stay where it is.
        pinned: reason for each class that was pinned.
        producers, starts: node that minted each run of atoms, and where the run starts.
    """

    classes: Array
    members: Sequence[Array]
    rank: Array
    block_of: Array
    pinned: dict[int, str]
    producers: tuple[str, ...]
    starts: Array

    def why_fixed(self, atom: int) -> str:
        """Return why the class of `atom` may not move, or an empty string."""
        c = int(self.classes[atom])
        if self.block_of[c] >= 0:
            return ""
        return self.pinned.get(c, "its channels are tied to one another")


class Reordering:
    """A permutation of classes inside blocks, built from wishes, each accepted as a whole or refused."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._image: dict[int, int] = {}
        self._taken: dict[int, int] = {}
        self._owner: dict[int, str] = {}

    def wish(self, places: Array, atoms: Array, owner: str) -> str:
        """Ask for `owner` that the place of `places[i]` be given to `atoms[i]`; return the reason of a refusal, or an
        empty string.

        A class that an earlier wish placed is not placed again; a wish that says otherwise is refused.
        """
        if not np.array_equal(self.blocks.rank[places], self.blocks.rank[atoms]):
            return TOLD_APART
        new: dict[int, int] = {}
        owners: dict[int, int] = {}
        for place, atom in zip(self.blocks.classes[places].tolist(), self.blocks.classes[atoms].tolist(), strict=True):
            if self._image.get(place, atom) != atom or self._taken.get(atom, place) != place:
                first = self._owner.get(place, self._owner.get(atom, ""))
                return f"shares a channel space whose order {first} has fixed"
            if new.get(place, atom) != atom or owners.get(atom, place) != place:
                return "it would ask two orders of one channel space"
            new[place], owners[atom] = atom, place
            if place != atom and (
                self.blocks.block_of[place] < 0 or self.blocks.block_of[place] != self.blocks.block_of[atom]
            ):
                return self._why_not(place, atom)
        self._image |= new
        self._taken |= owners
        for c in new:
            self._owner.setdefault(c, owner)
        return ""

    def _why_not(self, place: int, atom: int) -> str:
        for c in (place, atom):
            reason = self.blocks.why_fixed(int(self.blocks.members[c][0]))
            if reason:
                return reason
        return TOLD_APART

    def permutation(self) -> Array:
        """Return, for each atom, the atom that takes its place. Classes no wish has placed stay, or fill what is left
        of their block.
        """
        image = dict(self._image)
        homeless: dict[int, list[int]] = {}
        for c in sorted(self._image.keys() - self._taken.keys()):
            homeless.setdefault(int(self.blocks.block_of[c]), []).append(c)
        for c in sorted(self._taken.keys() - self._image.keys()):
            image[c] = homeless[int(self.blocks.block_of[c])].pop(0)
        result = np.arange(self.blocks.classes.size, dtype=np.int64)
        for place, atom in image.items():
            result[self.blocks.members[place]] = self.blocks.members[atom]
        return result
