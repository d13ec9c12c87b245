"""What every channel space, convolution and residual branch becomes, chosen at once: an integer program.

A channel space keeps one of a few widths, a convolution has its kernels pruned in one of a few ways (dense is one), a
branch goes or stays. What a layer costs depends on the widths of what it reads and writes and on its kernels together;
so it has a variable for each such combination, tied to the choices by its sums (marginals): the local polytope of
graphical models (Wainwright and Jordan, "Graphical Models, Exponential Families, and Variational Inference", 2008,
section 4.1.1), which leaves little between the linear relaxation and the optimum. Losses and costs are linear in these
variables, however many budgets there are.

With `x` one-hot over the widths of a space, `k` over the ways of a layer, `g` 1 for a branch that goes and `z >= 0` a
term of a layer, in words: `sum z = 1 - g` of its branch, the sums of `z` over all but the width of one side are at most
the `x` of that space, those over all but the way are `k`; what lies in a branch that goes costs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fxprune.planning.knapsack import DAMAGE_SCALE, silent

Array = npt.NDArray[np.float64]

GAP, SECONDS = 1e-3, 20.0
"""The search ends within this share of the least loss, or after so long with the best found."""


@dataclass(frozen=True)
class Space:
    """What may become of a channel space.

    Attributes:
        losses: `(W,)` of each width; the first is the whole space. Infinite where it cannot be.
        branches: places of the branches with which all of it goes.
    """

    losses: Array
    branches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Term:
    """A part of what a layer loses and costs: that by the channels of one space which it reads and of one which it
    writes.

    Attributes:
        reads, writes: places of the spaces; None where that side is fixed.
        losses: `(R, W, K)` for each width that is read, that is written, and way to prune the kernels; a side that is
            fixed has one width. Infinite where it cannot be.
        costs: `(R, W, K, B)`, of each kind.
    """

    reads: int | None
    writes: int | None
    losses: Array
    costs: Array


@dataclass(frozen=True)
class Floor:
    """What must be left of several spaces together where the kernels of a layer are pruned.

    Attributes:
        counts: by place of the space, what is left of it at each width `(W,)`.
        least: what must be left in all.
    """

    counts: Mapping[int, Array]
    least: float


@dataclass(frozen=True)
class Part:
    """A layer, or something else that costs: all its terms share a way.

    Attributes:
        name: of the layer.
        terms: see `Term`.
        branches: places of the branches with which it goes. Of branches that hold one part no two go.
        floors: see `Floor`.
    """

    name: str
    terms: tuple[Term, ...]
    branches: tuple[int, ...] = ()
    floors: tuple[Floor, ...] = ()

    @property
    def ways(self) -> int:
        """How many ways there are to prune its kernels; the first is not to."""
        return int(self.terms[0].losses.shape[2])


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        widths: of each space; None if it goes with a branch.
        ways: of each part that stays, by name.
        gone: places of the branches that go.
        gap: how far from the least loss it may be, relative to it.
    """

    widths: tuple[int | None, ...]
    ways: Mapping[str, int]
    gone: frozenset[int] = frozenset()
    gap: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class IntegerProgram:
    """The choices, and what they cost.

    Attributes:
        spaces: the channel spaces.
        parts: layers, and what else costs.
        branches: `(N,)` the loss of each.
        limits: `(B,)` what each kind of cost may be.
    """

    spaces: Sequence[Space]
    parts: Sequence[Part]
    branches: Array
    limits: Array

    def within(self, limits: Array) -> "IntegerProgram":
        """The same with other limits."""
        return IntegerProgram(self.spaces, self.parts, self.branches, limits)

    def solved(self) -> Choice | None:
        """The choice of least loss whose costs stay within the limits; None if there is none."""
        return self._solved(None)

    def least(self, kind: int) -> float:
        """The least of a kind of cost that any choice reaches, whatever the others are."""
        choice = self.within(np.full(len(self.limits), np.inf))._solved(kind)
        assert choice is not None
        return float(self.costs(choice)[kind])

    def loss(self, choice: Choice) -> float:
        """The loss of a choice; infinite where it cannot be."""
        total = float(self.branches[list(choice.gone)].sum())
        for space, width in zip(self.spaces, choice.widths, strict=True):
            total += 0.0 if width is None else float(space.losses[width])
        floors = [floor for part in self.parts if choice.ways.get(part.name) for floor in part.floors]
        for floor in floors:
            left = [0 if (w := choice.widths[space]) is None else c[w] for space, c in floor.counts.items()]
            total += 0.0 if sum(left) >= floor.least else np.inf
        return total + float(sum(term.losses[cell] for term, cell in self._cells(choice)))

    def costs(self, choice: Choice) -> Array:
        """Its costs, `(B,)`."""
        return np.sum([np.zeros(len(self.limits)), *(term.costs[cell] for term, cell in self._cells(choice))], axis=0)

    def _cells(self, choice: Choice) -> list[tuple[Term, tuple[int, int, int]]]:
        """The terms that count, and where in them."""
        found = []
        for part in self.parts:
            if part.name not in choice.ways:
                continue
            for term in part.terms:
                sides = [0 if space is None else choice.widths[space] for space in (term.reads, term.writes)]
                assert sides[0] is not None
                assert sides[1] is not None
                found.append((term, (sides[0], sides[1], choice.ways[part.name])))
        return found

    def _solved(self, kind: int | None) -> Choice | None:
        """The choice of the least loss, or of the least of a kind of cost."""
        form = _Form(self, kind)
        with silent():
            result = milp(**form.arguments(), options={"mip_rel_gap": GAP, "time_limit": SECONDS})
        return None if result.x is None else form.choice(result.x, float(result.mip_gap or 0.0))


class _Form:
    """The program as scipy wants it: columns of variables, rows of constraints.

    Args:
        program: what to write down.
        kind: the cost that is to be least; None for the loss.
    """

    def __init__(self, program: IntegerProgram, kind: int | None) -> None:
        self._program = program
        self._columns = 0
        self._objective: list[Array] = []
        self._whole: list[Array] = []
        self._costs: list[Array] = []
        self._entries: list[tuple[int, npt.NDArray[np.intp], float]] = []
        self._bounds: list[tuple[float, float]] = []
        self._gone = self._add(program.branches if kind is None else 0 * program.branches, True)
        nothing = [np.where(np.isfinite(space.losses), 0.0, np.inf) for space in program.spaces]
        losses = nothing if kind is not None else [space.losses for space in program.spaces]
        self._widths = [self._add(each, True) for each in losses]
        for space, widths in zip(program.spaces, self._widths, strict=True):
            self._one_unless(widths, space.branches)
        self._ways: dict[str, npt.NDArray[np.intp]] = {}
        for part in program.parts:
            if len(part.branches) > 1:
                self._row(0, 1, (self._gone[list(part.branches)], 1.0))
            ways = self._ways[part.name] = self._add(np.zeros(part.ways), True)
            self._one_unless(ways, part.branches)
            for term in part.terms:
                self._write(part, term, ways, kind)
            for floor in part.floors:
                left = [
                    (columns[i : i + 1], count)
                    for space, counts in floor.counts.items()
                    for columns in (self._widths[space],)
                    for i, count in enumerate(counts.tolist())
                ]
                self._row(0, np.inf, *left, (ways[1:], -floor.least))

    def arguments(self) -> dict[str, Any]:
        """Of `scipy.optimize.milp`."""
        objective = np.concatenate(self._objective)
        can_be = np.isfinite(objective)
        objective = np.where(can_be, objective, 0.0)
        shape = (len(self._bounds), self._columns)
        rows = np.repeat([row for row, *_ in self._entries], [len(columns) for _, columns, _ in self._entries])
        columns = np.concatenate([columns for _, columns, _ in self._entries])
        values = np.repeat([value for *_, value in self._entries], [len(columns) for _, columns, _ in self._entries])
        low, high = np.array(self._bounds).T
        constraints = [LinearConstraint(csr_array((values, (rows, columns)), shape=shape), low, high)]
        finite = np.isfinite(self._program.limits)
        if finite.any():
            costs = csr_array(np.concatenate(self._costs)[:, finite].T)
            constraints.append(LinearConstraint(costs, -np.inf, self._program.limits[finite]))
        return {
            "c": objective * DAMAGE_SCALE / (np.abs(objective).max() or 1.0),
            "integrality": np.concatenate(self._whole),
            "bounds": Bounds(0, can_be),
            "constraints": constraints,
        }

    def choice(self, values: Array, gap: float) -> Choice:
        """What a solution says."""

        def taken(columns: npt.NDArray[np.intp]) -> int | None:
            place = int(values[columns].argmax())
            return place if values[columns[place]] > 0.5 else None

        ways = {name: way for name, columns in self._ways.items() if (way := taken(columns)) is not None}
        gone = frozenset(np.flatnonzero(values[self._gone] > 0.5).tolist())
        return Choice(tuple(map(taken, self._widths)), ways, gone, gap)

    def _add(self, objective: Array, whole: bool, costs: Array | None = None) -> npt.NDArray[np.intp]:
        """New variables `(n,)`, what each counts, whether they are whole numbers, and what they cost `(n, B)`."""
        count = len(objective)
        self._objective.append(objective)
        self._whole.append(np.full(count, float(whole)))
        self._costs.append(np.zeros((count, len(self._program.limits))) if costs is None else costs)
        self._columns += count
        return np.arange(self._columns - count, self._columns)

    def _row(self, low: float, high: float, *terms: tuple[npt.NDArray[np.intp], float]) -> None:
        """Sums of variables, each times a factor, lie between two numbers."""
        self._entries += [(len(self._bounds), columns, factor) for columns, factor in terms if len(columns)]
        self._bounds.append((low, high))

    def _one_unless(self, columns: npt.NDArray[np.intp], branches: Sequence[int]) -> None:
        """One of some variables is 1, unless one of the branches goes."""
        self._row(1, 1, (columns, 1.0), (self._gone[list(branches)], 1.0))

    def _write(self, part: Part, term: Term, ways: npt.NDArray[np.intp], kind: int | None) -> None:
        """A variable for each combination of a term that can be, and its sums."""
        can_be = np.isfinite(term.losses) & np.isfinite(term.costs).all(3)
        if term.reads is not None and term.reads == term.writes:
            can_be &= np.eye(len(can_be), dtype=np.bool_)[:, :, None]
        cells = np.argwhere(can_be)
        costs = term.costs[can_be]
        columns = self._add(term.losses[can_be] if kind is None else costs[:, kind], False, costs)
        sides = [(space, axis) for axis, space in enumerate((term.reads, term.writes)) if space is not None]
        for space, axis in sides[: 1 if term.reads == term.writes else 2]:
            same = self._program.spaces[space].branches == part.branches
            for width, column in enumerate(self._widths[space]):
                mine = columns[cells[:, axis] == width]
                self._row(0 if same else -np.inf, 0, (mine, 1.0), (np.array([column]), -1.0))
        for way, column in enumerate(ways):
            self._row(0, 0, (columns[cells[:, 2] == way], 1.0), (np.array([column]), -1.0))
