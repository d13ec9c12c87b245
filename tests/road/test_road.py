"""A newcomer's road: a wheel, an empty environment, every command and snippet of README and docs, twenty pictures.

`make test-road` runs it. PyTorch and the other libraries are borrowed from the environment of the tests; fxprune is
what the wheel has.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from alone_harness import run_alone
from docs_harness import PAGES, ROOT, commands
from newcomer_harness import help_commands

from fxprune.comparison.experiments import recipe_names

pytestmark = pytest.mark.road

IN_THE_WHEEL = ("fxprune", "passes", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for building leaves things behind."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in IN_THE_WHEEL:
        place = ROOT / name
        if place.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(place, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(place, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(made), str(source))
    (found,) = made.glob("fxprune-*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with fxprune from the wheel, and with the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(symlinks=True).create(folder)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))  # their own .pth files are not read
    pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the newcomer works."""
    return tmp_path_factory.mktemp("newcomer")


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def newcomer(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    program = [str(python), str(ROOT / "tests" / "road" / "newcomer.py"), *words]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_has_all_files_and_no_others(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fxprune"}
    wanted = {f"fxprune/comparison/recipes/{name}.toml" for name in recipe_names()}
    assert wanted | {"fxprune/py.typed", "fxprune/passes/group_convs.py"} <= names


def test_the_console_command(python: Path, folder: Path) -> None:
    console = python.parent / "fxprune"
    done = subprocess.run([str(console), "--version"], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "fxprune"), done.stderr


def test_every_snippet(python: Path, tmp_path: Path) -> None:
    done = newcomer(python, tmp_path, "pages")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("--- ") == len(PAGES)


def test_every_command_and_the_file_that_comes_out(python: Path, folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    done = newcomer(python, folder, "commands")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exit code 0") == len(commands()) > 20
    done = newcomer(python, folder, "help")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exit code 0") == len(help_commands()) > 20
    y = run_alone("onnxruntime", folder / "resnet18.onnx", np.zeros((3, 3, 10, 10), np.float32))
    assert y.shape == (3, 10)


@pytest.mark.parametrize("wrong", ["fxprune report nothing.pt resnet18", "fxprune compile resnet18 --ratios 0.5"])
def test_control_a_wrong_command_fails(python: Path, tmp_path: Path, wrong: str) -> None:
    assert newcomer(python, tmp_path, "line", wrong).returncode == 2


def test_control_the_source_is_refused(tmp_path: Path) -> None:
    """The environment of the tests has the source, and that is seen."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    program = [sys.executable, str(ROOT / "tests" / "road" / "newcomer.py"), "pages"]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is the source, not the wheel" in done.stderr
