"""Imports run one way, from the errors up to the command line."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxprune
import fxprune.passes

PACKAGE = Path(fxprune.__file__).parent

# Each module may import from the lines above its own only; those on one line know nothing of one another.
ORDER = (
    ("errors",),
    ("checkpoints", "layers", "timing"),
    ("kernels.triton_conv",),
    ("kernels.gather_conv",),
    ("kernels",),
    ("tracing",),
    ("channels.atoms",),
    ("channels.interpreter",),
    ("channels.rules",),
    ("channels.operators",),
    ("channels.analysis",),
    ("channels",),
    ("filters.units", "plan_fields"),
    ("plans",),
    ("eligibility", "masking", "methods.clustering", "snapshots", "training.schedules"),
    ("methods.cocluster", "methods.kernel_selection", "methods.same_size_dbscan"),
    ("methods.equal_clusters", "methods.reconstruction", "methods.srgkp"),
    ("methods.tmi",),
    ("methods",),
    ("variety", "criteria.criterion"),
    ("criteria.standard", "criteria.taylor"),
    ("criteria",),
    ("calibration.batches", "fused", "kernels.native", "rewriting"),
    ("filters.compaction", "filters.removability"),
    ("calibration.following", "calibration.lockstep", "filters.removal"),
    ("calibration.samples", "shapes", "sharing"),
    ("calibration.least_squares", "calibration.survey"),
    ("calibration.damage", "calibration.refit"),
    ("calibration",),
    ("planning", "training.gradual"),
    ("sensitivity",),
    ("filters.selection",),
    ("orders", "verification"),
    (
        "passes.absorb_gathers",
        "passes.fold_batch_norm",
        "passes.fuse_convs",
        "passes.group_convs",
        "passes.merge_gathers",
        "passes.remove_channels",
        "passes.sink_gathers",
    ),
    ("passes.align_windows",),  # gives channel spaces another order as sink_gathers does
    ("passes",),
    ("pipeline", "report"),
    ("choices", "engines.engine", "measurements"),
    ("engines.library", "engines.native", "engines.onednn", "engines.triton"),
    ("engines",),
    ("forms", "inference_graph"),
    ("acceleration", "latency"),
    ("layer_times",),
    ("subject",),
    ("filters.planning", "steps"),
    ("plan_making", "storage"),
    ("compiler",),
    ("filters", "training.sparsification", "training.tickets"),
    ("training",),
    ("",),  # the package itself: its public names
    ("exports", "models"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}


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
                yield below if below in RANK else below.rpartition(".")[0]


def upward(module: str, source: str) -> list[str]:
    """What a module imports although it does not stand below it."""
    return [other for other in imports(module, source) if RANK[other] >= RANK[module]]


def test_every_module_has_a_rank() -> None:
    assert SOURCES.keys() == RANK.keys()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_one_way(module: str) -> None:
    assert upward(module, SOURCES[module]) == []


def test_the_reader_of_imports_sees_them() -> None:
    found = {module: set(imports(module, source)) for module, source in SOURCES.items()}
    assert {"errors", "tracing", "planning", "calibration"} <= found["subject"]
    assert found["errors"] == set()
    assert len(found["passes"]) == 8


@pytest.mark.parametrize(
    "planted",
    [
        "import fxprune",
        "import fxprune.compiler",
        "from fxprune import compiler",
        "from fxprune.compiler import mask",
        "def f():\n    from fxprune.storage import save",
        "if True:\n    class A:\n        import fxprune.cli as tool",
    ],
)
def test_control_a_planted_import_is_seen(planted: str) -> None:
    assert upward("rewriting", SOURCES["rewriting"]) == []
    assert upward("rewriting", f"{SOURCES['rewriting']}\n{planted}\n") != []


def test_control_a_neighbour_is_no_better() -> None:
    assert upward("passes.group_convs", "from fxprune.passes.sink_gathers import SinkGathers") != []


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
