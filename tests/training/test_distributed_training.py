"""Two processes that train one network, through gloo on the CPU: the same as one, and a clear end if one is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_harness import at_step

from benchmarks import train
from fxprune.training import processes
from fxprune.training.processes import Group

ROOT = Path(__file__).parents[2]
STEPS = 17  # of an epoch: 1,237 images, 77 at a time, of which each of two processes gets 38 or 39

pytestmark = [
    pytest.mark.forks,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process that may have used CUDA cannot fork"),
]


def plain() -> nn.Sequential:
    """For digits. Without BatchNorm, whose statistics are those of a process's own share, and smooth: where the sum of
    gradients is rounded otherwise, a ReLU at zero would jump.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def arguments(output: Path, *more: str) -> list[str]:
    base = "--model test_distributed_training:plain --data digits --validation 200 --epochs 2 --batch 77 --ratio 0.5"
    return [*base.split(), *"--lr 0.1 --schedule cosine --threads 1 --device cpu --output".split(), str(output), *more]


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return state


def distance(one: Path, other: Path) -> float:
    """Largest difference of two networks' weights."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@contextmanager
def second_process(monkeypatch: pytest.MonkeyPatch, act: Callable[[], int]) -> Iterator[list[int]]:
    """Make this the first process of two; the second, forked off, does `act`. Collects how that one ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(processes, "PATIENCE", timedelta(seconds=60))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(port))
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        patch.setenv("LOCAL_RANK", "0")
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # should it hang
            os.environ.update(RANK="1", LOCAL_RANK="1")
            try:
                os._exit(act())
            finally:
                os._exit(70)
        try:
            yield ended
        finally:
            ended.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert train.main(arguments(folder)) == 0
    return folder


def test_two_processes_train_what_one_trains(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(tmp_path / "two")
    with second_process(monkeypatch, lambda: train.main(given)) as ended:
        assert train.main(given) == 0
    assert ended == [0]
    assert distance(tmp_path / "two", alone) <= 1e-6
    logs = [json.loads((folder / "log.json").read_text()) for folder in (alone, tmp_path / "two")]
    assert [log["environment"]["processes"] for log in logs] == [1, 2]
    losses = [[epoch["train_loss"] for epoch in log["epochs"][1:]] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_control_without_sharing_the_batch_another_network_comes_out(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(tmp_path / "two")
    monkeypatch.setattr(Group, "share", lambda self, positions: (positions[: len(positions) // 2], True))
    with second_process(monkeypatch, lambda: train.main(given)) as ended:
        assert train.main(given) == 0
    assert ended == [0]
    assert distance(tmp_path / "two", alone) > 1e-3


def test_a_killed_process_ends_the_others_and_one_can_go_on(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path / "two", "--checkpoint-every", "3")

    def die() -> int:
        at_step(monkeypatch, STEPS + 8, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return train.main(given)

    began = time.monotonic()
    with second_process(monkeypatch, die) as ended:
        assert train.main(given) == 2
    assert ended == [-signal.SIGKILL]
    assert time.monotonic() - began < 30
    said = capsys.readouterr().err
    assert "process 0 of 2: another one has ended; what was saved last stays, --resume goes on" in said
    progress = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["content"]["trainer"]["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 6)
    assert train.main([*given, "--resume"]) == 0
    assert distance(tmp_path / "two", alone) <= 1e-6


def test_one_process_that_is_asked_to_stop_stops_both(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(tmp_path / "two")

    def be_asked() -> int:
        at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return train.main(given)

    with second_process(monkeypatch, be_asked) as ended:
        assert train.main(given) == 130
    assert ended == [143]
    with second_process(monkeypatch, lambda: train.main([*given, "--resume"])) as ended:
        assert train.main([*given, "--resume"]) == 0
    assert ended == [0]
    assert distance(tmp_path / "two", alone) <= 1e-6


@pytest.mark.slow
def test_torchrun(alone: Path, tmp_path: Path) -> None:
    given = ["-m", "benchmarks.train", *arguments(tmp_path), "--checkpoint-every", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [*launcher, *given], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline()  # the first epoch, number 0
        workers = subprocess.run(
            ["ps", "--ppid", str(running.pid), "-o", "pid="], capture_output=True, text=True, check=True
        )
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        said, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    assert re.search(r"exitcode\s*: -9", said)
    resumed = subprocess.run([*launcher, *given, "--resume"], cwd=ROOT, env=environment, check=False, timeout=120)
    assert resumed.returncode == 0
    assert distance(tmp_path, alone) <= 1e-6
