"""What `ignore=` takes: names, patterns, modules, types; and what it says of layers that nobody prunes."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, PlanError
from fxprune.planning.hints import ELSEWHERE
from fxprune.planning.requests import Request


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))


def network() -> nn.Module:
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(16, 16, 3, padding=1))
    model.add_module("first", Block())
    model.add_module("second", Block())
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("fc", nn.Linear(16, 4))
    return model


X = torch.randn(2, 16, 8, 8)


def pruned(model: nn.Module, ignore: Any) -> set[str]:
    return set(fxprune.make_plan(model, example_inputs=X, ignore=ignore).layers)


ALL = {"stem", "first.0", "first.2", "second.0", "second.2"}


@pytest.mark.parametrize(
    "of, stay",
    [
        (lambda model: (), set()),
        (lambda model: "first", {"first.0", "first.2"}),
        (lambda model: ["first.*", "stem"], {"stem", "first.0", "first.2"}),
        (lambda model: model.second, {"second.0", "second.2"}),
        (lambda model: [model.first[2], "stem"], {"stem", "first.2"}),
        (lambda model: Block, {"first.0", "first.2", "second.0", "second.2"}),
        (lambda model: (Block, model.stem), ALL),
    ],
    ids=["nothing", "a name", "patterns", "a module", "mixed", "a type", "all"],
)
def test_names_patterns_modules_and_types(of: Callable[[Any], Any], stay: set[str]) -> None:
    model = network()
    if stay == ALL:
        assert fxprune.make_plan(model, example_inputs=X, ignore=of(model)).layers == {}
    else:
        assert pruned(model, of(model)) == ALL - stay


@pytest.mark.parametrize(
    "ignore, message",
    [
        (("fc",), "'fc' is a Linear and holds no convolution"),
        ("pool", "'pool' is a AdaptiveAvgPool2d and holds no convolution"),
        (nn.Linear, "'fc' is a Linear"),
        (nn.LSTM, "'LSTM' is the type of no module here"),
    ],
)
def test_layers_of_other_kinds_are_a_warning(ignore: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        assert pruned(network(), ignore) == ALL


def test_control_what_is_a_convolution_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pruned(network(), ("first.0",)) == ALL - {"first.0"}


def test_filters_are_left_alone_too() -> None:
    model = network()
    report = fxprune.report(
        fxprune.compile(model, granularity="filter", example_inputs=X, ignore=[model.get_submodule("first"), "stem"])
    )
    narrow = {layer.name for layer in report.layers if (layer.filters or 0) < (layer.filters_dense or 0)}
    assert narrow
    assert narrow <= {"second.0", "second.2"}


def test_sparsify_takes_them() -> None:
    model = network()
    sparsifier = fxprune.sparsify(model, "one-shot", steps=1, ratio=0.5, ignore=[Block], example_inputs=X)
    sparsifier.step()
    assert set(sparsifier.plan.layers) == {"stem"}


@pytest.mark.parametrize(
    "ignore, message",
    [
        (("fist",), r"pattern 'fist' matches no convolution of the model \(near: 'first'"),
        (nn.Conv2d(1, 1, 1), "this Conv2d is no module inside the model"),
        (3, "ignore is 3"),
        ([3], "3 is no name"),
        ([torch.Tensor], "is no name"),
    ],
)
def test_what_is_neither_is_refused(ignore: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        pruned(network(), ignore)


def test_the_model_itself_is_refused() -> None:
    model = network()
    with pytest.raises(PlanError, match="this Sequential is no module inside the model"):
        pruned(model, model)


# --- arguments of other pruners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [fxprune.compile, fxprune.make_plan])
@pytest.mark.parametrize(
    "name, hint",
    [
        ("pruning_ratio", r"there is no argument 'pruning_ratio'; here it is ratio="),
        ("ignored_layers", r"here it is ignore=, which takes names, modules and types"),
        ("granularty", r"there is no argument 'granularty' \(near: 'granularity'"),
    ],
)
def test_arguments_of_other_pruners_get_a_hint(function: Callable[..., Any], name: str, hint: str) -> None:
    with pytest.raises(ArgumentError, match=hint):
        function(network(), **{name: 0.5})


def test_sparsify_says_so_too() -> None:
    with pytest.raises(TypeError, match="here it is ratio="):
        fxprune.sparsify(network(), steps=1, ch_sparsity=0.5)


def test_no_hint_is_for_an_argument_that_there_is() -> None:
    assert set(Request.__dataclass_fields__) & ELSEWHERE.keys() == set()


def test_inputs_in_the_place_of_the_ratio_are_told() -> None:
    with pytest.raises(PlanError, match=r"ratio is a Tensor \(inputs of the model are given by name: example_inputs="):
        fxprune.compile(network(), X)  # type: ignore[arg-type]
