"""Schedules: their end points, their closed forms, and that sparsity never falls."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from fxprune.errors import PlanError
from fxprune.training.schedules import SCHEDULES, Agp, Iterative, OneCycle, OneShot, Schedule, resolve_schedule

MOMENTS = [i / 200 for i in range(201)]
VARIANTS = [
    *SCHEDULES.values(),
    OneShot(start=0.4),
    Iterative(0.1, 0.6, steps=7),
    Iterative(steps=1),
    Agp(0.3, 0.5),
    Agp(0.5, 0.5),
    OneCycle(0.2, 0.8, alpha=30, beta=-30),
    OneCycle(alpha=1e-3, beta=0),
]


def breaches(schedule: Schedule) -> list[str]:
    """What a schedule does that none may do."""
    shares = [schedule(t) for t in MOMENTS]
    found = []
    if any(schedule(t) != 0 for t in MOMENTS if t < schedule.start):
        found.append("prunes before its start")
    if any(schedule(t) != 1 for t in MOMENTS if t >= schedule.end):
        found.append("is not at the target after its end")
    if any(b < a for a, b in itertools.pairwise(shares)):
        found.append("falls")
    if any(not 0 <= share <= 1 for share in shares):
        found.append("leaves [0, 1]")
    return found


@pytest.mark.parametrize("schedule", VARIANTS, ids=repr)
def test_none_before_the_start_all_after_the_end_and_never_less(schedule: Schedule) -> None:
    assert breaches(schedule) == []


def test_control_a_schedule_that_falls_is_seen() -> None:
    @dataclass(frozen=True)
    class Wave(Schedule):
        name: ClassVar[str] = "wave"

        def shape(self, elapsed: float) -> float:
            return math.sin(9 * elapsed)

    class Late(Agp):
        def __call__(self, progress: float) -> float:
            return 0.5 * super().__call__(progress) + 0.1

    assert breaches(Wave()) == ["falls"]
    assert breaches(Late(start=0.1)) == ["prunes before its start", "is not at the target after its end"]


@pytest.mark.parametrize("elapsed", [0.0, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_closed_forms(elapsed: float) -> None:
    start, end = 0.125, 0.625
    progress = start + elapsed * (end - start)
    logistic = [(1 + math.exp(6 - 14)) / (1 + math.exp(6 - 14 * t)) for t in (0, elapsed)]
    assert Agp(start, end)(progress) == pytest.approx(1 - (1 - elapsed) ** 3)
    assert OneCycle(start, end)(progress) == pytest.approx((logistic[1] - logistic[0]) / (1 - logistic[0]))
    assert Iterative(start, end, steps=4)(progress) == [0.25, 0.5, 0.75, 1.0][int(elapsed * 4)]
    assert OneShot(start)(progress) == 1
    assert OneShot(start)(start - 1e-9) == 0


def test_the_one_cycle_as_published_starts_near_what_is_taken_off() -> None:
    published = (1 + math.exp(6 - 14)) / (1 + math.exp(6))
    assert published == pytest.approx(0.0025, abs=1e-4)
    assert OneCycle()(0.5) == pytest.approx((1 + math.exp(-8)) / (1 + math.exp(-1)), abs=2e-3)


def test_equal_steps_at_equal_times() -> None:
    schedule = Iterative(start=0.0, end=1.0, steps=3)
    rises = [t for t in range(1, 300) if schedule(t / 300) > schedule((t - 1) / 300)]
    assert rises == [100, 200]
    assert [schedule(t / 300) for t in (0, 100, 200)] == [1 / 3, 2 / 3, 1.0]
    for count in (3, 6, 7, 10, 49):  # rounding of i / count may not put a step off
        assert [Iterative(0.0, 1.0, steps=count)(i / count) for i in range(count)] == [
            (i + 1) / count for i in range(count)
        ]


def test_by_name_or_as_an_object_with_another_start_and_end() -> None:
    assert resolve_schedule("agp") == Agp()
    assert resolve_schedule("agp", 0.1, 0.9) == Agp(0.1, 0.9)
    assert resolve_schedule(Iterative(steps=5), end=0.5) == Iterative(0.0, 0.5, 5)
    assert resolve_schedule("one-shot", start=0.5) == OneShot(0.5)
    assert OneShot(0.5).end == 0.5
    assert set(SCHEDULES) == {"one-shot", "iterative", "agp", "one-cycle"}


@pytest.mark.parametrize(
    "schedule,options,message",
    [
        ("apg", {}, r"schedule is 'apg'.*'agp'"),
        (lambda t: t, {}, r"schedule is <function.*or a Schedule"),
        ("agp", {"start": -0.1}, r"'agp': start is -0.1; it must be a share of the training"),
        ("agp", {"end": 1.5}, r"'agp': end is 1.5"),
        ("agp", {"end": float("nan")}, r"'agp': end is nan"),
        ("agp", {"start": True}, r"'agp': start is True"),
        ("agp", {"start": 0.9}, r"'agp': it ends at 0.75, before its start at 0.9; pass a later end"),
        ("one-shot", {"end": 0.5}, r"'one-shot' prunes once, at its start; leave end=0.5 out"),
    ],
)
def test_what_is_no_schedule_is_named(schedule: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve_schedule(schedule, **options)


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: Iterative(steps=0), "steps is 0"),
        (lambda: Iterative(steps=2.5), "steps is 2.5"),  # type: ignore[arg-type]
        (lambda: OneCycle(alpha=0), "alpha is 0; it must be a steepness"),
        (lambda: OneCycle(alpha=float("inf")), "alpha is inf"),
        (lambda: OneCycle(beta=1000), "beta is 1000"),
    ],
)
def test_fields_that_are_not_legal(build: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build()
