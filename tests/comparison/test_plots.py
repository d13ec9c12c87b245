"""Pictures: every method has a look of its own, labels do not overlap, and the front is the front."""

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.comparison.looks import LOOKS, Look, label_beside, look_of, pareto, spread
from fxprune.comparison.methods import METHODS
from fxprune.comparison.plots import draw_fronts
from fxprune.comparison.points import Run, points_of

pytest.importorskip("matplotlib")


def test_no_two_methods_look_alike() -> None:
    assert set(METHODS) <= set(LOOKS)
    looks = [(look_of(name).colour, look_of(name).marker, look_of(name).hollow) for name in METHODS]
    assert len(set(looks)) == len(looks)


def test_ours_stand_out() -> None:
    assert {look_of(name).colour for name in METHODS if name.startswith("fxprune")}.isdisjoint(
        look_of(name).colour for name in METHODS if name.startswith(("tp-", "tmi", "srgkp", "dense"))
    )
    assert look_of("fxprune").strong
    assert not look_of("tp-taylor").strong


def test_what_has_no_look_gets_one_of_its_own_every_time() -> None:
    assert look_of("somebody else") == look_of("somebody else")


@given(st.lists(st.floats(0, 10), max_size=12), st.floats(0.01, 0.9))
def test_spread_places_keep_their_distance_and_order(places: list[float], gap: float) -> None:
    moved = spread(places, gap, 0, 10)
    assert all(-1e-9 <= place <= 10 + 1e-9 for place in moved)
    in_order = [place for _, place in sorted(zip(places, moved, strict=True), key=lambda pair: (pair[0], pair[1]))]
    room = min(gap, 10 / max(1, len(places) - 1))
    assert all(second - first >= room - 1e-6 for first, second in pairwise(in_order))


def test_places_far_enough_apart_stay() -> None:
    assert spread([5.0, 1.0, 3.0], 1.0, 0, 10) == [5.0, 1.0, 3.0]


@pytest.mark.parametrize("spreads", [True, False])
def test_labels_do_not_overlap(spreads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is to write them at the height of their points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    if not spreads:
        monkeypatch.setattr("fxprune.comparison.looks.spread", lambda places, *_: list(places))
    figure = Figure(figsize=(5, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(80, 90))
    label_beside(axes, [(0.5, 85 + number / 10, f"method {number}", Look("black", "o")) for number in range(10)])
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert any(one.y0 < other.y1 and other.y0 < one.y1 for one, other in combinations(boxes, 2)) == (not spreads)


def test_the_front_is_not_beaten() -> None:
    points = [(0.6, 80.0), (0.5, 82.0), (0.5, 81.0), (1.0, 90.0), (0.9, 79.0)]
    assert pareto(points) == [(0.5, 82.0), (1.0, 90.0)]
    assert pareto([]) == []


def a_run(method: str, share: float) -> Run:
    return Run(method, share, 0, 100, share, 10, 0.5, 0.8, None, 1.0, 1.0)


@pytest.mark.parametrize("shares, timed, panels", [((0.5,), True, 2), ((0.5, 0.25), True, 4), ((0.5,), False, 2)])
def test_macs_are_a_panel_where_they_say_something(
    shares: tuple[float, ...], timed: bool, panels: int, tmp_path: Path
) -> None:
    runs = [a_run("dense", 1.0), *(a_run("fxprune", share) for share in shares)]
    rows = [{"network": "fxprune", "ratio": share, "batch": 4, "seconds": 0.1, "relative": 0.7} for share in shares]
    draw_fronts(points_of(runs, rows if timed else ()), tmp_path / "front", "a title")
    text = (tmp_path / "front.svg").read_text()
    assert text.count('id="axes_') == panels
    assert ("MACs, share" in text) == (len(shares) > 1 or not timed)
    assert "a title" in text


@pytest.mark.parametrize("low, is_at_foot", [(0.13, True), (0.84, False)])
def test_what_lies_far_below_stands_at_the_foot(low: float, is_at_foot: bool, tmp_path: Path) -> None:
    runs = [replace(a_run("dense", 1.0), before=0.92), replace(a_run("fxprune", 0.5), before=0.89)]
    runs += [replace(a_run("auto", 0.5), before=0.88), replace(a_run("tp-magnitude", 0.5), before=low)]
    draw_fronts(points_of(runs), tmp_path / "front", "a title")
    text = (tmp_path / "front.svg").read_text()
    assert ("Torch-Pruning, magnitude: 13%" in text) == is_at_foot
    assert "fxprune, kernels:" not in text
