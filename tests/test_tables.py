"""Tables: they fit the terminal, keep what matters, and show themselves in notebooks."""

import re

import pytest
import torch
from torch import nn

import fxprune
from fxprune.tables import Bar, Column, Table, Tabular, terminal_width

TABLE = Table(
    (
        Column("name", right=False),
        Column("kept"),
        Column("least", goes=2),
        Column("less", goes=1),
        Column("", right=False),
    ),
    (
        ("features.stage.3.block.1.conv2", "12", "a lot of it", Bar("0.5", 0.5), "shares an order with another layer"),
        ("stem", "too few channels to be divided into any groups at all"),
    ),
    before=("a summary that may be wider than a narrow terminal is",),
)


def test_without_a_width_nothing_is_lost() -> None:
    summary, gap, header, first, second = TABLE.text().splitlines()
    assert summary == TABLE.before[0]
    assert gap == ""
    assert header.split() == ["name", "kept", "least", "less"]
    assert first.endswith("12  a lot of it   0.5  shares an order with another layer")
    assert second == f"{'stem':30}  too few channels to be divided into any groups at all"


@pytest.mark.parametrize("width", [100, 80, 60, 44])
def test_lines_fit(width: int) -> None:
    text = TABLE.text(width)
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    assert {"shares", "order", "another", "layer", "too", "channels", "groups", "all", "12"} <= set(words)


def test_control_the_whole_table_would_not_fit() -> None:
    assert max(map(len, TABLE.text().splitlines())) > 80


def test_columns_go_in_their_order_and_names_are_shortened_last() -> None:
    heads: dict[str, int] = {}
    for width in range(90, 30, -1):
        header = next(line for line in TABLE.text(width).splitlines() if line.startswith("name"))
        heads.setdefault(" ".join(header.split()), width)
    assert list(heads) == ["name kept least less", "name kept less", "name kept"]
    assert "…" not in TABLE.text(heads["name kept"])
    short = TABLE.text(40)
    assert re.search(r"^feature\S*…\S*conv2 ", short, re.MULTILINE)


DEEP = [f"backbone.bottom_up.stage{i}.{j}.branch.conv{k}" for i in (1, 2) for j in range(3) for k in (1, 2)]
MIDDLE = [f"encoder.{i}.attention.output.projection" for i in range(12)]


def first_words(names: list[str], width: int) -> list[str]:
    table = Table(
        (Column("layer", right=False), *map(Column, ("kept", "asked"))), tuple((n, "1/2", "0.5") for n in names)
    )
    header, *rows = table.text(width).splitlines()
    assert len({len(line) for line in (header, *rows)}) == 1, "the columns stand below each other"
    return [row.split()[0] for row in rows]


@pytest.mark.parametrize("names", [DEEP, MIDDLE, [*DEEP, *DEEP[:1]]])
@pytest.mark.parametrize("width", [60, 40, 30, 20])
def test_names_that_are_shortened_stay_different(names: list[str], width: int) -> None:
    shown = first_words(names, width)
    assert len(set(shown)) == len(set(names))
    for name, short in zip(names, shown, strict=True):
        left, _, right = short.partition("…")
        assert name.startswith(left)
        assert name.endswith(right)


def test_the_end_is_kept_where_it_tells_names_apart() -> None:
    assert first_words(DEEP, 32)[0] == "ba…1.0.branch.conv1"
    assert first_words(DEEP[:1], 32)[0] == "backbone.…nch.conv1", "control: one alone has both ends"
    assert len({name[:9] + name[-10:] for name in DEEP}) < len(DEEP), "control: both ends do not tell them apart"


def test_markdown() -> None:
    lines = TABLE.markdown().splitlines()
    assert lines[0] == "- a summary that may be wider than a narrow terminal is"
    assert lines[2] == "| name | kept | least | less |  |"
    assert lines[3] == "| --- | ---: | ---: | ---: | --- |"
    assert lines[5].count("|") == lines[4].count("|") == 6
    assert "a\\|b" in Table((Column("x"),), (("a|b",),)).markdown()


def test_html_has_bars_and_no_foreign_tags() -> None:
    page = TABLE.html()
    assert "linear-gradient(90deg,#4477AA55 50%,transparent 50%)" in page
    assert "colspan='4'" in page
    assert "<script>" not in Table((Column("x"),), (("<script>",),), before=("<script>",)).html()


def test_a_terminal_tells_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal_width() is None
    monkeypatch.setenv("COLUMNS", "77")
    assert terminal_width() == 77


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 1))


X = torch.randn(2, 16, 8, 8)


def things() -> dict[str, Tabular]:
    pruned = fxprune.compile(network(), example_inputs=X)
    return {
        "PrunePlan": fxprune.make_plan(network(), example_inputs=X),
        "Report": fxprune.report(pruned),
        "ChannelAnalysis": fxprune.analyze(network(), X),
        "Sensitivity": fxprune.measure_sensitivity(network(), example_inputs=X),
    }


def test_what_a_user_holds_shows_itself() -> None:
    for name, thing in things().items():
        assert repr(thing).startswith(f"<{name}: ")
        assert len(repr(thing)) < 200
        assert "\n" not in repr(thing)
        page = thing._repr_html_()
        assert page.count("<tr>") > 1
        assert "linear-gradient" in page
        assert thing.to_markdown().count("\n") >= 2
        for text in (str(thing), page, thing.to_markdown()):
            assert "0" in text


def test_the_parts_of_a_plan_are_short_too() -> None:
    (kernels, *_) = fxprune.make_plan(network(), example_inputs=X).layers.values()
    assert repr(kernels).startswith("<GroupedKernels: partition: 2 groups of 16 filters")
