"""Where recovery is asked for, auto takes the division that is best once it is recovered."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

import math
from typing import Any

import pytest
import torch
from recovery_harness import Residual
from torch import Tensor, nn

import fxprune
from fxprune.calibration.agreement import Agreement
from fxprune.calibration.judging import Judge
from fxprune.calibration.recovery import Recovery
from fxprune.calibration.subject import Subject
from fxprune.exact.record import record_of
from fxprune.planning.estimates import FINALISTS, foreseen
from fxprune.planning.recovery_trials import recovered_agreements
from fxprune.planning.requests import Request
from fxprune.plans import PrunePlan


def images(count: int = 48) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual().eval()
        with torch.no_grad():  # every class is some image's
            model.head.weight.mul_(30)
            model.head.bias.sub_(model(images(256)).mean(0))
    return model


def agreement(distance: float) -> Agreement:
    return Agreement(0.9, 16, True, True, distance)


def test_the_finalists_are_recovered_for_a_tenth_and_seen_by_the_judge(net: nn.Module) -> None:
    judge = Judge(Subject(net, None, images(), "graph"))
    plans = {str(ratio): fxprune.make_plan(net, ratio) for ratio in (0.25, 0.5, 0.75, 0.9)}
    made: list[str] = []

    def way(name: str) -> Any:
        def carried_out(subject: Subject) -> tuple[PrunePlan, nn.Module | None]:
            assert subject is judge.fitted, "the held-out images take no part"
            made.append(name)
            return plans[name], None

        return carried_out

    ways = {name: way(name) for name in plans}
    refitted = {"0.25": agreement(0.3), "0.5": agreement(0.1), "0.75": agreement(0.2), "0.9": agreement(0.4)}
    found = recovered_agreements(judge, ways, {**refitted, "none": None}, Recovery(steps=40), seed=0)
    assert made == list(found) == ["0.5", "0.75", "0.25"], "the nearest first"
    assert len(found) == FINALISTS
    by_hand = fxprune.mask(net, plans["0.5"], [batch[0] for batch in judge.fitted.batches or []])
    by_hand = fxprune.recover(net, by_hand, plans["0.5"], [b[0] for b in judge.fitted.batches or []], steps=4)
    expected = judge.agreement(by_hand)
    assert expected is not None
    assert found["0.5"] is not None
    assert found["0.5"].distance == pytest.approx(expected.distance, rel=0.05)
    other = recovered_agreements(judge, ways, {"0.5": agreement(0.1)}, Recovery(steps=400), seed=0)["0.5"]
    assert other != found["0.5"], "control: how long it is recovered counts"


def test_what_is_best_after_recovery_is_taken(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"macs": 0.5, "granularity": "auto", "calibration": images(), "verify": False}
    seen: dict[str, float] = {}

    def upside_down(judge: Judge, ways: Any, refitted: Any, recovery: Recovery, seed: int) -> dict[str, Agreement]:
        """The one that the refit likes least is best."""
        seen.update({name: found.distance for name, found in refitted.items() if found is not None})
        return {name: agreement(-distance) for name, distance in seen.items()}

    monkeypatch.setattr("fxprune.planning.auto.recovered_agreements", upside_down)
    pruned = fxprune.compile(net, recover={"steps": 5}, **asked)
    last, first = max(seen, key=seen.__getitem__), min(seen, key=seen.__getitem__)
    assert last != first
    remarks = record_of(pruned).plan.remarks
    assert "after a tenth of the recovery" in remarks[0]
    assert f"{last} (taken)" in remarks[0]
    assert remarks[1].startswith("after the refit, ")
    assert f"{first} (taken)" in remarks[1]
    without = record_of(fxprune.compile(net, **asked)).plan.remarks[0]
    assert f"{first} (taken)" in without, "control: without recovery the refit decides"


def test_a_tenth() -> None:
    assert Recovery(steps=41).tenth().limits == (5, math.inf)
    assert Recovery(seconds=60, augment="flip", checkpoint="x.pt").tenth() == Recovery(seconds=6, augment="flip")
    assert Recovery().tenth().limits == (150, 18)


def test_it_is_foreseen(net: nn.Module) -> None:
    subject = Subject(net, None, images(), "graph")
    requests = (Request(macs=0.5, granularity="auto", recover=recover) for recover in (100, False))
    with_, without = (foreseen(subject, request, compiles=True) for request in requests)
    assert with_["judging"] - without["judging"] > 0.5 * FINALISTS * 10
