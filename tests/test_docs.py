"""Every Python block of README and docs runs, page by page, on a small network in place of a large one."""

import re
from collections.abc import Iterator
from pathlib import Path

import docs_harness
import pytest
from docs_harness import EVERY_PAGE, NEEDS_A_LIBRARY, PAGES, ROOT, arguments_of, commands, follow
from newcomer_harness import arguments, furnish, help_commands

import fxprune
from fxprune.cli import program


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with docs_harness.small_world():
        yield


@pytest.mark.usefixtures("small_world")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    follow(page, tmp_path)


@pytest.mark.parametrize("line", commands())
def test_the_command_line_takes_every_command(line: str) -> None:
    program.read(arguments_of(line))


@pytest.mark.parametrize("line", ["fxprune compile", "fxprune bench net --ratios 0.5", "fxprune fly net"])
def test_control_it_does_not_take_others(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.read(arguments_of(line))
    assert "usage:" in capsys.readouterr().err


QUICK = {"compile", "report", "eval", "verify", "analyze"}
"""Of the commands in `fxprune --help`; `make test-road` gives all examples of all commands."""


@pytest.mark.usefixtures("small_world")
@pytest.mark.filterwarnings("ignore")
def test_the_examples_of_the_help_run_as_they_stand_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    furnish()
    given = [line for line in help_commands([program.EPILOG]) if line.split()[1] in QUICK]
    assert {line.split()[1] for line in given} == QUICK
    assert {line: program.main(arguments(line)) for line in given} == dict.fromkeys(given, 0)
    assert program.main(arguments("fxprune verify resnet50.pt resnet50 --pretrained")) == 1, "control"
    assert "if it was compiled with --calibration, give the same data" in capsys.readouterr().err


def test_every_page_with_code_is_here() -> None:
    assert {"README.md", "ten-minutes.md", "planning.md", "training.md"} <= {page.name for page in PAGES}
    assert len(PAGES) >= 10


@pytest.mark.usefixtures("small_world")
def test_control_a_wrong_block_fails(tmp_path: Path) -> None:
    page = tmp_path / "wrong.md"
    page.write_text("```python\npruned = fxprune.compile(model, ratios=0.5)\n```\n")
    with pytest.raises(TypeError):
        follow(page, tmp_path)


def test_pages_that_need_a_library_are_followed_elsewhere() -> None:
    for name in NEEDS_A_LIBRARY:
        followed = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "wild").glob("*.py"))
        assert (ROOT / "docs" / name).is_file()
        assert name.removesuffix(".md") in followed.lower()


NAME = re.compile(r"(?<![\w./-])fxprune\.([A-Za-z]\w*)")


def unknown_names(text: str) -> set[str]:
    """What a page says of the package that is neither public nor a room."""
    rooms = {path.stem for path in Path(fxprune.__file__).parent.iterdir()}
    return set(NAME.findall(text)) - set(fxprune.__all__) - rooms


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_every_name_that_a_page_uses_is_public(page: Path) -> None:
    assert unknown_names(page.read_text(encoding="utf-8")) == set()


def test_control_a_name_that_is_not() -> None:
    assert unknown_names("`fxprune.fly` and fxprune.compile, fxprune.planning.auto") == {"fly"}
