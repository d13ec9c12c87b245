"""Imports run one way, from the errors up to the command line."""

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import fxprune
import fxprune.passes

PACKAGE = Path(fxprune.__file__).parent

# Each package (or lone module) may import from those before it only.
ORDER = (
    "errors",
    "vocabulary",  # names that arguments take
    "tables",  # how results show themselves
    "durations",
    "files",
    "environment",  # where and when a measurement was made
    "models",  # networks by name
    "graph",  # capture, values, editing
    "plans",  # a plan as pure data
    "methods",  # arrays in, clustering out
    "channels",  # which channels go together
    "criteria",  # what a kernel or filter is worth
    "calibration",  # data, and what is solved from it
    "passes",  # rewrites of a graph
    "exact",  # all that follows the one lossy step
    "inference",  # the fastest form
    "planning",  # from a request to a plan, and the lossy step
    "api",  # what users call
    "training",  # schedules, masks, tickets, and a loop
    "",  # the package itself: its public names
    "exports",
    "variety",  # a name of 0.1
    "comparison",  # pruners against each other
    "cli",
    "__main__",
)
RANK = {room: rank for rank, room in enumerate(ORDER)}
PUBLIC_FUNCTIONS = {name for name in fxprune.__all__ if inspect.isfunction(getattr(fxprune, name))}


def room_of(module: str) -> str:
    """The package of a module below fxprune, or the module itself if it stands alone."""
    return module.partition(".")[0]


def name_of(path: Path) -> str:
    """Name below fxprune: `channels.atoms`, `channels` for its __init__, and nothing for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES |= {
    name_of(PACKAGE / "passes" / path.name): path.read_text(encoding="utf-8")
    for path in sorted((PACKAGE / "passes").resolve().glob("*.py"))  # rglob does not follow the link
}


def imports(module: str, source: str) -> Iterator[str]:
    """Modules of fxprune that a source imports, wherever in it, by their name below fxprune."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import; write the full name"
            # `from fxprune import planning` may name a module or something in one
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "fxprune":
                below = name.removeprefix("fxprune").removeprefix(".")
                yield below if below in SOURCES else below.rpartition(".")[0]


def upward(module: str, source: str) -> list[str]:
    """What a module imports although its room does not stand below."""
    room = room_of(module)
    return [other for other in imports(module, source) if room_of(other) != room and RANK[room_of(other)] > RANK[room]]


def test_every_room_has_a_rank() -> None:
    assert {room_of(module) for module in SOURCES} == RANK.keys()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_one_way(module: str) -> None:
    assert upward(module, SOURCES[module]) == []


def test_the_modules_of_a_room_form_no_circle() -> None:
    graph = nx.DiGraph((module, other) for module, source in SOURCES.items() for other in imports(module, source))
    assert list(nx.simple_cycles(graph)) == []
    graph.add_edge("graph.editing", "graph.tracing")  # control
    graph.add_edge("graph.tracing", "graph.editing")
    assert list(nx.simple_cycles(graph)) != []


def test_no_module_hides_a_public_function() -> None:
    parts = {part for module in SOURCES for part in module.split(".")}
    assert parts & PUBLIC_FUNCTIONS == set()
    assert {"compile", "mask", "rewrite", "verify", "report", "save", "load", "analyze"} <= PUBLIC_FUNCTIONS


def test_the_reader_of_imports_sees_them() -> None:
    found = {module: {room_of(other) for other in imports(module, source)} for module, source in SOURCES.items()}
    assert {"errors", "graph", "plans", "calibration"} <= found["calibration.subject"]
    assert found["errors"] == set()
    assert len(set(imports("passes", SOURCES["passes"]))) == 10


@pytest.mark.parametrize(
    "planted",
    [
        "import fxprune",
        "import fxprune.api",
        "from fxprune import api",
        "from fxprune.api import make_plan",
        "def f():\n    from fxprune.exact.storage import save",
        "if True:\n    class A:\n        import fxprune.cli as tool",
    ],
)
def test_control_a_planted_import_is_seen(planted: str) -> None:
    assert upward("graph.editing", SOURCES["graph.editing"]) == []
    assert upward("graph.editing", f"{SOURCES['graph.editing']}\n{planted}\n") != []


def test_a_pass_folder_under_another_name_is_refused() -> None:
    path = (PACKAGE / "passes").resolve() / "__init__.py"
    for name in ("passes", "other.passes"):
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with pytest.raises(ImportError, match=r"import it by that name"):
            spec.loader.exec_module(module)
    assert fxprune.passes.GroupConvs.__module__ == "fxprune.passes.group_convs"
