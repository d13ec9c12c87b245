"""Equal arguments give the plans that release 0.1 gave; `recorded_plans_harness` tells how these were recorded."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from products_harness import fewer
from recorded_plans_harness import CALIBRATED, LARGE, NETS, TINY, digest, net, planned, recorded, summary

from fxprune import PrunePlan

model_of = cache(net)  # which planning only reads

# Each large net by default in two requests that together remove kernels and filters.
BY_DEFAULT = ("default", "filters")


def assert_equal_plans(ours: Any, theirs: Any, where: str = "") -> None:
    """See that the JSON of two plans is equal, but for the last digits of what is no integer."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key, value in theirs.items():
            assert_equal_plans(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("request_", TINY)
def test_a_tiny_net_is_planned_as_before(request_: str) -> None:
    before = recorded("tiny")[request_]
    ours = planned(model_of("tiny"), "tiny", request_)
    assert_equal_plans(ours, before)
    assert digest(ours) == digest(before)
    PrunePlan.from_json(json.dumps(before)).check(model_of("tiny"))


@pytest.mark.parametrize("request_", CALIBRATED)
def test_with_data_as_much_stays_as_before(request_: str) -> None:
    assert summary(planned(model_of("tiny"), "tiny", request_)) == recorded("tiny")[request_]["layers"]


@pytest.mark.parametrize("request_", fewer(LARGE, BY_DEFAULT))
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_large_net_is_planned_as_before(name: str, request_: str) -> None:
    before = recorded(name)[request_]
    ours = planned(model_of(name), name, request_)
    assert summary(ours) == before["layers"]
    assert digest(ours) == before["digest"]


def test_every_request_is_recorded_and_its_plan_is_one_of_its_own() -> None:
    for name, requests in NETS.items():
        record = recorded(name)
        assert list(record) == list(requests)
        if name == "tiny":
            digests = [digest(record[request]) for request in TINY]
        else:
            digests = [entry["digest"] for entry in record.values()]
        assert len(set(digests)) == len(digests)
        assert all(entry["layers"] or entry["removed"] for entry in record.values())


# --- would a change be seen? ----------------------------------------------------------------------------------------


def test_control_another_weight_or_argument_gives_another_plan() -> None:
    before = recorded("tiny")["default"]
    changed = net("tiny")
    weight = changed.get_parameter("second.weight")
    with torch.no_grad():
        weight[0] = weight[1]
    for model, request in ((changed, "default"), (model_of("tiny"), "seed"), (model_of("tiny"), "overlap")):
        ours = planned(model, "tiny", request)
        assert digest(ours) != digest(before)
        with pytest.raises(AssertionError):
            assert_equal_plans(ours, before)


def test_control_every_part_of_a_plan_counts() -> None:
    before = recorded("tiny")["both"]
    layer = next(iter(before["layers"]))
    cut = next(name for name, gone in before["removed"].items() if gone["outputs"])

    def swapped(channels: list[int]) -> list[int]:
        return [channels[1], channels[0], *channels[2:]]

    changes = {
        "order": {"layers": {layer: {"out_order": swapped(before["layers"][layer]["out_order"])}}},
        "kept": {"layers": {layer: {"kept": before["layers"][layer]["kept"][::-1]}}},
        "outputs": {"removed": {cut: {"outputs": before["removed"][cut]["outputs"][1:]}}},
        "method": {"method": "reconstruction"},
        "skipped": {"skipped": {"head": "no reason"}},
    }
    for name, change in changes.items():
        altered = merged(before, change)
        assert digest(altered) != digest(before), name
        with pytest.raises(AssertionError):
            assert_equal_plans(altered, before)
    rounded = merged(before, {"layers": {layer: {"asked_ratio": before["layers"][layer]["asked_ratio"] + 1e-12}}})
    assert digest(rounded) == digest(before)
    assert_equal_plans(rounded, before)


def merged(before: Any, change: Any) -> Any:
    if not isinstance(before, dict) or not isinstance(change, dict):
        return change
    return before | {key: merged(before.get(key), value) for key, value in change.items()}
