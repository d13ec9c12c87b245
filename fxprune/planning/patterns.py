"""Patterns of module names: `"layer1.*"`, `"layer1"`, `"*conv2"`."""

import fnmatch
from collections.abc import Collection, Mapping
from typing import TypeVar

from fxprune.errors import PlanError, near_matches

Value = TypeVar("Value")


def match_patterns(what: str, patterns: Mapping[str, Value], names: Collection[str]) -> dict[str, Value]:
    """Map each name that a pattern matches to the value of the first such pattern.

    Raises:
        PlanError: a pattern matches no name; the message says what argument it came from and names near ones.
    """
    values: dict[str, Value] = {}
    for pattern, value in patterns.items():
        if not isinstance(pattern, str):
            raise PlanError(f"{what}: {pattern!r} is not a string; use patterns of module names")
        matches = [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")]
        if not matches:
            known = {prefix: None for n in names for prefix in _prefixes(n)}
            raise PlanError(f"{what}: pattern {pattern!r} matches no Conv2d of the model{near_matches(pattern, known)}")
        for match in matches:
            values.setdefault(match, value)
    return values


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
