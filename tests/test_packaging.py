"""What a user installs: one version everywhere, the console command, the type marker, and no trace of this machine."""

import configparser
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import fxprune
from fxprune import cli
from fxprune.comparison.experiments import recipe_names
from fxprune.comparison.extras import EXTRAS
from fxprune.inference.kernels import native

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fxprune"
MACHINE_PATH = re.compile(r"/(?:home|root|Users|work|mnt|scratch)/[\w.]|/tmp/\w|\b[A-Z]:\\\\?Users\b")


@pytest.fixture(scope="module")
def setup() -> configparser.RawConfigParser:
    # Raw: setuptools reads %(test)s below [options.extras_require] as we do in test_extras.
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_version_is_the_newest_of_the_changelog() -> None:
    newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+\S*?)\]?(?:\s|$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest, "CHANGELOG.md has no heading such as '## 0.1.0'"
    assert newest[1] == fxprune.__version__


def test_the_console_command_is_main(setup: configparser.RawConfigParser) -> None:
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    assert (name, target) == ("fxprune", f"{cli.__name__}:{cli.main.__name__}")


def test_files_that_are_not_python_are_packaged(setup: configparser.RawConfigParser) -> None:
    patterns = [pattern.strip() for pattern in setup["options.package_data"]["fxprune"].split(",")]
    package = ROOT / "fxprune"
    found = {str(path.relative_to(package)) for pattern in patterns for path in package.glob(pattern)}
    kinds = (".cpp", ".h", ".typed", ".toml")
    others = {str(path.relative_to(package)) for path in package.rglob("*") if path.suffix in kinds}
    assert found == others
    recipes = {f"comparison/recipes/{name}.toml" for name in recipe_names()}
    kernels = {f"inference/kernels/{name}" for name in native.SOURCES + native.HEADERS}
    assert {"py.typed", *recipes, *kernels} == found


def test_passes_is_a_relative_link() -> None:
    link = ROOT / "fxprune" / "passes"
    assert link.is_symlink(), "a checkout without symbolic links cannot import fxprune.passes"
    assert str(link.readlink()) == "../passes"


def test_the_pinned_versions_are_asked_for(setup: configparser.RawConfigParser) -> None:
    asked = "\n".join([setup["options"]["install_requires"], *setup["options.extras_require"].values()])
    wanted = {re.split(r"[<>=!~ ]", line)[0] for line in asked.split("\n") if line and not line.startswith("%")}
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    assert pinned == wanted


def test_every_extra_that_an_error_names_is_there(setup: configparser.RawConfigParser) -> None:
    extras = setup["options.extras_require"]
    named = {
        name for path in PACKAGE.rglob("*.py") for name in re.findall(r"fxprune\[([\w-]+)\]", path.read_text())
    } | set(EXTRAS.values())
    assert {"onnx", "plots", "torch-pruning"} <= named <= set(extras)
    assert all(package.replace("_", "-") in extras[extra].split() for package, extra in EXTRAS.items())


def test_the_extra_of_all_users_has_every_other_one(setup: configparser.RawConfigParser) -> None:
    extras = setup["options.extras_require"]
    assert set(re.findall(r"%\((\S+)\)s", extras["all"])) == set(extras) - {"all", "test", "docs", "dev"}


def test_every_folder_with_python_in_it_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")} | {PACKAGE / "passes"}
    assert {"comparison", "models", "training", "data"} <= {folder.name for folder in folders}
    assert [folder.name for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_package_imports_nothing_of_the_repository() -> None:
    sources = [path for folder in (PACKAGE, PACKAGE / "passes") for path in folder.rglob("*.py")]
    pattern = re.compile(r"^\s*(?:from|import) (?:benchmarks|tests)\b", re.MULTILINE)
    assert len(sources) > 100
    assert not [path.name for path in sources if pattern.search(path.read_text())]
    assert pattern.search("def f():\n    from benchmarks import latency\n"), "control"


def test_every_tool_setting_is_read_from_one_file() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    assert "project" not in project, "the metadata is in setup.cfg"
    assert not [name for name in ("mypy.ini", "pytest.ini", "tox.ini", ".ruff.toml") if (ROOT / name).exists()]


def test_no_file_names_a_path_of_a_machine() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in _tracked_files()
        if file != Path(__file__) and (match := MACHINE_PATH.search(file.read_text(errors="ignore")))
    ]
    assert not found


@pytest.mark.parametrize("text", ["cd /home/ann", "open('/tmp/x')", "/root/.cache", r"C:\Users\ann"])
def test_a_path_of_a_machine_is_recognized(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["/proc/self/status", "../shared", "https://host/network/home", "a / b"])
def test_an_ordinary_path_is_not(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def _tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.splitlines() if (path := ROOT / name).is_file()]
