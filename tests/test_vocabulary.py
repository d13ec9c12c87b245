"""The names in the types are those that the tables behind them have."""

from collections.abc import Callable, Iterable
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

import fxprune
from fxprune import vocabulary
from fxprune.calibration.augmentation import AUGMENTATIONS
from fxprune.calibration.recovery import SECONDS
from fxprune.comparison.methods import METHODS as COMPARED
from fxprune.comparison.rivals import RIVALS
from fxprune.comparison.runtimes import LAYOUTS, RUNTIMES
from fxprune.criteria import CRITERIA
from fxprune.criteria.variety import VARIETIES
from fxprune.inference.runtimes import RUNTIMES as RUNTIME_NAMES
from fxprune.training.loop import AMP
from fxprune.training.recipe import SCHEDULES as RATES
from fxprune.training.schedules import SCHEDULES


@pytest.mark.parametrize(
    "names, table",
    [
        (vocabulary.CriterionName, CRITERIA),
        (vocabulary.VarietyName, VARIETIES),
        (vocabulary.AugmentName, AUGMENTATIONS),
        (vocabulary.PruningSchedule, SCHEDULES),
        (vocabulary.RateSchedule, RATES),
        (vocabulary.Amp, AMP),
        (vocabulary.Layout, LAYOUTS),
        (vocabulary.BenchRuntime, RUNTIMES),
        (vocabulary.Rival, RIVALS),
        (vocabulary.RuntimeName, RUNTIME_NAMES),
        (vocabulary.ComparedMethod, COMPARED),
    ],
)
def test_a_type_has_the_names_of_its_table(names: object, table: Iterable[str]) -> None:
    assert get_args(names) == tuple(table)


def test_a_choice_of_a_form_is_a_form_or_auto() -> None:
    assert set(get_args(vocabulary.FormChoice)) == {"auto", *get_args(vocabulary.Form)}


def test_a_choice_is_the_names_and_one_more() -> None:
    assert set(get_args(vocabulary.GranularityChoice)) == {"auto", "branch", *get_args(vocabulary.Granularity)}
    assert set(get_args(vocabulary.CriterionChoice)) == {"reconstruction", *get_args(vocabulary.CriterionName)}


def test_help_tells_how_long_recovery_takes() -> None:
    assert SECONDS == 180  # `fxprune compile --help` says three minutes without importing torch


@pytest.mark.parametrize(
    "function, argument, names",
    [
        (fxprune.compile, "granularity", vocabulary.GranularityChoice),
        (fxprune.compile, "scope", vocabulary.Scope),
        (fxprune.compile, "method", vocabulary.Method),
        (fxprune.compile, "form", vocabulary.FormChoice),
        (fxprune.compile, "target", vocabulary.Target),
        (fxprune.compile, "criterion", vocabulary.CriterionChoice),
        (fxprune.compile, "variety", vocabulary.VarietyName),
        (fxprune.compile, "output", vocabulary.Output),
        (fxprune.recover, "augment", vocabulary.AugmentName),
        (fxprune.sparsify, "schedule", vocabulary.PruningSchedule),
        (fxprune.accelerate, "runtime", vocabulary.RuntimeName),
        (fxprune.sparsify, "granularity", vocabulary.Granularity),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_type_checker_finds_a_misspelt_name(function: Callable[..., object], argument: str, names: object) -> None:
    hint = get_type_hints(function)[argument]
    kinds = (hint, *get_args(hint))
    assert any(get_origin(kind) is Literal and get_args(kind) == get_args(names) for kind in kinds)
    assert str not in kinds, "which any misspelling is"
