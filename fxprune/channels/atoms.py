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
from functools import cached_property
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
        bounds = np.flatnonzero(np.diff(classes[order], prepend=-1, append=self.count))
        pinned: dict[int, str] = {}
        for pin in self.pins:
            for c in np.unique(classes[pin.atoms]).tolist():
                pinned.setdefault(c, pin.reason)
        # Two atoms of one class that nothing tells apart: which replaces which would be a guess.
        palettes = colours[order]
        same = (np.diff(palettes) == 0) & (np.diff(classes[order]) == 0)
        fixed = pinned.keys() | set(classes[order][:-1][same].tolist())
        block_of = np.full(bounds.size - 1, -1, dtype=np.int64)
        keys: dict[bytes, int] = {}
        for c, (start, stop) in enumerate(pairwise(bounds.tolist())):
            if c not in fixed:
                block_of[c] = keys.setdefault(palettes[start:stop].tobytes(), len(keys))
        rank = np.empty(self.count, dtype=np.int64)
        rank[order] = np.arange(self.count) - np.repeat(bounds[:-1], np.diff(bounds))
        return Blocks(
            classes, order, bounds, rank, block_of, pinned, tuple(self.producers), np.asarray(self.starts, np.int64)
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
        order, bounds: the atoms class by class, in an order that matches between the classes of a block, and where
            each class begins and ends among them, shape `(classes + 1,)`.
        rank: position of each atom among the members of its class.
        block_of: block of each class, or -1 if the class must stay where it is.
        pinned: reason for each class that was pinned.
        producers, starts: node that minted each run of atoms, and where the run starts.
    """

    classes: Array
    order: Array
    bounds: Array
    rank: Array
    block_of: Array
    pinned: dict[int, str]
    producers: tuple[str, ...]
    starts: Array

    @property
    def count(self) -> int:
        """Number of classes."""
        return self.block_of.size

    @property
    def first(self) -> Array:
        """One atom of each class, those of a block matching."""
        found: Array = self.order[self.bounds[:-1]]
        return found

    @cached_property
    def members(self) -> Sequence[Array]:
        """The atoms of each class."""
        return np.split(self.order, self.bounds[1:-1])[: self.count]

    def atoms_of(self, classes: Array) -> Array:
        """The atoms of some classes, one class after the other."""
        start, size = self.bounds[classes], np.diff(self.bounds)[classes]
        ends = np.cumsum(size)
        atoms: Array = self.order[np.arange(int(size.sum())) + np.repeat(start - ends + size, size)]
        return atoms

    def why_fixed(self, atom: int) -> str:
        """Return why the class of `atom` may not move, or an empty string."""
        c = int(self.classes[atom])
        if self.block_of[c] >= 0:
            return ""
        return self.pinned.get(c, "its channels are tied to one another")


@dataclass(frozen=True)
class Excerpt:
    """Some classes with all their atoms, numbered anew from 0: what is done with them costs what they are, however
    large the network around them is.

    Attributes:
        blocks: the classes among themselves.
        atoms: which atom of the whole each is, ascending.
    """

    blocks: Blocks
    atoms: Array

    @classmethod
    def around(cls, blocks: Blocks, atoms: Array) -> "Excerpt":
        """The classes of some atoms of the whole."""
        chosen = np.unique(blocks.classes[atoms])
        order = blocks.atoms_of(chosen)
        inside = np.sort(order)
        here = Blocks(
            classes=np.searchsorted(chosen, blocks.classes[inside]),
            order=np.searchsorted(inside, order),
            bounds=np.concatenate([[0], np.cumsum(np.diff(blocks.bounds)[chosen])]),
            rank=blocks.rank[inside],
            block_of=blocks.block_of[chosen],
            pinned={i: blocks.pinned[c] for i, c in enumerate(chosen.tolist()) if c in blocks.pinned},
            producers=blocks.producers,
            starts=np.searchsorted(inside, blocks.starts),
        )
        return cls(here, inside)

    def numbered(self, atoms: Array) -> Array:
        """The new numbers of atoms of the whole."""
        return np.searchsorted(self.atoms, atoms)


class Reordering:
    """A permutation of classes inside blocks, built from wishes, each accepted as a whole or refused."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._image, self._taken, self._owner = (np.full(blocks.count, -1, dtype=np.int64) for _ in range(3))
        self._owners: list[str] = []

    def wish(self, places: Array, atoms: Array, owner: str) -> str:
        """Ask for `owner` that the place of `places[i]` be given to `atoms[i]`; return the reason of a refusal, or an
        empty string.

        A class that an earlier wish placed is not placed again; a wish that says otherwise is refused.
        """
        if not np.array_equal(self.blocks.rank[places], self.blocks.rank[atoms]):
            return TOLD_APART
        place, atom, block_of = self.blocks.classes[places], self.blocks.classes[atoms], self.blocks.block_of
        taken = _differs(self._image[place], atom) | _differs(self._taken[atom], place)
        twice = (atom != _first_partner(place, atom)) | (place != _first_partner(atom, place))
        apart = (place != atom) & ((block_of[place] < 0) | (block_of[place] != block_of[atom]))
        refused = np.flatnonzero(taken | twice | apart)
        if refused.size:  # the first says why
            i = refused[0]
            if taken[i]:
                owners = [self._owner[place[i]], self._owner[atom[i]]]
                first = next((self._owners[o] for o in owners if o >= 0), "")
                return f"shares a channel space whose order {first} has fixed"
            return "it would ask two orders of one channel space" if twice[i] else self._why_not(place[i], atom[i])
        self._image[place], self._taken[atom] = atom, place
        self._owner[place] = np.where(self._owner[place] < 0, len(self._owners), self._owner[place])
        self._owners.append(owner)
        return ""

    def _why_not(self, place: int, atom: int) -> str:
        for c in (place, atom):
            reason = self.blocks.why_fixed(int(self.blocks.order[self.blocks.bounds[c]]))
            if reason:
                return reason
        return TOLD_APART

    def permutation(self) -> Array:
        """Return, for each atom, the atom that takes its place. Classes no wish has placed stay, or fill what is left
        of their block.
        """
        image, block_of = self._image.copy(), self.blocks.block_of
        homeless = np.flatnonzero((image >= 0) & (self._taken < 0))
        empty = np.flatnonzero((image < 0) & (self._taken >= 0))
        image[empty[np.argsort(block_of[empty], kind="stable")]] = homeless[
            np.argsort(block_of[homeless], kind="stable")
        ]
        moved = np.flatnonzero((image >= 0) & (image != np.arange(image.size)))
        result = np.arange(self.blocks.classes.size, dtype=np.int64)
        result[self.blocks.atoms_of(moved)] = self.blocks.atoms_of(image[moved])
        return result


def _differs(known: Array, asked: Array) -> npt.NDArray[np.bool_]:
    """Where something is known already, and it is not what is asked for."""
    differs: npt.NDArray[np.bool_] = (known >= 0) & (known != asked)
    return differs


def _first_partner(keys: Array, partners: Array) -> Array:
    """For each key the partner that stands beside its first occurrence."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found: Array = partners[first[inverse]]
    return found
