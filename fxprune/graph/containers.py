"""Tensors wherever they sit: in lists, dicts, dataclasses, named tuples, `ModelOutput` and any other object."""

import copy
import dataclasses
import enum
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

PLAIN = (
    bool | int | float | complex | str | bytes | slice | range | enum.Enum
    | torch.dtype | torch.device | torch.layout | torch.memory_format | torch.Size
)  # fmt: skip
"""What holds no tensor and cannot depend on the channels of one."""
OPAQUE = nn.Module | type | types.FunctionType | types.MethodType | types.ModuleType | torch.Generator
"""What may hold tensors that are not part of the value: not looked into."""


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value, in the order in which they stand there, as often as they do: those of mappings,
    sequences, sets and dataclasses, and those in the attributes of any other object. Modules, functions and classes are
    not looked into.

    >>> x, y = torch.zeros(1), torch.zeros(2)
    >>> [t.numel() for t in tensors_in({"a": [x], "b": (y, x)})]
    [1, 2, 1]
    """
    return list(_walk(value, ()))


def _walk(value: Any, above: tuple[int, ...]) -> Iterator[Tensor]:
    if value is None or isinstance(value, PLAIN) or isinstance(value, OPAQUE) or id(value) in above:
        return
    if isinstance(value, Tensor):
        yield value
        return
    for part in _parts(value):
        yield from _walk(part, (*above, id(value)))


def _parts(value: Any) -> list[Any]:
    """What stands directly in a value, in order. An object that is a mapping or a sequence too has both its entries
    and its attributes.
    """
    entries: list[Any] = []
    if isinstance(value, Mapping):
        entries = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        entries = list(value)
    names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    names += [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    names += vars(value) if hasattr(value, "__dict__") else ()
    attributes = (getattr(value, name, None) for name in dict.fromkeys(names) if not name.startswith("__"))
    present = {id(entry) for entry in entries}
    return [*entries, *(part for part in attributes if id(part) not in present)]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor anywhere in a value."""
    return next(_walk(value, ()), None) is not None


def is_plain(value: Any) -> bool:
    """Whether a value consists of sizes, flags, names and the like, in lists, tuples and dicts: nothing in it can
    depend on the order of channels.
    """
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return value is None or isinstance(value, PLAIN)


def convert_tensors(value: T, convert: Callable[[Tensor], Tensor]) -> T:
    """A copy of a value, of the same types, in which each tensor is replaced by `convert(tensor)`; one that stands in
    several places stays one.
    """
    if isinstance(value, Tensor):
        return convert(value)  # type: ignore[return-value]  # T is Tensor
    if is_plain(value):
        return value
    found = tensors_in(value)
    memo: dict[int, Any] = {id(tensor): convert(tensor) for tensor in found}
    memo[id(memo)] = found  # deepcopy keeps what it has seen alive under this key
    return copy.deepcopy(value, memo)
