"""The stages of a run are told apart, and each is measured once."""

import pytest
import torch

import fxprune
from benchmarks.planning_cost import Case, Stages, measure, table


def test_stages_of_a_budget_in_their_order() -> None:
    found = measure(Case("resnet20", 32, 24, {"macs": 0.6}))
    assert list(found) == ["capture", "sensitivity", "judging", "plan", "agreement", "rewrite and verify"]
    assert all((cost["seconds"] or 0) > 0 for cost in found.values())
    (header, _, line) = table({"resnet20": found}).splitlines()
    assert header.count("|") == line.count("|")
    seconds = sum(cost["processor_seconds"] or 0 for cost in found.values())
    assert float(line.split("|")[-4]) == pytest.approx(seconds, abs=0.5)


def test_a_network_without_a_stage_has_an_empty_cell() -> None:
    costs = {"processor_seconds": 2.0, "seconds": 1.0, "peak_mb": None}
    lines = table({"a": {"plan": costs, "refit": costs}, "b": {"refit": costs}}).splitlines()
    assert lines[-2:] == ["| a | 2 | 2 | 4 | 2 |  |", "| b |  | 2 | 2 | 1 |  |"]


def test_what_a_stage_does_again_is_added() -> None:
    stages = Stages()
    for name in ("judging", "plan", "judging", ""):
        stages.begin(name)
    assert list(stages.found) == ["capture", "judging", "plan"]


def test_measuring_leaves_runs_as_they_were() -> None:
    measure(Case("resnet20", 32, 8, {"ratio": 0.5}))
    model = fxprune.models.load_model("resnet20").eval()
    fxprune.compile(model, 0.5, calibration=torch.randn(8, 3, 32, 32))
