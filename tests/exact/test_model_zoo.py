"""Models of torchvision and timm, compiled: the same function as the masked model, every eligible convolution grouped.

A few stand for the rest in every run. The others are marked `slow`, their large siblings `huge`:
`pytest -m "slow or huge" tests/exact/test_model_zoo.py`.
"""

import contextlib
import gc
import itertools
from collections.abc import Iterator

import pytest
from equality import assert_same_function, masked_by_hand
from models import ENTRIES, Entry, build, eligible, inputs

import fxprune
from fxprune.vocabulary import FormChoice

RATIOS = (0.5, 0.75)
FORMS = ("partition", "overlap")


def runs() -> Iterator[object]:
    for entry, (ratio, form) in itertools.product(ENTRIES, itertools.product(RATIOS, FORMS)):
        first = (ratio, form) == (RATIOS[0], FORMS[0])
        if entry.huge and not first:
            continue  # too dear; their siblings run in every combination
        marks = [pytest.mark.huge] if entry.huge else [] if entry.first and first else [pytest.mark.slow]
        yield pytest.param(entry, ratio, form, marks=marks, id=f"{entry}-{ratio}-{form}")


@pytest.fixture(autouse=True)
def memory_returned() -> Iterator[None]:
    """Graphs are cycles; a model of several GB must not wait for the next collection."""
    yield
    gc.collect()


@pytest.mark.parametrize("entry, ratio, form", list(runs()))
def test_same_function_and_all_eligible_convolutions_grouped(entry: Entry, ratio: float, form: FormChoice) -> None:
    if entry.source == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
    example = inputs(entry)
    model = build(entry)
    plan = fxprune.make_plan(model, ratio, form=form, example_inputs=example)
    assert set(plan.layers) == eligible(model, ratio, form, entry.dense)
    masked = masked_by_hand(model, plan)
    del model
    # Some transformers have no convolution but their patch embedding. They come through unchanged, and it is said.
    nothing = contextlib.nullcontext() if plan.layers else pytest.warns(fxprune.NothingRewrittenWarning)
    with nothing:
        pruned = fxprune.rewrite(masked, plan, example)
    assert_same_function(pruned, masked, example, entry.modes)
