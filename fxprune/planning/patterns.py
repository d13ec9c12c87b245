"""Patterns of module names: `"layer1.*"`, `"layer1"`, `"*conv2"`."""

import fnmatch
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from fxprune.errors import PlanError, near_matches
from fxprune.graph.convolutions import convolutions

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
            raise PlanError(
                f"{what}: pattern {pattern!r} matches no convolution of the model{near_matches(pattern, known)}"
            )
        for match in matches:
            values.setdefault(match, value)
    return values


def left_out(model: nn.Module, only: str | None) -> tuple[str, ...]:
    """Names of the convolutions to ignore so that only those stay that `only` means: all, the 1x1 ones, or a pattern.

    Raises:
        PlanError: `only` means none of the model.
    """
    convs = convolutions(model)
    if only is None:
        return ()
    if only == "1x1":
        meant = {name for name, conv in convs.items() if set(conv.kernel_size) == {1}}
    else:
        meant = set(match_patterns("only", {only: True}, convs))
    if not meant:
        raise PlanError("only: the model has no 1x1 convolution; give a pattern of module names")
    return tuple(name for name in convs if name not in meant)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
