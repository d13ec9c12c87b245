"""Interleaved timing: arithmetic on made-up clocks, and what a race calls."""

from collections.abc import Callable

import pytest

from fxprune.inference import race as timing
from fxprune.inference.race import Timing, race


def test_medians_and_quartiles() -> None:
    found = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert found.median == 3
    assert found.spread == 2
    assert Timing((5.0,)).spread == 0


def test_ratios_are_taken_within_a_round() -> None:
    dense = Timing((1.0, 10.0, 2.0))
    assert Timing((0.5, 5.0, 1.0)).relative_to(dense) == 0.5
    # control: with the rounds out of step the same times give another ratio
    assert Timing((5.0, 1.0, 0.5)).relative_to(dense) != 0.5


def test_rounds_must_pair() -> None:
    with pytest.raises(ValueError, match="zip"):
        Timing((1.0,)).relative_to(Timing((1.0, 2.0)))


def called(rounds: int, warmup: int, names: str = "abc") -> list[str]:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    race({name: call(name) for name in names}, rounds=rounds, warmup=warmup)
    return order


def test_variants_take_turns() -> None:
    order = called(rounds=4, warmup=0)
    turns = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert turns == ["abc", "bca", "cab", "abc"], "each round has everybody, and begins with another one"


def test_warm_up_does_not_count() -> None:
    assert called(rounds=1, warmup=2) == list("aabbcc") + list("abc")
    assert len(race({"a": lambda: None}, rounds=3, warmup=5)["a"].seconds) == 3


class Clock:
    """Time that runs slower and slower: every call takes its own time, times a load that grows."""

    def __init__(self, cost: dict[Callable[[], object], float], growth: float) -> None:
        self.cost, self.load, self.growth = cost, 1.0, growth
        self.repeats: list[int] = []

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        self.repeats.append(repeats)
        self.load *= self.growth
        return self.cost[call] * self.load


def one() -> None:
    pass


def half() -> None:
    pass


def test_a_growing_load_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_cpu_seconds", Clock({one: 1.0, half: 0.5}, growth=1.05))
    found = race({"one": one, "half": half}, rounds=20)
    assert found["half"].relative_to(found["one"]) == pytest.approx(0.5, rel=0.06)
    # control: one after the other, the load is taken for the variant's own time
    monkeypatch.setattr(timing, "_cpu_seconds", Clock({one: 1.0, half: 0.5}, growth=1.05))
    apart = [race({"it": call}, rounds=20)["it"] for call in (one, half)]
    assert apart[1].relative_to(apart[0]) > 1


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({one: 0.001}, growth=1.0)
    monkeypatch.setattr(timing, "_cpu_seconds", clock)
    race({"one": one}, rounds=2, min_seconds=0.02)
    assert clock.repeats == [1, 20, 20]
    clock.repeats.clear()
    race({"one": one}, rounds=2, min_seconds=0.0001)
    assert clock.repeats == [1, 1, 1], "a long call is made once"
    clock.repeats.clear()
    race({"one": one}, rounds=2)
    assert clock.repeats == [1, 1]


def test_the_clock_runs() -> None:
    found = race({"none": lambda: None, "some": lambda: sum(range(20_000))}, rounds=5)
    assert 0 <= found["none"].median < found["some"].median


def test_a_bar_only_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    race({"a": one}, rounds=2)
    assert capsys.readouterr().err == ""
    race({"a": one}, rounds=2, progress="batch 8")
    captured = capsys.readouterr()
    assert "batch 8" in captured.err
    assert captured.out == ""


def test_without_rounds_there_is_no_time() -> None:
    with pytest.raises(ValueError, match="rounds is 0; at least 1"):
        race({"a": one}, rounds=0)


def test_nobody_races() -> None:
    assert race({}) == {}


@pytest.mark.cuda
def test_events_time_the_device() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    small, large = (torch.randn(n, n, device="cuda") for n in (64, 4096))
    found = race({"small": lambda: small @ small, "large": lambda: large @ large}, rounds=5, device="cuda")
    assert found["small"].median < found["large"].median
