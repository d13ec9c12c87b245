"""Tensors are found, and replaced, wherever they sit."""

import collections
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fxprune.graph.containers import convert_tensors, holds_tensor, is_plain, tensors_in

A, B = torch.arange(2.0), torch.arange(3.0)


class Named(NamedTuple):
    a: Any
    b: Any


@dataclasses.dataclass
class Data:
    a: Any
    b: Any


class ModelOutput(collections.OrderedDict[str, Any]):
    """As Hugging Face has it: entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


class Plain:
    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


class ListWithMore(list[Any]):
    more: Any = None


def list_with_more(a: Any, b: Any) -> ListWithMore:
    made = ListWithMore([a])
    made.more = b
    return made


class Kind(enum.Enum):
    ONE = 1


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, [b]],
    "dict": lambda a, b: {"a": a, 3: b},
    "named tuple": Named,
    "dataclass": Data,
    "model output": lambda a, b: ModelOutput(a=a, b=b),
    "slots": Slotted,
    "object": Plain,
    "list with attributes": list_with_more,
    "nested": lambda a, b: {"x": Data(Plain(a, 1), [Named(None, (b,))])},
}


@pytest.mark.parametrize("way", WAYS)
def test_all_tensors_are_found_in_order(way: str) -> None:
    value = WAYS[way](A, B)
    found = tensors_in(value)
    assert len(found) == 2
    assert found[0] is A
    assert found[1] is B
    assert holds_tensor(value)
    assert not is_plain(value)
    nothing = WAYS[way](1, None)
    assert tensors_in(nothing) == []
    assert not holds_tensor(nothing)


@pytest.mark.parametrize("way", WAYS)
def test_a_converted_value_has_the_same_types_and_leaves_the_first_alone(way: str) -> None:
    value = WAYS[way](A, B)
    double = convert_tensors(value, Tensor.double)
    assert type(double) is type(value)
    assert [t.dtype for t in tensors_in(double)] == [torch.float64] * 2
    assert [t.tolist() for t in tensors_in(double)] == [A.tolist(), B.tolist()]
    assert tensors_in(value)[0] is A


def test_a_tensor_that_stands_twice_counts_twice_and_stays_one() -> None:
    assert len(tensors_in((A, [A], A))) == 3
    value: Any = [A, (A,)]
    converted = convert_tensors(value, Tensor.double)
    assert converted[0] is converted[1][0]


def test_a_value_that_holds_itself_ends() -> None:
    loop: list[Any] = [A]
    loop.append(loop)
    assert len(tensors_in(loop)) == 1


def test_modules_functions_and_classes_are_not_looked_into() -> None:
    def function() -> Tensor:
        return A

    function.kept = A  # type: ignore[attr-defined]
    assert tensors_in([nn.Linear(2, 2), function, Plain, torch]) == []


@pytest.mark.parametrize(
    "value", [None, 1, 2.5, "x", True, torch.Size((1, 2)), torch.float32, slice(1, 2), Kind.ONE, [1, (2, {"a": None})]]
)
def test_plain_values(value: Any) -> None:
    assert is_plain(value)


@pytest.mark.parametrize(
    "value", [A, [A], Plain(1, 2), Data(1, 2), object(), nn.ReLU()], ids=lambda v: type(v).__name__
)
def test_what_is_not_plain_may_hold_channels(value: Any) -> None:
    assert not is_plain(value)
