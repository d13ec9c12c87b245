"""What a record says of where and when it was made."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune import environment


def test_the_environment_says_what_decides_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(json.dumps(environment.environment()))
    assert found["cores"] >= 1
    assert found["load"] is None or len(found["load"]) == 3
    assert set(found["cpu_flags"]) <= set(environment.CPU_FLAGS)
    if "MKL-DNN" in torch.__config__.show():
        assert found["onednn"].split(".")[0].isdecimal()
    monkeypatch.setattr(environment, "_cpuinfo", lambda field: "fma avx512f other" if field == "flags" else None)
    assert environment.environment()["cpu_flags"] == ["fma", "avx512f"]


def test_it_names_the_version_that_runs() -> None:
    assert environment.environment()["fxprune"] == fxprune.__version__


def test_the_commit_is_of_the_checkout_itself_or_none(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    installed = tmp_path / "venv" / "site-packages"
    installed.mkdir(parents=True)
    assert environment._commit(tmp_path) is None
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    commit = environment._commit(tmp_path)
    assert commit is not None
    assert len(commit) >= 7
    assert environment._commit(installed) is None, "it lies in the checkout of something else"
