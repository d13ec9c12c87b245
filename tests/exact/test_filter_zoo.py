"""Models of torchvision and timm without half of their filters: the same function as with these filters at zero.

One stands for the rest in every run; the others are marked `slow`, their large siblings `huge`.
"""

import gc
import re
from collections.abc import Iterator

import pytest
from equality import assert_same_function
from models import ENTRIES, Entry, build, inputs
from removal_harness import zeroed
from torch import nn

import fxprune
from fxprune.plans import RemovedChannels

FAST = {"torchvision:squeezenet1_1"}

# Why the filters of a convolution may stay; the names are those of nodes and layers.
REASONS = re.compile(
    r"model output"
    r"|\S+ is a grouped convolution, whose groups have a fixed size"
    r"|\S+ \((LayerNorm2d|LayerNorm|GroupNorm)\) may compute from several channels at once"
    r"|no rule for \S*attention\S*"
    r"|the traced graph never calls it"
)
# Where all filters stay: every one reaches the attention of a transformer.
WHOLE = ("swin",)
# Whose grouped convolutions, and what is tied to them, stay.
GROUPED = ("regnet", "resnext")
# No convolutional networks.
TRANSFORMERS = ("vit", "maxvit")


def runs() -> Iterator[object]:
    for entry in ENTRIES:
        if entry.source != "timm" and not entry.name.startswith(TRANSFORMERS):
            mark = [pytest.mark.huge] if entry.huge else [] if str(entry) in FAST else [pytest.mark.slow]
            yield pytest.param(entry, marks=mark, id=str(entry))


@pytest.fixture(autouse=True)
def memory_returned() -> Iterator[None]:
    """Graphs are cycles; a model of several GB must not wait for the next collection."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::fxprune.NothingRewrittenWarning")
@pytest.mark.parametrize("entry", list(runs()))
def test_same_function_without_half_of_the_filters(entry: Entry) -> None:
    example, model = inputs(entry), build(entry)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # of a batch of two it may drop both samples, which leaves nothing to compare
    plan = fxprune.make_plan(model, 0.5, granularity="filter", example_inputs=example)
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    plain = [name for name, conv in convs.items() if conv.groups == 1]
    cut = [name for name in plain if plan.removed.get(name, RemovedChannels()).outputs]
    for name, reason in plan.skipped.items():
        assert REASONS.fullmatch(reason), f"{name}: {reason}"
    assert len(cut) + sum(name in plan.skipped for name in plain) == len(plain), "each is cut, or says why not"
    if entry.name.startswith(WHOLE):
        assert not cut
    elif entry.name.startswith(GROUPED):
        assert len(cut) >= 0.5 * len(plain)
    else:
        assert len(cut) >= 0.85 * len(plain)
    masked = zeroed(model, plan)
    del model
    pruned = fxprune.rewrite(masked, plan, example)
    if not entry.name.startswith((*WHOLE, *GROUPED)):
        report = fxprune.report(pruned)
        assert report.macs_pruned is not None
        assert report.macs_dense is not None
        assert report.macs_pruned < 0.55 * report.macs_dense
    assert_same_function(pruned, masked, example, entry.modes)
