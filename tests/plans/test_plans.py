"""GroupedKernels and PrunePlan: validation, constancy, JSON, and the check against a model."""

import copy
import dataclasses
import json
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from products_harness import examples
from torch import nn

from fxprune.errors import PlanError
from fxprune.plans import GroupedKernels, PrunePlan, RemovedChannels
from fxprune.plans.fields import check_divisible, check_ratio
from fxprune.plans.plan import channels_of

GOOD: dict[str, Any] = {"out_order": (0, 2, 1, 3), "kept": ((0, 1), (2, 3)), "in_channels": 4, "asked_ratio": 0.5}


def kernels(**changes: Any) -> GroupedKernels:
    return GroupedKernels(**GOOD | changes)


def plan(**changes: Any) -> PrunePlan:
    fields: dict[str, Any] = {
        "layers": {"conv": kernels()},
        "skipped": {"stem": "too few input channels (3 < 16)"},
        "ratio": {"conv": 0.5},
        "method": "cocluster",
        "criterion": "l2",
        "seed": 3,
    }
    return PrunePlan(**fields | changes)


@st.composite
def grouped_kernels(draw: st.DrawFn) -> GroupedKernels:
    groups, width, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 8))
    block, count = draw(st.integers(1, 3)), draw(st.integers(1, blocks))
    order = draw(st.permutations(range(groups * width)))
    rows = [sorted(draw(st.permutations(range(blocks)))[:count]) for _ in range(groups)]
    kept = tuple(tuple(block * b + i for b in row for i in range(block)) for row in rows)
    ratio, cost = draw(st.floats(0, 1, exclude_max=True)), draw(st.none() | st.floats(0, 1))
    return GroupedKernels(tuple(order), kept, blocks * block, ratio, None, block, cost)


ratios = st.floats(0, 1, exclude_max=True)
plans = st.builds(
    PrunePlan,
    layers=st.dictionaries(st.text("ab.0", min_size=1), grouped_kernels(), max_size=3),
    skipped=st.dictionaries(st.text("xy.1", min_size=1).map("s{}".format), st.text(), max_size=3),
    ratio=ratios | st.dictionaries(st.text(), ratios, max_size=3),
    method=st.text(),
    criterion=st.text(),
    seed=st.integers(0),
)


def test_properties_of_the_partition_form() -> None:
    k = kernels()
    assert (k.groups, k.out_channels, k.group_width, k.kept_channels, k.ratio, k.form) == (2, 4, 2, 2, 0.5, "partition")


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(((0, 1), (1, 2)), id="shared channel"),
        pytest.param(((0,), (2,)), id="channels that nobody reads"),
        pytest.param(((0, 1, 2, 3), (0, 1, 2, 3)), id="nothing removed"),
    ],
)
def test_every_other_kept_set_is_overlap(kept: tuple[tuple[int, ...], ...]) -> None:
    assert kernels(kept=kept).form == "overlap"


def test_mask_marks_the_kernels_that_stay() -> None:
    # filters 0 and 2 keep channels 0 and 1; filters 1 and 3 keep channels 2 and 3
    expected = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(kernels().mask(), expected)


@given(grouped_kernels())
@examples(50)
def test_mask_agrees_with_the_definition(k: GroupedKernels) -> None:
    mask = k.mask()
    for position, filter_ in enumerate(k.out_order):
        assert mask[filter_].nonzero().flatten().tolist() == list(k.kept[position // k.group_width])


def test_lists_become_tuples() -> None:
    k = kernels(out_order=[0, 2, 1, 3], kept=[[0, 1], [2, 3]])
    assert k == kernels()
    assert isinstance(k.out_order, tuple)
    assert isinstance(k.kept[0], tuple)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out_order": (0, 1, 1, 3)}, "filter 1 occurs 2 times; it must hold each of 0..3 once"),
        ({"out_order": (0, 1, 2, 4)}, "filter 3 occurs 0 times"),
        ({"out_order": ()}, "out_order is empty"),
        ({"out_order": (0, 1, 2.0, 3)}, "an entry of out_order is 2.0; it must be an integer"),
        ({"out_order": (False, True, 2, 3)}, "an entry of out_order is False"),
        ({"out_order": "0123"}, "out_order is '0123'; it must be a list of integers"),
        ({"out_order": None}, "out_order is None"),
        ({"kept": ((0, 1), (2, 3), (0, 1))}, "4 filters do not divide into 3 groups; use a divisor of 4, such as 2"),
        ({"kept": ()}, "4 filters do not divide into 0 groups; use a divisor of 4, such as 1"),
        ({"kept": 7}, "kept is 7; it must hold one list of input channels for each group"),
        ({"kept": ((0, 1), ())}, "group 1 keeps no channel"),
        ({"kept": ((0, 1), (2,))}, "group 1 keeps 1 channels but group 0 keeps 2"),
        ({"kept": ((0, 1), (3, 2))}, "the channels of group 1 are not strictly ascending"),
        ({"kept": ((0, 1), (2, 2))}, "the channels of group 1 are not strictly ascending"),
        ({"kept": ((0, 1), (2, 4))}, "group 1 keeps channel 4, which is outside 0..3"),
        ({"kept": ((-1, 1), (2, 3))}, "group 0 keeps channel -1, which is outside 0..3"),
        ({"in_channels": 0}, "in_channels is 0; it must be a positive integer"),
        ({"in_channels": "4"}, "in_channels is '4'; it must be a positive integer"),
        ({"asked_ratio": 1.0}, "ratio 1.0 is not in [0, 1)"),
        ({"asked_ratio": float("nan")}, "ratio nan is not in [0, 1)"),
    ],
)
def test_invalid_kernels_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        kernels(**changes)


def test_kernels_and_plans_cannot_be_changed() -> None:
    p = plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.layers["conv"].in_channels = 5  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.seed = 1  # type: ignore[misc]
    for mapping in (p.layers, p.skipped, p.ratio):
        with pytest.raises(TypeError):
            mapping["other"] = None  # type: ignore[index]


def test_a_plan_does_not_follow_the_mapping_it_was_made_from() -> None:
    layers = {"conv": kernels()}
    p = PrunePlan(layers)
    layers.clear()
    assert list(p.layers) == ["conv"]


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_are_equal_and_still_constant(duplicate: Any) -> None:
    p = plan()
    other = duplicate(p)
    assert other == p  # what cannot change may be its own copy
    with pytest.raises(TypeError):
        other.layers["x"] = kernels()


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": {"conv": kernels(kept=((0, 1), (1, 3)))}},
        {"skipped": {}},
        {"ratio": 0.5},
        {"method": "m"},
        {"criterion": "l1"},
        {"seed": 4},
    ],
    ids=lambda c: next(iter(c)),
)
def test_plans_that_differ_in_one_field_differ(changes: dict[str, Any]) -> None:
    assert plan(**changes) != plan()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": []}, "layers is a list; it must map module names to GroupedKernels"),
        ({"layers": {"conv": 1}}, "layers: 'conv' maps to a int; it must map names to GroupedKernels"),
        ({"layers": {1: kernels()}}, "layers: 1 maps to a GroupedKernels; it must map names"),
        ({"skipped": {"conv2": None}}, "skipped: 'conv2' maps to a NoneType"),
        ({"skipped": {"conv": "why"}}, "conv: the layer is both planned and skipped"),
        ({"ratio": 1.5}, "ratio 1.5 is not in [0, 1): it is the share of kernel groups to remove"),
        ({"ratio": "0.5"}, "ratio is '0.5'; it must be a number in [0, 1)"),
        ({"ratio": True}, "ratio is True"),
        ({"ratio": {"layer1": -0.1}}, "layer1: ratio -0.1 is not in [0, 1)"),
        ({"ratio": {1: 0.5}}, "ratio: 1 is not a string"),
        ({"method": None}, "method is None; it must be a string"),
        ({"criterion": 2}, "criterion is 2; it must be a string"),
        ({"seed": 0.5}, "seed is 0.5; it must be an integer"),
    ],
)
def test_invalid_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        plan(**changes)


@given(plans)
@examples(50)
def test_json_gives_the_plan_back(p: PrunePlan) -> None:
    assert PrunePlan.from_json(p.to_json()) == p


def test_json_is_labelled() -> None:
    data = json.loads(plan().to_json())
    assert (data["format"], data["version"]) == ("fxprune-plan", 1)


def altered(**changes: Any) -> str:
    data = json.loads(plan().to_json()) | changes
    return json.dumps({key: value for key, value in data.items() if value != "remove"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the text of the plan is not JSON"),
        (plan().to_json()[:-5], "the text of the plan is not JSON"),
        ("[" * 100_000, "the text of the plan is not JSON"),
        ("[]", 'the JSON is not a plan: it must be an object with "format": "fxprune-plan"'),
        ("{}", "the JSON is not a plan"),
        (altered(format="other"), "the JSON is not a plan"),
        (altered(version=2), "the plan has version 2, but only 1 can be read; make the plan again"),
        (altered(version="remove"), "the plan has version None"),
        (altered(seed="remove"), "the field 'seed' is missing"),
        (altered(extra=1), "the field 'extra' is unknown"),
        (altered(layers=[]), "layers is not a JSON object"),
        (altered(layers={"conv": []}), "conv: expected a JSON object with the fields out_order, kept"),
        (altered(layers={"conv": {"kept": []}}), "conv: the field 'out_order' is missing"),
        (altered(layers={"conv": GOOD | {"in_channels": 3}}), "conv: group 1 keeps channel 3, which is outside 0..2"),
        (altered(ratio=float("nan")), "ratio nan is not in [0, 1)"),
    ],
)
def test_foreign_or_damaged_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        PrunePlan.from_json(text)


class Net(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.again = conv


def test_check_accepts_the_model_of_the_plan() -> None:
    model = Net(nn.Conv2d(4, 4, 3))
    plan().check(model)
    plan(layers={"again": kernels()}).check(model)  # any name of a shared module will do


@pytest.mark.parametrize(
    "layer, conv, message",
    [
        ("convv", nn.Conv2d(4, 4, 3), "convv: Net has no module of this name (near: 'conv'); make a plan"),
        ("conv", nn.Linear(4, 4), "conv: the plan prunes a convolution, the model has a Linear"),
        ("conv", nn.Conv2d(4, 4, 3, groups=2), "conv: the convolution already has groups=2, but only groups=1"),
        ("conv", nn.Conv2d(8, 4, 3), "conv: the plan is for 4 filters of 4 channels, but the convolution has 4 of 8"),
        ("conv", nn.Conv2d(4, 2, 3), "conv: the plan is for 4 filters of 4 channels, but the convolution has 2 of 4"),
    ],
)
def test_check_refuses_another_model(layer: str, conv: nn.Module, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        plan(layers={layer: kernels()}).check(Net(conv))


def test_text_lists_every_layer_with_its_outcome() -> None:
    lines = str(plan()).splitlines()
    assert lines[0] == "1 convolutions lose kernels; 1 stay dense"
    assert re.fullmatch(r"conv +partition +2 x 2 +2/4 +0\.5000 \(0\.5\)", lines[3])
    assert re.fullmatch(r"stem +dense +too few input channels \(3 < 16\)", lines[4])
    assert str(PrunePlan({})) == "nothing to prune"
    branches = PrunePlan({}, branches={"block.bn2": ("block.conv1", "block.bn2")}, skipped={"stem": "too few"})
    assert branches.brief() == "1 residual branches go; 1 stay dense"


@pytest.mark.parametrize(
    "filters, groups, ways",
    [(64, 6, "4 or 8"), (64, 100, "64"), (64, 0, "1"), (64, -2, "1"), (7, 2, "1 or 7"), (12, 5, "4 or 6")],
)
def test_indivisible_filters_name_the_nearest_divisors(filters: int, groups: int, ways: str) -> None:
    with pytest.raises(PlanError, match=f"use a divisor of {filters}, such as {ways}$"):
        check_divisible(filters, groups)


@pytest.mark.parametrize("ratio", [0, 0.0, 0.5, 0.999])
def test_ratios_in_range_are_returned_as_floats(ratio: float) -> None:
    checked = check_ratio(ratio)
    assert checked == ratio
    assert isinstance(checked, float)


# --- whole channels -------------------------------------------------------------------------------------------------

REMOVED = {
    "0": RemovedChannels(outputs=(0, 3), asked_ratio=0.5, redundancy=0.25),
    "1": RemovedChannels((0, 3)),
    "2": RemovedChannels(inputs=(0, 3)),
}


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def test_removed_channels_survive_json_copies_and_pickle() -> None:
    removing = plan(layers={}, skipped={}, removed=REMOVED)
    for same in (
        PrunePlan.from_json(removing.to_json()),
        copy.deepcopy(removing),
        pickle.loads(pickle.dumps(removing)),
    ):
        assert same == removing
        assert dict(same.removed) == REMOVED
    assert removing != plan(layers={}, skipped={})
    removing.check(chain())


def test_a_plan_of_an_earlier_version_removes_nothing() -> None:
    data = json.loads(plan().to_json())
    del data["removed"]
    assert PrunePlan.from_json(json.dumps(data)) == plan()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"outputs": (1, 0)}, "outputs is not strictly ascending from 0 on"),
        ({"outputs": (1, 1)}, "outputs is not strictly ascending from 0 on"),
        ({"inputs": (-1, 0)}, "inputs is not strictly ascending from 0 on"),
        ({"inputs": (0.5,)}, "an entry of inputs is 0.5; it must be an integer"),
        ({"outputs": "01"}, "outputs is '01'; it must be a list of integers"),
        ({"asked_ratio": 1.0}, "ratio 1.0 is not in [0, 1)"),
        ({"redundancy": 2}, "redundancy is 2; it must be a number in [0, 1]"),
    ],
)
def test_invalid_removed_channels(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        RemovedChannels(**fields)


@pytest.mark.parametrize(
    "removed, message",
    [
        ({"3": RemovedChannels((0,))}, "3: Sequential has nothing of this name"),
        ({"0": RemovedChannels((4,))}, "0: the plan removes output 4, but there are 4"),
        ({"0": RemovedChannels((0, 1, 2, 3))}, "0: the plan removes all 4 outputs; keep at least one"),
        ({"2": RemovedChannels(inputs=(0, 1, 2, 3))}, "2: the plan removes all 4 inputs; keep at least one"),
        ({"1": RemovedChannels(inputs=(0,))}, "1: the plan removes input 0, but there are 0"),
        ({"0.bias": RemovedChannels((9,))}, "0.bias: the plan removes output 9, but there are 4"),
    ],
)
def test_removed_channels_of_another_model(removed: dict[str, RemovedChannels], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        PrunePlan({}, removed=removed).check(chain())


def test_kernels_are_planned_for_the_layer_without_its_removed_channels() -> None:
    smaller = {"2": RemovedChannels(outputs=(0, 1), inputs=(2, 3, 4))}
    PrunePlan({"2": kernels()}, removed=smaller).check(nn.Sequential(*chain()[:2], nn.Conv2d(7, 6, 1)))
    with pytest.raises(PlanError, match="2: the plan is for 6 filters of 7 channels, but the convolution has 2 of 4"):
        PrunePlan({"2": kernels()}, removed=smaller).check(chain())


@pytest.mark.parametrize(
    "module, channels",
    [
        (nn.Conv2d(4, 6, 1), (6, 4)),
        (nn.ConvTranspose2d(4, 6, 1), (6, 4)),
        (nn.Linear(4, 6), (6, 4)),
        (nn.BatchNorm2d(6), (6, 0)),
        (nn.BatchNorm2d(6, affine=False), (6, 0)),
        (nn.PReLU(6), (6, 0)),
        (nn.ReLU(), (0, 0)),
    ],
)
def test_channels_of_modules(module: nn.Module, channels: tuple[int, int]) -> None:
    assert channels_of(module) == channels
