"""Stopwatch: times are remembered, whatever happens to the file."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.inference import stopwatch as measurements
from fxprune.inference.race import Timing
from fxprune.inference.stopwatch import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FXPRUNE_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def fixed_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls return how long they take."""

    def race(variants: Mapping[str, Callable[[], Any]], **_: object) -> dict[str, Timing]:
        return {name: Timing((call() + 1, call())) for name, call in variants.items()}

    monkeypatch.setattr(measurements, "race", race)


def timed(**seconds: float) -> Stopwatch:
    """A stopwatch that timed and saved something."""
    stopwatch = Stopwatch(CPU)
    stopwatch.race({name: lambda s=s: s for name, s in seconds.items()})  # type: ignore[misc]  # binds s
    stopwatch.save()
    return stopwatch


def test_the_shortest_round_counts_and_is_remembered(cache: Path) -> None:
    assert timed(a=2.0, b=3.0).times(("a", "b")) == {"a": 2.0, "b": 3.0}
    assert Stopwatch(CPU).times(("b", "a")) == {"b": 3.0, "a": 2.0}


def test_only_times_of_all_are_times(cache: Path) -> None:
    assert timed(a=2.0).times(("a", "b")) is None
    assert Stopwatch(CPU).times(("a", "b")) is None


def test_what_others_saved_meanwhile_stays(cache: Path) -> None:
    mine = Stopwatch(CPU)
    timed(a=2.0)
    mine.race({"b": lambda: 3.0})
    mine.save()
    assert Stopwatch(CPU).times(("a", "b")) == {"a": 2.0, "b": 3.0}
    assert [path.suffix for path in cache.iterdir()] == [".json"]  # nothing is left of writing


def test_a_file_is_replaced_as_a_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(a=2.0)

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    timed(b=3.0)
    assert Stopwatch(CPU).times(("a",)) == {"a": 2.0}
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"3",
        b"\xff\xfe",
        b'{"a": "fast"}',
        b'{"a": -1}',
        b'{"a": NaN}',
        b'{"a": 1%s}' % (b"0" * 400),
    ],
    ids=["empty", "cut", "list", "number", "no text", "word", "negative", "nan", "huge"],
)
def test_a_damaged_file_is_ignored(content: bytes, cache: Path) -> None:
    path = timed(a=2.0).path
    assert path is not None
    path.write_bytes(content)
    assert Stopwatch(CPU).times(("a",)) is None
    timed(b=3.0)
    assert Stopwatch(CPU).times(("b",)) == {"b": 3.0}


def test_a_folder_that_cannot_be_written_costs_only_time(cache: Path) -> None:
    cache.write_text("a file, not a folder")
    assert timed(a=2.0).times(("a",)) == {"a": 2.0}
    assert Stopwatch(CPU).times(("a",)) is None


def test_without_remembering_nothing_is_read_or_written(cache: Path) -> None:
    stopwatch = Stopwatch(CPU, remember=False)
    stopwatch.race({"a": lambda: 2.0})
    stopwatch.save()
    assert stopwatch.times(("a",)) == {"a": 2.0}
    assert not cache.exists()
    timed(b=3.0)
    assert Stopwatch(CPU, remember=False).times(("b",)) is None


def test_another_thread_count_has_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = timed(a=2.0).path
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert Stopwatch(CPU).path != first
    assert Stopwatch(CPU).times(("a",)) is None
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert "9-9" in str(Stopwatch(CPU).path)


def test_a_disturbed_layer_races_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine all rounds may be slow: the shortest counts once it has come again."""
    busy = [(9.0, 5.0, 7.0), (2.0, 8.0, 6.0), (2.05, 2.0, 9.0), (1.0, 1.0, 1.0)]
    given = {"busy": iter(busy), "quiet": iter([(3.0,) * 3])}
    seen: list[list[str]] = []

    def race(variants: Mapping[str, Callable[[], Any]], **_: object) -> dict[str, Timing]:
        seen.append(list(variants))
        return {name: Timing(next(given[name])) for name in variants}

    monkeypatch.setattr(measurements, "race", race)
    found = Stopwatch(torch.device("cpu")).race({"busy": lambda: None, "quiet": lambda: None})
    assert found == {"busy": 2.0, "quiet": 3.0}
    assert seen == [["busy", "quiet"], ["busy"], ["busy"]]
    monkeypatch.setattr(measurements, "RACES", 1)  # control
    given |= {"busy": iter(busy), "quiet": iter([(3.0,) * 3])}
    assert Stopwatch(torch.device("cpu")).race({"busy": lambda: None, "quiet": lambda: None})["busy"] == 5.0
