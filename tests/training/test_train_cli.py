"""`python -m benchmarks.train`: what it writes, how it is killed and goes on, what it says when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_harness import at_step

import fxprune
from benchmarks import train
from fxprune.models import load_model
from fxprune.training.data import DataError
from fxprune.training.data.sources import Data
from fxprune.training.loop import Trainer

pytestmark = pytest.mark.forks

ROOT = Path(__file__).parents[2]
STEPS = 20  # of an epoch: 1,237 images, 64 at a time
PLANNED = ("--ratio", "0.5", "--calibration-images", "50")


def small() -> nn.Sequential:
    """For digits; `--model test_train_cli:small`."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def arguments(output: Path, *more: str) -> list[str]:
    base = (
        "--model test_train_cli:small --data digits --validation 200 --epochs 2 --lr 0.1 --schedule cosine --threads 1"
    )
    return [*base.split(), "--output", str(output), *more]


def log_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "log.json").read_text())
    return found


def weights(folder: Path, name: str = "model.pt") -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / name, weights_only=True)
    return state


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with a plan that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main(arguments(folder, *PLANNED)) == 0
    return folder


def test_it_writes_networks_that_belong_together(whole: Path) -> None:
    log, plan = log_of(whole), fxprune.PrunePlan.from_json((whole / "plan.json").read_text())
    assert {path.name for path in whole.iterdir()} == {
        "best.pt", "checkpoint.pt", "compiled.pt", "log.json", "model.pt", "plan.json",
    }  # fmt: skip
    trained = load_model("test_train_cli:small", whole / "model.pt")
    kernels = plan.layers["3"]
    assert not trained.get_parameter("3.weight")[~kernels.mask()].any()
    compiled = fxprune.load(whole / "compiled.pt", small()).eval()
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(compiled(images), trained(images), rtol=1e-4, atol=1e-5)
    last, best = log["result"]["last_epoch"], log["result"]["best_validation_epoch"]
    assert log["result"]["rewritten"]["test_accuracy"] == pytest.approx(last["test_accuracy"], abs=1 / 360)
    assert log["result"]["report"]["params_pruned"] < log["result"]["report"]["params_dense"]
    assert [epoch["epoch"] for epoch in log["epochs"]] == [0, 1, 2]
    accuracies = [epoch["validation_accuracy"] for epoch in log["epochs"]]
    assert best["validation_accuracy"] == max(accuracies[1:]) > 0.3
    assert last["validation_accuracy"] == accuracies[-1]
    assert log["images"] == {"training": 1237, "validation": 200, "test": 360}
    assert str(whole.parent) not in (whole / "log.json").read_text()


def test_weights_of_some_epochs_are_kept(tmp_path: Path, whole: Path) -> None:
    assert train.main([*arguments(tmp_path, "--keep-epochs", "0-1")]) == 0
    assert {path.name for path in tmp_path.glob("epoch_*")} == {"epoch_0.pt", "epoch_1.pt"}
    assert equal(weights(tmp_path, "epoch_0.pt"), load_model("test_train_cli:small", None, 0).state_dict())
    assert not equal(weights(tmp_path, "epoch_1.pt"), weights(tmp_path, "epoch_0.pt"))
    assert not equal(weights(tmp_path, "epoch_1.pt"), weights(tmp_path)), "there were two epochs"
    for wrong in ("1-0", "first", "1-2-3"):
        with pytest.raises(SystemExit, match="2"):
            train.main(arguments(tmp_path / "other", "--keep-epochs", wrong))


def test_its_networks_are_where_the_next_run_begins(whole: Path, tmp_path: Path) -> None:
    more = ["--weights", str(whole / "model.pt"), "--plan", str(whole / "plan.json"), "--epochs", "0"]
    assert train.main([*arguments(tmp_path / "next"), *more]) == 0
    before = log_of(tmp_path / "next")["epochs"][0]["validation_accuracy"]
    assert before == log_of(whole)["epochs"][-1]["validation_accuracy"]
    assert equal(weights(tmp_path / "next"), weights(whole))


def test_the_test_images_are_looked_at_in_the_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    read, step = Data.test_batches, Trainer._step
    monkeypatch.setattr(Data, "test_batches", lambda self, batch: events.append("test") or read(self, batch))  # type: ignore[func-returns-value]
    monkeypatch.setattr(Trainer, "_step", lambda self, *rest: events.append("step") or step(self, *rest))  # type: ignore[func-returns-value]
    assert train.main(arguments(tmp_path / "a")) == 0
    assert events.index("test") == events.count("step") == 2 * STEPS
    events.clear()
    assert train.main(arguments(tmp_path / "b", "--test-each-epoch")) == 0
    assert events.index("test") == 0  # control
    a, b = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert a["result"] == b["result"]  # and it chooses nothing
    assert b["epochs"][2]["test_accuracy"] == b["result"]["last_epoch"]["test_accuracy"]


@pytest.mark.parametrize(
    "more",
    [
        ["--ratio", "0.5", "--train", "compiled"],
        ["--ratio", "0.5", "--granularity", "filter", "--round-to", "4", "--calibration-images", "20"],
        pytest.param(["--ratio", "0.5", "--sparsify", "agp", "--channels-last"], marks=pytest.mark.slow),
        ["--ratio", "0.5", "--amp", "bf16", "--distill", "0.5:4", "--schedule", "onecycle"],
    ],
)
def test_other_ways_to_train(tmp_path: Path, more: list[str]) -> None:
    assert train.main(arguments(tmp_path, *more)) == 0
    compiled = fxprune.load(tmp_path / "compiled.pt", small()).eval()
    report = log_of(tmp_path)["result"]["report"]
    assert report["params_pruned"] < report["params_dense"]
    assert (tmp_path / "model.pt").exists() is ("compiled" not in more)
    if (tmp_path / "model.pt").exists():
        images = torch.randn(4, 1, 8, 8)
        masked = load_model("test_train_cli:small", tmp_path / "model.pt")
        torch.testing.assert_close(compiled(images), masked(images), rtol=1e-4, atol=1e-5)


# --- kill and resume --------------------------------------------------------------------------------------------------


def in_child(act: Callable[[], int]) -> int:
    """What a process of its own ends with, negative for a signal. A fork has all imports behind it."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # should it hang
        try:
            os._exit(act())
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that may have used CUDA cannot fork")
def test_killed_and_resumed_gives_the_same_weights(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(tmp_path, *PLANNED, "--checkpoint-every", "5")
    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 7, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert in_child(lambda: train.main(given)) == -signal.SIGKILL
    progress = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["content"]["trainer"]["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 5)
    assert not (tmp_path / "model.pt").exists()
    assert train.main([*given, "--resume"]) == 0
    for name in ("model.pt", "best.pt"):
        assert equal(weights(tmp_path, name), weights(whole, name))
    assert log_of(tmp_path)["result"] == log_of(whole)["result"]


@pytest.mark.slow
def test_killed_from_outside_at_any_time_and_resumed(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.train", *arguments(tmp_path, *PLANNED), "--checkpoint-every", "1"]
    environment = os.environ | {
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    kills = 0
    for delay in (0.0, 0.11, 0.23, 0.37):  # seconds after its first, or next, sign of life
        with subprocess.Popen([*command, "--resume"], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            running.stdout.readline()
            time.sleep(delay)
            running.kill()
        kills += running.returncode == -signal.SIGKILL
    assert kills >= 2
    assert subprocess.run([*command, "--resume"], cwd=ROOT, env=environment, check=False).returncode == 0
    assert equal(weights(tmp_path), weights(whole))


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_asked_to_stop_it_saves_and_goes_on_later(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    given = arguments(tmp_path, *PLANNED)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 13, lambda: os.kill(os.getpid(), number))
        assert train.main(given) == code
    assert signal.getsignal(number) == before
    assert "stopped after step 14 of 20 in epoch 1; its state is saved, --resume goes on" in capsys.readouterr().err
    assert train.main([*given, "--resume"]) == 0
    assert equal(weights(tmp_path), weights(whole))


def test_resuming_a_finished_run_changes_nothing(whole: Path) -> None:
    before, log = weights(whole), log_of(whole)
    assert train.main(arguments(whole, *PLANNED, "--resume")) == 0
    assert equal(weights(whole), before)
    assert log_of(whole)["result"] == log["result"]


def test_pruning_while_training_is_resumed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--ratio", "0.5", "--sparsify", "iterative"]
    assert train.main(arguments(tmp_path / "whole", *more)) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 17, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.main(arguments(tmp_path / "parts", *more)) == 143
    assert train.main(arguments(tmp_path / "parts", *more, "--resume")) == 0
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert (tmp_path / "parts" / "plan.json").read_text() == (tmp_path / "whole" / "plan.json").read_text()


# --- faults -----------------------------------------------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """What it says; nothing but one line, and exit code 2."""
    capsys.readouterr()
    assert train.main(list(given)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("benchmarks.train: error: ")
    return lines[0]


def test_an_existing_run_is_not_overwritten(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "checkpoint.pt").read_bytes()
    assert "go on with --resume, or choose another one" in complaint(capsys, *arguments(whole))
    said = complaint(
        capsys, *arguments(whole, "--ratio", "0.25", "--calibration-images", "50", "--resume", "--seed", "1")
    )
    assert "ratio 0.5 there, 0.25 here; seed 0 there, 1 here" in said
    assert "lr" not in said
    assert (whole / "checkpoint.pt").read_bytes() == before


def test_a_full_disk_loses_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path, *PLANNED)
    save, left = torch.save, iter([True, True, False])

    def fill(content: object, path: Path) -> None:
        if not next(left):
            path.write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        assert "checkpoint.pt: cannot be written" in complaint(capsys, *given)
    assert not list(tmp_path.glob("*.partial"))
    assert train.main([*given, "--resume"]) == 0
    assert equal(weights(tmp_path), weights(whole))


def test_a_damaged_image_ends_it_and_once_it_is_mended_it_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged() -> None:
        raise DataError("train/cat/7.png: cannot be decoded; remove or replace it")

    given = arguments(tmp_path, *PLANNED, "--checkpoint-every", "4")
    with monkeypatch.context() as patch:
        at_step(patch, 7, damaged)
        assert "train/cat/7.png: cannot be decoded" in complaint(capsys, *given)
    assert train.main([*given, "--resume"]) == 0
    assert equal(weights(tmp_path), weights(whole))


def test_a_truncated_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments(tmp_path, "--epochs", "0")) == 0
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert "checkpoint.pt: truncated" in complaint(capsys, *arguments(tmp_path, "--epochs", "0", "--resume"))


def test_a_loss_that_is_not_finite_stops_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the loss is " in complaint(capsys, *arguments(tmp_path, "--lr", "1e30"))
    trainer = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["content"]["trainer"]
    assert trainer["progress"]["epoch"] == 0
    assert all(bool(tensor.isfinite().all()) for tensor in trainer["model"].values())


@pytest.mark.parametrize(
    "more, said",
    [
        (["--data", "mnist"], "'mnist': must be cifar10:DIR"),
        (["--data", "folder:nowhere"], "nowhere"),
        (["--validation", "5000"], "5000"),
        (["--model", "test_train_cli:large"], "has no 'large'"),
        (["--model", "fxprune.models.cifar:CifarVGG16"], "cannot run on images of shape (1, 8, 8)"),
        (["--weights", "nowhere.pt"], "nowhere.pt: cannot be read"),
        (["--plan", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--ratio", "1.5"], "ratio 1.5 is not in [0, 1)"),
        (["--lr", "-1"], "lr is -1.0; it must be positive"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    assert said in complaint(capsys, *arguments(tmp_path, *more))


@pytest.mark.parametrize(
    "more",
    [
        ["--plan", "p.json", "--ratio", "0.5"],
        ["--ratio", "0.5", "--macs", "0.5"],
        ["--sparsify", "agp"],
        ["--train", "compiled"],
        ["--ratio", "0.5", "--sparsify", "agp", "--calibration-images", "5"],
        ["--distill", "half"],
        ["--checkpoint-every", "0"],
    ],
)
def test_arguments_that_do_not_go_together(tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(arguments(tmp_path / "out", *more))
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()
