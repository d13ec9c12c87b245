"""A long run says beforehand what it consists of, and shows one bar."""

import logging

import pytest
import torch
from torch import nn

import fxprune
import fxprune.planning.estimates
from fxprune.calibration.stages import LONG, Run
from fxprune.calibration.subject import Subject
from fxprune.planning.estimates import foreseen, foreseen_refit
from fxprune.planning.requests import Request


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1)
    ).eval()


IMAGES = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))
ASKED = {
    "ratio": {"ratio": 0.5},
    "budget": {"macs": 0.6},
    "filters": {"macs": 0.6, "granularity": "filter"},
    "auto": {"macs": 0.6, "granularity": "auto"},
}


@pytest.mark.parametrize("asked", ASKED)
def test_every_stage_that_comes_was_foreseen_and_passes_once(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    begin = Run.begin

    def noted(run: Run, stage: str, passes: int = 1) -> None:
        begun.append(stage)
        begin(run, stage, passes)

    foreseen_by: list[dict[str, float]] = []
    announce = Subject.announce

    def told(subject: Subject, seconds: dict[str, float], progress: bool) -> None:
        foreseen_by.append(dict(seconds))
        announce(subject, seconds, progress)

    monkeypatch.setattr(Run, "begin", noted)
    monkeypatch.setattr(Subject, "announce", told)
    fxprune.compile(net(), calibration=IMAGES, **ASKED[asked])  # type: ignore[arg-type]
    (seconds,) = foreseen_by
    assert all(value > 0 for value in seconds.values())
    assert set(begun) <= set(seconds)
    assert len(set(begun)) > 1  # ways to spend a budget that are all the same need no judge
    assert begun[-1] == "agreement"


def test_one_bar_reaches_its_end_with_the_stages_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    fxprune.compile(net(), macs=0.6, calibration=IMAGES, progress=True)
    shown = capsys.readouterr().err
    assert shown.startswith("about ")
    line = shown.splitlines()[0]
    assert [line.index(stage) for stage in ("sensitivity", "judging", "plan", "agreement")] == sorted(
        line.index(stage) for stage in ("sensitivity", "judging", "plan", "agreement")
    )
    assert "100%" in shown
    assert "calibrating" not in shown  # the bar of a single pass
    fxprune.compile(net(), macs=0.6, calibration=IMAGES)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("slower, said", [(1e9, True), (1e-9, False)])
def test_only_what_takes_long_is_announced_unasked(
    slower: float, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fxprune.planning.estimates, "SLOWER", slower)
    with caplog.at_level(logging.INFO, "fxprune"):
        fxprune.make_plan(net(), 0.5, calibration=IMAGES)
    told = [record for record in caplog.records if record.getMessage().startswith("fxprune: about ")]
    assert bool(told) is said
    assert all(record.levelno == logging.WARNING for record in told), "else it is seen only where logging is set up"


def test_the_bar_never_goes_back_and_a_stage_ends_where_the_next_begins() -> None:
    run = Run({"one": 10.0, "two": 30.0}, progress=False)
    places = []
    run._bar.update = lambda seconds: places.append(seconds)
    run._bar.n = 0
    run.begin("one", passes=2)
    run.advance(0.5)
    assert places == [0, pytest.approx(2.5)]
    run._bar.n = 2.5
    for _ in range(3):
        run.advance(1.0)
    assert max(places) <= 10 - 2.5
    run.begin("two")
    assert places[-1] == 7.5
    run._bar.n = 10
    run.begin("one")
    assert places[-1] == 0
    run.begin("unforeseen")
    run.advance(1.0)
    assert places[-1] == 0


def test_more_images_a_larger_network_and_more_plans_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.planning.estimates, "_speed", lambda: 1e9)
    few, many = (Subject(net(), None, IMAGES[:count], "auto") for count in (8, 40))

    def total(subject: Subject, **asked: object) -> float:
        return sum(foreseen(subject, Request(**asked)).values())  # type: ignore[arg-type]

    assert total(many, ratio=0.5) > 2 * total(few, ratio=0.5)
    assert total(many, macs=0.5) > total(many, ratio=0.5)
    assert total(many, macs=0.5, granularity="auto") > total(many, macs=0.5)
    assert set(foreseen_refit(many)) == {"refit", "agreement"}
    assert set(foreseen_refit(many, agreement=False)) == {"refit"}
    assert foreseen(Subject(net(), IMAGES[:2], None), Request(ratio=0.5)) == {}
    recovered = foreseen(many, Request(ratio=0.5, recover=60), compiles=True)
    assert recovered["recovery"] == 60
    assert "agreement" not in recovered
    assert LONG > 0
