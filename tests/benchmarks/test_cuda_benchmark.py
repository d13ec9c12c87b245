"""The benchmark of a device: what it runs in which order, and that nothing found is lost."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _cuda_steps, cuda
from benchmarks._cuda_page import page
from benchmarks._cuda_steps import STEPS, Place, grouped_layer

DRY = Place("cpu", True, "resnet18", 2, ("kernels overlap", "filters"))
RESULTS = Path(cuda.__file__).parent / "results"


def options(folder: Path, *more: str) -> Namespace:
    return cuda.read_options(["--output", str(folder), "--device", "cpu", *more])


def test_what_is_worth_most_comes_first(tmp_path: Path) -> None:
    found = [(step, model, batch) for step, model, batch in cuda.jobs(options(tmp_path))]
    assert found[:3] == [("tests", "resnet18", 32), ("networks", "resnet18", 32), ("networks", "resnet50", 32)]
    assert [job for job in found if job[0] == "layers"] == [("layers", "resnet18", 32)]
    assert ("networks", "resnet50", 1) in found[found.index(("training", "resnet18", 32)) :]


def test_layers_are_timed_in_every_form() -> None:
    *_, rows = STEPS["layers"](DRY)
    assert {form.split()[0] for form in rows[0]["seconds"]} == {"pruned", "dense"}
    assert min(rows[0]["seconds"].values()) > 0


@pytest.mark.parametrize("block", [8, 64])
def test_a_layer_reads_runs_of_channels(block: int) -> None:
    conv = grouped_layer(128, 2, 0.5, block)
    runs = conv.reads().reshape(-1, block)
    assert (runs[:, 0] % block == 0).all()
    assert (runs[:, -1] - runs[:, 0] == block - 1).all()
    assert conv.weight.shape == (128, 64, 3, 3)


@pytest.mark.slow  # compiles and accelerates two networks
def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cuda.main(["--output", str(tmp_path), "--device", "cpu", "--dry", "--steps", "networks", "training"])
    assert code == 0, capsys.readouterr().out
    record = json.loads((tmp_path / "cuda-cpu-dry.json").read_text())
    assert {row["network"] for race in record["networks"] for row in race["rows"]} == {
        "dense", "kernels overlap", "filters",
    }  # fmt: skip
    assert record["training"]["pruned"]
    assert "| kernels overlap | 0.5 |" in (tmp_path / "cuda-cpu-dry.md").read_text()


def child(monkeypatch: pytest.MonkeyPatch, found: list[Any], ending: Exception | int) -> None:
    """Let a step's process write what it finds and end so."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        part = Path(command[command.index("--output") + 1])
        part.parent.mkdir(parents=True, exist_ok=True)
        for entry in found:
            part.write_text(json.dumps({"found": entry}))
        if isinstance(ending, Exception):
            raise ending
        return subprocess.CompletedProcess(command, ending, "", "it broke")

    monkeypatch.setattr(cuda, "environment", lambda: WHERE)
    monkeypatch.setattr(subprocess, "run", run)


WHERE = {"cuda_device": None, "cpu": "a processor", "date": "2026-11-27", "torch": "2.15"}
LATE = subprocess.TimeoutExpired("step", 9)


@pytest.mark.parametrize(
    "found, ending, expected",
    [
        ([[1], [1, 2]], 0, [1, 2]),
        ([[1]], LATE, [1]),
        ([[1]], 1, [1]),
        ([], LATE, {"stopped": "after 9 s"}),
        ([], 1, {"error": "it broke"}),
    ],
)
def test_what_a_step_found_survives_its_end(
    found: list[Any], ending: Exception | int, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, found, ending)
    assert cuda.take_aside(options(tmp_path), "layers", "resnet18", 32, 100) == expected


def test_a_failed_step_is_told_and_the_next_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, [], 1)
    code = cuda.main(["--output", str(tmp_path), "--device", "cpu", "--steps", "networks", "layers", "--batches", "2"])
    record = json.loads((tmp_path / "cuda-cpu.json").read_text())
    assert code == 1
    assert record["layers"] == {"error": "it broke"}
    assert set(record["failed"]) == {"networks resnet18 2", "networks resnet50 2"}
    assert "networks resnet50 2: error it broke" in page(tmp_path / "cuda-cpu.json")


def test_no_step_begins_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "take_aside", lambda *_: pytest.fail("a step was begun"))
    cuda.main(["--output", str(tmp_path), "--device", "cpu", "--steps", "layers", "--minutes", "0.1"])
    assert json.loads((tmp_path / "cuda-cpu.json").read_text())["layers"] == {"skipped": "no time left"}


@pytest.mark.parametrize("error, code", [("", 0), ("RuntimeError: refused", 0), ("wrong: differs by 1", 1)])
def test_a_wrong_network_is_an_error(error: str, code: int) -> None:
    assert cuda.is_wrong({"networks": [{"rows": [{"error": error}]}]}) == bool(code)


def test_findings_are_written_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def step(place: Place) -> Iterator[Any]:
        for count in range(3):
            yield count
            written.append(json.loads((tmp_path / "part.json").read_text())["found"])

    monkeypatch.setitem(_cuda_steps.STEPS, "layers", step)
    assert cuda.main(["--step", "layers", "--output", str(tmp_path / "part.json"), "--device", "cpu"]) == 0
    assert written == [0, 1, 2]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("cuda-*.json")), ids=lambda path: path.stem)
def test_the_page_of_a_record(path: Path) -> None:
    text = page(path)
    record = json.loads(path.read_text())
    assert record["environment"]["cuda_device"] in text
    assert text.count("\n| ") > len(record["layers"])


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert cuda.main(["--output", str(tmp_path)]) == 2
    assert "no CUDA device; try --device cpu --dry" in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "benchmarks.cuda"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--output DIR is needed" in done.stderr
