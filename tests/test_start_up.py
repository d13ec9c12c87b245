"""What starting costs is what it imports: counted here in modules, since seconds depend on the machine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fxprune
from fxprune.cli.program import COMMANDS

HEAVY = {"torch", "numpy", "scipy", "sklearn", "networkx", "torchvision", "matplotlib", "PIL", "tqdm", "timm"}
"""What no help should wait for."""
LATE = ("torchvision", "torch._dynamo", "scipy", "sklearn", "networkx", "matplotlib", "onnx", "timm", "fxprune.api")
"""What `import fxprune` should not bring, beyond torch."""


def loaded(script: str) -> set[str]:
    """The modules of a fresh interpreter after a script."""
    script += "\nimport sys\nsys.stderr.write(' '.join(sys.modules))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(process.stderr.split())


def help_of(*arguments: str) -> str:
    return f"from fxprune.cli import main\ntry:\n    main({[*arguments]!r})\nexcept SystemExit:\n    pass"


def test_importing_fxprune_imports_next_to_nothing() -> None:
    before = loaded("import torch")
    assert "torch" in before
    brought = loaded("import torch, fxprune") - before
    assert {name for name in LATE if name in brought} == set()
    assert len(brought) < 20


def test_control_what_is_used_is_imported() -> None:
    assert {"torch", "scipy", "fxprune.api"} <= loaded("import fxprune\nfxprune.compile")


def test_compiling_a_plain_model_needs_no_torchvision() -> None:
    modules = loaded(
        "import torch, fxprune\n"
        "fxprune.compile(torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3)), example_inputs=torch.randn(2, 16, 8, 8))"
    )
    assert {"torchvision", "sklearn"} & modules == set()


@pytest.mark.parametrize("arguments", [("--version",), ("--help",)])
def test_the_first_look_does_not_wait_for_torch(arguments: tuple[str, ...]) -> None:
    assert HEAVY & loaded(help_of(*arguments)) == set()


def test_no_help_of_a_subcommand_waits_for_torch() -> None:
    names = [command.__name__.rpartition("command_")[2] for command in COMMANDS]
    assert {"compile", "bench", "train"} <= set(names)
    asked = "\n".join(help_of(name, "--help") for name in names)
    assert HEAVY & loaded(asked) == set()


# --- the public names -------------------------------------------------------------------------------------------------


def announced() -> set[str]:
    """The public names that a type checker sees: what the package imports, and where its block says that it is."""
    tree = ast.parse(Path(fxprune.__file__).read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imported if str(node.module).startswith("fxprune.") for alias in node.names}


def test_type_checkers_and_python_see_the_same_names() -> None:
    names = set(fxprune.__all__)
    assert len(names) == len(fxprune.__all__)
    assert announced() - {"near_matches"} == names - {"__version__"}
    assert set(dir(fxprune)) == names
    assert {name for name in names if getattr(fxprune, name, None) is None} == set()


def test_each_name_is_where_a_type_checker_is_sent() -> None:
    tree = ast.parse(Path(fxprune.__file__).read_text(encoding="utf-8"))
    checked = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name: checked[name] for name in fxprune._HOMES} == fxprune._HOMES


def test_rooms_are_there_when_they_are_named() -> None:
    script = "import fxprune\nassert fxprune.criteria.CRITERIA\nassert not hasattr(fxprune, 'nowhere')"
    assert "fxprune.criteria" in loaded(script)


def test_a_misspelt_name_is_told_its_neighbour() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'complie' \(near: 'compile'\)"):
        fxprune.complie  # type: ignore[attr-defined]  # noqa: B018
