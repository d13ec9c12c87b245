"""Patterns of module names: `"layer1.*"`, `"layer1"`, `"*conv2"`; and what else may say which layers are left alone."""

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from glob import escape
from typing import TypeAlias, TypeVar

from torch import nn

from fxprune.errors import PlanError, near_matches, warn_user
from fxprune.graph.convolutions import convolutions

Value = TypeVar("Value")

Ignored: TypeAlias = str | nn.Module | type[nn.Module]
"""A pattern of names, a module of the model with all in it, or all modules of a type."""


def match_patterns(what: str, patterns: Mapping[str, Value], names: Collection[str]) -> dict[str, Value]:
    """Map each name that a pattern matches to the value of the first such pattern.

    Raises:
        PlanError: a pattern matches no name; the message says what argument it came from and names near ones.
    """
    values: dict[str, Value] = {}
    for pattern, value in patterns.items():
        if not isinstance(pattern, str):
            raise PlanError(f"{what}: {pattern!r} is not a string; use patterns of module names")
        matches = _matching(pattern, names)
        if not matches:
            known = {prefix: None for n in names for prefix in _prefixes(n)}
            raise PlanError(
                f"{what}: pattern {pattern!r} matches no convolution of the model{near_matches(pattern, known)}"
            )
        for match in matches:
            values.setdefault(match, value)
    return values


def one_each(values: Mapping[str, Value]) -> dict[str, Value]:
    """Patterns that match one module each, from its name.

    A pattern also matches what lies below the module it names, and the first that matches counts: the deepest come
    first.
    """
    return {escape(name): values[name] for name in sorted(values, key=lambda name: -name.count("."))}


def as_entries(ignore: Ignored | Iterable[Ignored]) -> tuple[Ignored, ...]:
    """The entries of `ignore=`, of which one may stand alone.

    Raises:
        PlanError: it is of another kind.
    """
    if isinstance(ignore, str | nn.Module | type):
        return (ignore,)
    if not isinstance(ignore, Iterable):
        raise PlanError(f"ignore is {ignore!r}; it must be names, patterns of names, modules or types of modules")
    entries = tuple(ignore)
    for entry in entries:
        if not isinstance(entry, str | nn.Module) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise PlanError(f"ignore: {entry!r} is no name, no pattern of names, no module and no type of modules")
    return entries


def ignored_patterns(ignore: Ignored | Iterable[Ignored], model: nn.Module) -> tuple[str, ...]:
    """What `ignore=` means, as patterns of module names.

    Raises:
        PlanError: an entry is of another kind, or a module that is not in the model.

    Warns:
        UserWarning: an entry means only layers of other kinds, which are never pruned, or no layer of its type.
    """
    convs, modules = convolutions(model), {name: module for name, module in model.named_modules() if name}
    patterns: list[str] = []
    for entry in as_entries(ignore):
        named = _named(entry, modules)
        found = [name for pattern in named for name in _matching(pattern, modules)]
        if any(name in convs for name in found) or (isinstance(entry, str) and not found):  # which is an error later
            patterns += named
            continue
        told = entry if isinstance(entry, str) else named[0] if named else getattr(entry, "__name__", "")
        what = f"is a {type(modules[found[0]]).__name__} and holds" if found else "is the type of no module here:"
        warn_user(f"ignore: {told!r} {what} no convolution; only these are pruned, so leave it out", UserWarning)
    return tuple(patterns)


def _named(entry: Ignored, modules: Mapping[str, nn.Module]) -> list[str]:
    """Patterns of names that an entry of `ignore` stands for."""
    if isinstance(entry, str):
        return [entry]
    if isinstance(entry, type):
        return [name for name, module in modules.items() if isinstance(module, entry)]
    name = next((name for name, module in modules.items() if module is entry), None)
    if name is None:
        raise PlanError(
            f"ignore: this {type(entry).__name__} is no module inside the model; pass one that is, such as "
            "model.layer4, or its name"
        )
    return [name]


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    return [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")]


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
