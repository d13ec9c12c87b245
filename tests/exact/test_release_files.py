"""Plans and compiled models that release 0.1 wrote: read by today's code, they compute what they did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import assert_same_function, masked_by_hand, randomize
from release_files_harness import FILES, MODEL, OUTPUTS, PLANS, Small, file_of, image, small
from torch import Tensor

import fxprune
from fxprune import PlanError, PrunePlan
from fxprune.errors import StorageError
from fxprune.exact.record import record_of
from fxprune.plans import GroupedKernels

LAST = "filters and kernels"  # whose model was saved
each_plan = pytest.mark.parametrize("name", PLANS)


def plan_text(name: str) -> str:
    return (FILES / file_of(name)).read_text()


def outputs_of(name: str) -> Tensor:
    return torch.tensor(json.loads((FILES / OUTPUTS).read_text())[name])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- plans ----------------------------------------------------------------------------------------------------------


@each_plan
def test_a_plan_is_read_and_written_as_it_was(name: str) -> None:
    plan = PrunePlan.from_json(plan_text(name))
    assert json.loads(plan.to_json()) == json.loads(plan_text(name))
    assert all(isinstance(kernels, GroupedKernels) for kernels in plan.layers.values())
    assert set(plan.layers) == {"first", "second"}
    assert bool(plan.removed) == (name == LAST)
    plan.check(small())


@each_plan
def test_a_network_rewritten_by_it_computes_what_it_did(name: str) -> None:
    plan = PrunePlan.from_json(plan_text(name))
    pruned = fxprune.rewrite(fxprune.mask(small(), plan), plan, image())
    assert_close(pruned(image()), outputs_of(name))
    other = next(n for n in PLANS if n != name)
    with pytest.raises(AssertionError):  # control: the outputs tell the plans apart
        assert_close(pruned(image()), outputs_of(other))


def test_it_is_exact_today() -> None:
    plan = PrunePlan.from_json(plan_text("kernels"))
    model = randomize(small().double())
    masked = masked_by_hand(model, plan)
    assert_same_function(fxprune.rewrite(masked, plan, image().double()), masked, (image().double(),))


def altered(change: str) -> str:
    data: dict[str, Any] = json.loads(plan_text("kernels"))
    kernels = data["layers"]["first"]
    if change == "version":
        data["version"] += 1
    elif change == "a filter twice":
        kernels["out_order"][0] = kernels["out_order"][1]
    elif change == "a channel too many":
        kernels["kept"][0][-1] = kernels["in_channels"]
    elif change == "a torn block":
        kernels["kept"][0] = list(range(1, 1 + len(kernels["kept"][0])))
    elif change == "an unknown field":
        kernels["colour"] = "red"
    elif change == "a missing field":
        del kernels["kept"]
    return json.dumps(data)


@pytest.mark.parametrize(
    "change",
    ["version", "a filter twice", "a channel too many", "a torn block", "an unknown field", "a missing field"],
)
def test_an_altered_plan_is_refused(change: str) -> None:
    assert PrunePlan.from_json(altered("nothing")) == PrunePlan.from_json(plan_text("kernels"))
    with pytest.raises(PlanError):
        PrunePlan.from_json(altered(change))


def test_a_truncated_plan_is_refused() -> None:
    with pytest.raises(PlanError, match="not JSON"):
        PrunePlan.from_json(plan_text("kernels")[:-10])


# --- a compiled model -----------------------------------------------------------------------------------------------


def test_a_saved_model_computes_what_it_did() -> None:
    loaded = fxprune.load(FILES / MODEL, Small().eval())  # whose own weights do not matter
    assert_close(loaded(image()), outputs_of(LAST))
    assert record_of(loaded).plan == PrunePlan.from_json(plan_text(LAST))
    assert fxprune.report(loaded).params_pruned < fxprune.report(loaded).params_dense


def test_it_is_saved_again_as_it_was(tmp_path: Path) -> None:
    fxprune.save(fxprune.load(FILES / MODEL, Small().eval()), tmp_path / MODEL)
    before, after = (torch.load(folder / MODEL, weights_only=True) for folder in (FILES, tmp_path))
    assert list(after) == list(before)
    assert json.loads(after["header"]) == json.loads(before["header"])
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())


@pytest.mark.parametrize("part", ["header", "state", "digest"])
def test_an_altered_model_is_refused(part: str, tmp_path: Path) -> None:
    content = torch.load(FILES / MODEL, weights_only=True)
    torch.save(content, tmp_path / MODEL)
    assert_close(fxprune.load(tmp_path / MODEL, Small().eval())(image()), outputs_of(LAST))
    if part == "state":
        content["state"]["head.bias"][0] += 1
    elif part == "header":
        content["header"] = content["header"].replace('"seed', '"sead')
    else:
        content["digest"] = content["digest"][::-1]
    torch.save(content, tmp_path / MODEL)
    with pytest.raises(StorageError, match="altered"):
        fxprune.load(tmp_path / MODEL, Small().eval())


def test_damaged_bytes_are_refused(tmp_path: Path) -> None:
    content = (FILES / MODEL).read_bytes()
    for damaged in (content[:-100], content[: len(content) // 2], b"", content.replace(b"first", b"worst")):
        (tmp_path / MODEL).write_bytes(damaged)
        with pytest.raises(StorageError):
            fxprune.load(tmp_path / MODEL, Small().eval())


def test_another_architecture_is_refused() -> None:
    wider = Small().eval()
    wider.second = torch.nn.Conv2d(24, 24, 3, padding=1)
    with pytest.raises(StorageError):
        fxprune.load(FILES / MODEL, wider)
