"""The program of all choices against every combination of them, on small instances."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fxprune.planning.program.integer_program import GAP, Array, Choice, Floor, IntegerProgram, Part, Space, Term

NEAR = 2 * GAP


def choices(program: IntegerProgram) -> Iterator[Choice]:
    """All that is legal, whatever it costs."""
    for flags in itertools.product((False, True), repeat=len(program.branches)):
        gone = frozenset(np.flatnonzero(flags).tolist())
        if any(len(gone.intersection(part.branches)) > 1 for part in program.parts):
            continue
        widths = [[None] if gone.intersection(space.branches) else range(len(space.losses)) for space in program.spaces]
        staying = [part for part in program.parts if not gone.intersection(part.branches)]
        for chosen in itertools.product(*widths):
            for ways in itertools.product(*(range(part.ways) for part in staying)):
                choice = Choice(chosen, {part.name: way for part, way in zip(staying, ways, strict=True)}, gone)
                if np.isfinite(program.loss(choice)):
                    yield choice


def brute_force(program: IntegerProgram) -> float:
    """The least loss within the limits; infinite if there is none."""
    fits = (choice for choice in choices(program) if (program.costs(choice) <= program.limits + 1e-9).all())
    return min(map(program.loss, fits), default=np.inf)


def random_program(seed: int, kinds: int = 1, branches: int = 2) -> IntegerProgram:
    """Three spaces, one of them inside the first branch; layers between them, one of several spaces, one in place."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, 4, 3)

    def term(reads: int | None, writes: int | None, ways: int, scale: float = 1.0) -> Term:
        shape = (*(1 if space is None else int(sizes[space]) for space in (reads, writes)), ways)
        losses, costs = draw.random(shape) * scale, draw.random((*shape, kinds)) * scale
        losses[..., 1:] += np.where(draw.random((*shape[:2], ways - 1)) < 0.2, np.inf, 0.0)
        return Term(reads, writes, losses, costs)

    inside = (0,) if branches else ()
    falling = [np.linspace(1, 0.5, int(size)) for size in sizes]
    both = (0, 1) if branches > 1 else inside
    parts = [
        Part("stem", (term(None, 0, 1),)),
        Part("into", (term(0, 1, 3),), inside),
        Part("out", (term(1, 0, 2),), inside),
        Part("nested", (term(None, 0, 1),), both),
        Part("in place", (term(0, 0, 2),)),
        Part(
            "concat", (term(0, 2, 2, 0.5), term(None, 2, 2, 0.5)), floors=(Floor({0: falling[0], 2: falling[2]}, 1.5),)
        ),
        Part("head", (term(2, None, 1),)),
        Part("rest", (term(None, None, 1),)),
    ]
    spaces = [Space(np.sort(draw.random(int(size)))) for size in sizes]
    spaces[1] = replace(spaces[1], branches=inside)
    program = IntegerProgram(spaces, parts, draw.random(branches), np.full(kinds, np.inf))
    every = np.array([program.costs(choice) for choice in choices(program)])
    return program.within(np.quantile(every, draw.uniform(0.05, 0.6), axis=0))


@pytest.mark.parametrize("seed", range(12))
def test_nothing_within_the_limits_loses_less(seed: int) -> None:
    program = random_program(seed, kinds=1 + seed % 2, branches=seed % 3)
    choice, least = program.solved(), brute_force(program)
    if choice is None:
        assert least == np.inf
        return
    assert (program.costs(choice) <= program.limits + 1e-6).all()
    assert program.loss(choice) == pytest.approx(least, rel=NEAR)
    assert any(choice == other for other in choices(program))  # it is legal


def test_every_limit_counts() -> None:
    program = random_program(1, kinds=2)
    one = program.within(np.array([program.limits[0], np.inf])).solved()
    other = program.within(np.array([np.inf, program.limits[1]])).solved()
    both = program.solved()
    assert one is not None
    assert other is not None
    assert both is not None
    assert program.costs(one)[1] > program.limits[1]  # control: it has to be asked for
    assert program.loss(both) >= max(program.loss(one), program.loss(other)) * (1 - NEAR)


def test_the_least_of_a_cost_is_what_some_choice_reaches() -> None:
    program = random_program(2, kinds=2)
    for kind in range(2):
        assert program.least(kind) == pytest.approx(
            min(program.costs(choice)[kind] for choice in choices(program)), rel=NEAR
        )
    assert program.within(np.array([0.9 * program.least(0), np.inf])).solved() is None


def test_what_goes_with_a_branch_costs_nothing() -> None:
    dear = Term(0, None, np.zeros((2, 1, 1)), np.array([5.0, 4.0]).reshape(2, 1, 1, 1))
    spaces = [Space(np.array([0.0, 9.0]), (0,))]
    program = IntegerProgram(spaces, [Part("a", (dear,), (0,))], np.array([3.0]), np.array([4.5]))
    assert program.solved() == Choice((None,), {}, frozenset({0}))  # 3 is less than the 9 of the narrower space
    kept = replace(program, branches=np.array([10.0])).solved()
    assert kept == Choice((1,), {"a": 0})


def test_both_sides_count_together() -> None:
    """A layer saves more if both of its sides narrow, which sums over its sides alone do not know."""
    shares = np.array([1.0, 0.5])
    cost = np.multiply.outer(shares, shares)[:, :, None, None]
    middle = Part("middle", (Term(0, 1, np.zeros((2, 2, 1)), cost),))
    spaces = [Space(np.array([0.0, 1.0])), Space(np.array([0.0, 1.5]))]
    program = IntegerProgram(spaces, [middle], np.zeros(0), np.array([0.3]))
    assert program.solved() == Choice((1, 1), {"middle": 0})
    assert program.within(np.array([0.5])).solved() == Choice((1, 0), {"middle": 0})
    added = (shares[:, None] + shares - 1)[:, :, None, None]  # control: 0, 0.5 and 1
    apart = replace(program, parts=[Part("middle", (replace(middle.terms[0], costs=added),))])
    assert apart.within(np.array([0.2])).solved() == program.solved()
    assert program.within(np.array([0.2])).solved() is None


def test_kernels_go_only_where_enough_is_left() -> None:
    """Of two spaces together, however they share it."""
    losses = np.array([0.0, 1.0])
    way = Part(
        "grouped",
        (Term(None, None, np.array([[[0.0, 0.1]]]), np.array([[[[2.0], [1.0]]]])),),
        floors=(Floor({0: np.array([8.0, 4.0]), 1: np.array([8.0, 4.0])}, 12.0),),
    )
    sides = [Part(f"side {i}", (Term(i, None, np.zeros((2, 1, 1)), np.array([[[[2.0]]], [[[1.0]]]])),)) for i in (0, 1)]
    program = IntegerProgram([Space(losses), Space(1.5 * losses)], [way, *sides], np.zeros(0), np.array([4.0]))
    found = program.solved()
    assert found == Choice((1, 0), {"grouped": 1, "side 0": 0, "side 1": 0})
    assert program.within(np.array([3.0])).solved() is None
    free = replace(program, parts=[replace(way, floors=()), *sides]).within(np.array([3.0])).solved()
    assert free == Choice((1, 1), found.ways)  # control


def test_a_space_read_and_written_by_one_layer_has_one_width() -> None:
    costs: Array = np.array([[4.0, 0.0], [0.0, 2.0]])[:, :, None, None]  # what is off the diagonal cannot be
    part = Part("in place", (Term(0, 0, np.zeros((2, 2, 1)), costs),))
    program = IntegerProgram([Space(np.array([0.0, 1.0]))], [part], np.zeros(0), np.array([1.0]))
    assert program.solved() is None
    assert program.within(np.array([2.0])).solved() == Choice((1,), {"in place": 0})
