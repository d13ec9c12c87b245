"""`fxprune bench`, `train` and `compare`: the product's commands, and the fronts of the repository over them."""

import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from training_harness import at_step

import fxprune
from benchmarks import compare as compare_front
from benchmarks import latency as latency_front
from benchmarks import train as train_front
from fxprune.cli import program as cli
from fxprune.comparison import accuracy, latency, methods
from fxprune.comparison.extras import ComparisonError
from fxprune.comparison.requests import ComparisonRequest, LatencyRequest, choose_methods
from fxprune.models import load_model
from fxprune.training.loop import TrainingError
from fxprune.training.recipe import Recipe
from fxprune.training.run import Pruning

DIGITS = ("--data", "digits", "--validation", "200", "--epochs", "1", "--lr", "0.1", "--threads", "1")


def small() -> nn.Sequential:
    """For digits, wide enough for groups; `test_product:small`."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run, as those of a user would."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of a race may be as short as they like."""
    monkeypatch.setattr(latency, "MIN_SECONDS", 0.0)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if a package were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file()}


# --- bench ------------------------------------------------------------------------------------------------------------

BENCH = ("bench", "digits_resnet", "--rounds", "2", "--threads", "1")


@pytest.mark.usefixtures("quick")
def test_bench_shows_a_table_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BENCH]) == 0
    captured = capsys.readouterr()
    assert "size 1+8+8" in captured.out, "the network's own"
    lines = captured.out.splitlines()
    assert [line.split()[2] for line in lines[2:4]] == ["dense", "fxprune"]
    assert [line.split(":")[0] for line in lines[4:] if line and "worth pruning" not in line] == ["ms"]
    assert captured.err == ""
    assert files() == set()


@pytest.mark.usefixtures("quick")
def test_bench_json_is_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BENCH, "--ratio", "0.5,0.75", "--json", "--output", "new/r.json", "--plot", "r.svg"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(Path("new/r.json").read_text())
    assert document["settings"]["model"] == "digits_resnet"
    assert {row["ratio"] for row in document["rows"]} == {None, 0.5, 0.75}
    assert files() == {"new/r.json", "r.svg"}
    assert cli.main(["bench", "--from", "new/r.json", "--plot", "again.png"]) == 0
    assert capsys.readouterr().out.startswith("2 points in again.png")


@pytest.mark.usefixtures("quick")
def test_bench_and_its_front_measure_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--rounds", "1", "--threads", "1", "--ratio", "0.75", "--output"]
    assert cli.main(["bench", "digits_resnet", *common, "a.json"]) == 0
    assert latency_front.main(["--model", "digits_resnet", *common, "b.json"]) == 0
    ours, theirs = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert ours["settings"] == theirs["settings"]
    assert [row["macs_share"] for row in ours["rows"]] == [row["macs_share"] for row in theirs["rows"]]


@pytest.mark.usefixtures("quick")
def test_bench_times_what_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    for ratio in ("0.5", "0.75"):
        assert cli.main(["compile", "digits_resnet", "--ratio", ratio, "--granularity", "filter", "-o", ratio]) == 0
    capsys.readouterr()
    saved = [*BENCH, "--saved", "0.5", "0.75"]
    assert cli.main([*saved, "--json", "--output", "r.json", "--plot", "r.svg"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["saved"] == ["0.5", "0.75"]
    rows = {row["network"]: row for row in document["rows"] if row["best"]}
    assert list(rows) == ["dense", "0.5", "0.75"], "what was saved, instead of a ratio"
    assert 0 < rows["0.75"]["macs_share"] < rows["0.5"]["macs_share"] < 1
    assert all(row["seconds"] > 0 and not row["error"] for row in rows.values())
    assert cli.main([*saved, "--ratio", "0.5"]) == 0
    names = [line.split()[2] for line in capsys.readouterr().out.splitlines()[2:6]]
    assert names == ["dense", "0.5", "0.75", "fxprune"], "and beside one"


def test_bench_refuses_files_that_do_not_belong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "resnet20", "--ratio", "0.5", "-o", "other.pt", "--no-verify"]) == 0
    capsys.readouterr()
    assert "other.pt" in error_of(capsys, *BENCH, "--saved", "other.pt")
    assert "absent.pt" in error_of(capsys, *BENCH, "--saved", "absent.pt")
    with pytest.raises(SystemExit, match="2"):
        cli.main([*BENCH, "--saved", "other.pt", "--against", "filters"])
    assert "give --ratio" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_a_wrong_network_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite = fxprune.rewrite

    def broken(masked: nn.Module, plan: fxprune.PrunePlan, inputs: torch.Tensor) -> torch.fx.GraphModule:
        pruned = rewrite(masked, plan, inputs)
        with torch.no_grad():
            next(pruned.parameters()).mul_(1.5)
        return pruned

    monkeypatch.setattr(fxprune, "rewrite", broken)
    assert cli.main([*BENCH]) == 1
    assert "wrong: differs by" in capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with one line on stderr."""
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("fxprune: error: ")
    return captured.err


@pytest.mark.parametrize(
    "package,arguments,extra",
    [("torch_pruning", ["--against", "torch-pruning"], "torch-pruning"), ("matplotlib", ["--plot", "a.png"], "plots")],
)
def test_bench_names_the_extra_that_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, arguments: list[str], extra: str
) -> None:
    without(monkeypatch, package)
    said = error_of(capsys, *BENCH, *arguments)
    assert f"{package} is not installed; pip install 'fxprune[{extra}]'" in said
    assert files() == set()


def test_bench_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in error_of(capsys, *BENCH, "--device", "cuda")
    assert "no CUDA graphs on the CPU" in error_of(capsys, *BENCH, "--runtime", "cudagraph")
    assert "resnet2: no such model; did you mean" in error_of(capsys, "bench", "resnet2", "--rounds", "1")
    with pytest.raises(SystemExit, match="2"):
        cli.main([*BENCH, "--against", "filter"])
    assert "there is no rival 'filter' (near: 'filters'); choose from" in capsys.readouterr().err
    Path("a.json").write_text("{}")
    assert "a.json: is no record of fxprune bench" in error_of(capsys, "bench", "--from", "a.json", "--plot", "a.png")
    assert "b.json" in error_of(capsys, "bench", "--from", "b.json", "--plot", "a.png")


# --- train ------------------------------------------------------------------------------------------------------------


def train(*more: str, output: str = "run") -> list[str]:
    return ["train", "test_product:small", *DIGITS, "--output", output, *more]


def test_train_and_what_is_made_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(train("--ratio", "0.5")) == 0
    assert files() == {
        f"run/{name}" for name in ("best.pt", "checkpoint.pt", "compiled.pt", "log.json", "model.pt", "plan.json")
    }
    assert capsys.readouterr().err == ""
    assert cli.main(["report", "run/compiled.pt", "test_product:small"]) == 0
    assert cli.main(["verify", "run/compiled.pt", "test_product:small", "--weights", "run/model.pt",
                     "--input-size", "2,1,8,8"]) == 0  # fmt: skip


def test_train_and_its_front_go_on_with_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert cli.main(train(output="whole")) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 9, stop)
        assert cli.main(train(output="part")) == 143
    assert capsys.readouterr().err.startswith("fxprune: stopped after step 10 of ")
    front = ["--model", *train("--resume", output="part")[1:]]
    with monkeypatch.context() as patch:
        at_step(patch, 3, stop)
        assert train_front.main(front) == 143
    assert capsys.readouterr().err.startswith("benchmarks.train: stopped after step ")
    assert cli.main(train("--resume", output="part")) == 0
    whole, part = (torch.load(f"{folder}/model.pt", weights_only=True) for folder in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)


@pytest.mark.parametrize("name", ["train", "compare"])
def test_a_machine_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = train() if name == "train" else compared("--methods", "dense")
    assert "torch sees no CUDA device" in error_of(capsys, *given, "--device", "cuda")
    assert files() == set()


def test_train_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "lr is -1.0; it must be positive" in error_of(capsys, *train("--lr", "-1"))
    assert "nowhere.pt: cannot be read" in error_of(capsys, *train("--weights", "nowhere.pt"))
    assert files() == set()
    Path("plan.json").write_bytes(b"\xff\xfe no plan")
    assert "plan" in error_of(capsys, *train("--plan", "plan.json"))


@pytest.mark.parametrize(
    "more,said",
    [
        (["--plan", "p.json", "--ratio", "0.5"], "--plan is a plan already"),
        (["--sparsify", "agp"], "are for a pruned network; add --ratio"),
    ],
)
def test_what_does_not_go_together(capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(train(*more))
    captured = capsys.readouterr().err
    assert captured.startswith("usage: fxprune train")
    assert said in captured


def test_what_is_asked_for_checks_itself() -> None:
    with pytest.raises(TrainingError, match="--sparsify prunes while the dense form trains"):
        Pruning(options={"ratio": 0.5}, sparsify="agp", train="compiled")
    with pytest.raises(ComparisonError, match="no such images"):
        ComparisonRequest(
            model="net", data="digits", output=Path(), recipe=Recipe(epochs=1), evaluate="validation", validation=0
        )
    with pytest.raises(ComparisonError, match="no CUDA graphs on the CPU"):
        LatencyRequest(model="net", runtime=["cudagraph"]).check_available()


# --- compare ----------------------------------------------------------------------------------------------------------


def compared(*more: str) -> list[str]:
    few = ("--train-images", "128", "--calibration-images", "32", "--shares", "0.6", "--seeds", "0")
    return ["compare", "test_product:small", *DIGITS, *few, "--output", "cmp", *more]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all else."""
    monkeypatch.setattr(accuracy, "draw_fronts", lambda *arguments: [])


@pytest.mark.usefixtures("undrawn")
def test_compare_and_its_front_go_on_with_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(compared("--methods", "dense,filters")) == 0
    assert "| filters, not refitted | " in capsys.readouterr().out
    monkeypatch.setattr(accuracy, "run", None)  # the control: nothing is run again
    assert compare_front.main(["--model", *compared("--methods", "filters,dense")[1:]]) == 0


def test_compare_without_pictures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without(monkeypatch, "matplotlib")
    assert cli.main(compared("--methods", "dense")) == 0
    said = "fxprune: no pictures: matplotlib is not installed; pip install 'fxprune[plots]'\n"
    assert capsys.readouterr().err == said
    assert files() == {"cmp/comparison.json", "cmp/comparison.md", "cmp/runs/dense-1-0.json"}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("main,speaker", [(cli.main, "fxprune"), (compare_front.main, "benchmarks.compare")])
def test_who_speaks_of_a_method_that_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
    speaker: str,
) -> None:
    def fails(case: methods.Case) -> methods.Pruned:
        raise fxprune.PlanError("not today")

    monkeypatch.setitem(methods.METHODS, "filters", methods.Method("filters", "filters", fails))
    arguments = compared("--methods", "filters")
    assert main(arguments if speaker == "fxprune" else ["--model", *arguments[1:]]) == 1
    assert capsys.readouterr().err == f"{speaker}: filters-0.6-0: PlanError: not today\n"


def test_compare_interrupted_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy, "run", interrupt)
    assert cli.main(compared("--methods", "dense")) == 130
    assert "fxprune: stopped; the same command goes on" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"rows": [{"network": "dense"}]}'])
def test_a_damaged_file_of_times_is_named(capsys: pytest.CaptureFixture[str], content: str) -> None:
    Path("cmp").mkdir()
    Path("cmp/latency.json").write_text(content)
    assert "latency.json: is no record of times" in error_of(capsys, *compared("--methods", "dense"))


def test_all_methods_are_those_that_can_be_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_methods("all", snapshots=True) == list(methods.METHODS)
    without(monkeypatch, "torch_pruning")
    found = choose_methods("all", snapshots=False)
    assert set(methods.METHODS) - set(found) == {"tmi", "tmi-refit"} | {
        name for name in methods.METHODS if name.startswith("tp-")
    }
    with pytest.raises(SystemExit, match="2"):
        cli.main(compared("--methods", "tp-fpgm"))
    assert "pip install 'fxprune[torch-pruning]'" in capsys.readouterr().err


# --- models by name ---------------------------------------------------------------------------------------------------


def test_compile_knows_the_small_networks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "resnet20", "--json", "-o", "r20.pt"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["input_shapes"] == [[2, 3, 32, 32]]
    assert fxprune.load("r20.pt", load_model("resnet20")).training is False
