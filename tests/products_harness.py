"""Which members of a product of parameters run by default, and which only in `make test-all`: by rule, not by pick."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings


def in_turns(cases: Iterable[Any], *axes: Collection[Any], start: int = 0, step: int = 1) -> list[Any]:
    """Every case with every combination of the axes: by default each case with one of them, in turns.

    Case number `i` has combination number `i + start` of the product of the axes; the other combinations are `slow`.
    So every case runs, and every value of every axis on many cases; with a `step`, every `step`-th case.

    Args:
        cases: what is combined; a `name` of theirs serves as the id.
        axes: the values of each further parameter.
        start: where the turns begin, so that tests of one case need not all take the same combination.
        step: of which cases one combination runs by default; 1 is all.
    """
    combinations = list(itertools.product(*axes))
    return [
        _param((case, *values), slow=number % step != 0 or (number // step + start) % len(combinations) != turn)
        for number, case in enumerate(cases)
        for turn, values in enumerate(combinations)
    ]


def one_in(step: int, cases: Iterable[Any], start: int = 0, always: Collection[str] = ()) -> list[Any]:
    """Every case: by default each `step`-th from `start` on, and those named in `always`.

    For what no case adds anything to but another graph, where other tests run each case by default.
    """
    return [
        _param((case,), slow=(number - start) % step != 0 and _name(case) not in always)
        for number, case in enumerate(cases)
    ]


def fewer(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Every value; by default those in `default`."""
    return [_param((value,), slow=value not in default) for value in values]


def examples(thorough: int, **options: Any) -> settings:
    """Settings of hypothesis: so many examples in `make test-all`, a fifth of them by default (see `conftest.py`)."""
    count = max(1, thorough * settings().max_examples // 100)
    return settings(max_examples=count, deadline=None, **options)


def _param(values: tuple[Any, ...], slow: bool) -> Any:
    return pytest.param(*values, id="-".join(map(_name, values)), marks=[pytest.mark.slow] if slow else [])


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))
