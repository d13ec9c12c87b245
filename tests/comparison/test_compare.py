"""The comparison: equal MACs, equal images and batches, means with their intervals, runs that are not repeated."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from benchmarks.compare import main
from fxprune.comparison import accuracy, methods
from fxprune.comparison.accuracy import Entry, Setting, entries
from fxprune.comparison.layer_calls import count_macs
from fxprune.comparison.methods import METHODS, Case, Method, Pruned, uniform_ratio
from fxprune.comparison.plots import draw_fronts
from fxprune.comparison.points import Mean, Point, Run, points_of, table
from fxprune.comparison.requests import ComparisonRequest
from fxprune.training.data.sources import open_data
from fxprune.training.recipe import Recipe


def network() -> nn.Module:
    """Wide enough for 8 groups and for MACs that come near to any share."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 48, 3, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    ).eval()


def case(share: float = 0.6) -> Case:
    generator = torch.Generator().manual_seed(0)
    model = network()
    earlier = [{name: t * scale for name, t in model.state_dict().items()} for scale in (0.5, 0.9)]
    images, labels = torch.rand(64, 1, 8, 8, generator=generator), torch.arange(64) % 10
    return Case(model, share, images, labels, snapshots=earlier)


# --- methods ----------------------------------------------------------------------------------------------------------


FILTERS = (
    "filters", "filters-refit", "filters-error", "filters-error-recovered", "pairs", "pairs-pure", "combined",
    "tp-magnitude-recovered",
)  # fmt: skip


BRANCHES = ("branches", "branches-recovered")
UNTRIED = ("dense", *BRANCHES)


SLOW = ("tmi", "tmi-refit", "fxprune-8", "filters-refit", "auto-recovered", "fxprune-8-recovered")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS if name not in UNTRIED]
)
def test_each_method_leaves_the_share_and_the_dense_network_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "RECOVERY_STEPS", 5)
    given = case()
    before = {key: tensor.clone() for key, tensor in given.model.state_dict().items()}
    pruned = METHODS[name].prune(given)
    network = pruned.network if pruned.plan is None else accuracy._rewritten(pruned, given)
    share = count_macs(network, given.example) / count_macs(given.model, given.example)
    assert share == pytest.approx(0.6, rel=0.025)  # 16 channels in 8 groups: a step is one sixteenth
    assert all(torch.equal(before[key], tensor) for key, tensor in given.model.state_dict().items())
    if pruned.plan is not None:
        removed, grouped = bool(pruned.plan.removed), bool(pruned.plan.layers)
        if name.startswith("auto"):
            assert removed or grouped
        else:
            assert removed == (name in FILTERS)
            assert grouped == (name == "combined" or name not in FILTERS)


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_leave_no_more_than_the_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)
            self.inner = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for conv in self.inner:
                x = x + conv(x.relu())
            y: Tensor = self.head(x.mean((2, 3)))
            return y

    monkeypatch.setattr(methods, "RECOVERY_STEPS", 5)
    given = replace(case(0.75), model=Residual().eval())
    pruned = METHODS[name].prune(given)
    assert pruned.plan is not None
    assert len(pruned.plan.branches) == 1
    share = count_macs(accuracy._rewritten(pruned, given), given.example) / count_macs(given.model, given.example)
    assert 0.6 < share <= 0.75


def test_refitted_networks_are_nearer_to_the_dense_one() -> None:
    given = case()

    def features(model: nn.Module) -> torch.Tensor:
        assert isinstance(model, nn.Sequential)
        found: torch.Tensor = model[:9](given.images)
        return found

    with torch.no_grad():
        dense = features(given.model)
        errors = [
            float((features(METHODS[name].prune(given).network) - dense).square().mean())
            for name in ("srgkp", "srgkp-refit")
        ]
    assert errors[1] < 0.5 * errors[0]


def test_the_uniform_ratio_comes_as_near_as_any() -> None:
    given, options = case(), {"groups": 8, "form": "overlap"}
    dense = count_macs(given.model, given.example)

    def gap(ratio: float) -> float:
        plan = fxprune.make_plan(given.model, ratio, example_inputs=given.example, groups=8, form="overlap")
        pruned = fxprune.rewrite(fxprune.mask(given.model, plan), plan, given.example)
        return abs(count_macs(pruned, given.example) / dense - 0.6)

    found = gap(uniform_ratio(given.model, given.example, 0.6, options))
    others = [gap(step / 16) for step in (5, 6, 7)]
    assert found <= min(others) + 1e-9
    assert found < max(others)  # control: not all are as near


# --- statistics -------------------------------------------------------------------------------------------------------


def a_run(method: str, share: float, seed: int, after: float) -> Run:
    return Run(method, share, seed, 600, share, 1000, after - 0.1, after, 1.0, 1.0, 1.0)


def test_intervals_are_those_of_student() -> None:
    found = Mean.of([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # table of t, 2 degrees of freedom, 0.975
    assert Mean.of([1.0]) == Mean(1.0, None)


def test_what_is_lost_is_paired_by_seed() -> None:
    dense = {0: 0.8, 1: 0.9, 2: 0.7}
    runs = [a_run("dense", 1.0, seed, after) for seed, after in dense.items()]
    runs += [a_run("fxprune", 0.5, seed, dense[seed] - 0.02) for seed in (2, 0, 1)]
    points = {point.method: point for point in points_of(runs)}
    lost = points["fxprune"].lost
    assert lost is not None
    assert lost.value == pytest.approx(0.02)
    assert lost.half_width == pytest.approx(0, abs=1e-9)
    after = points["fxprune"].after.half_width
    assert after is not None
    assert after > 0.1  # control: unpaired it would be lost in the spread


def test_the_table_says_where_the_share_was_missed() -> None:
    runs = [a_run("dense", 1.0, 0, 0.9), a_run("fxprune", 0.5, 0, 0.8), a_run("srgkp", 0.5, 0, 0.8)]
    runs[2] = replace(runs[2], macs_share=0.52)
    rows = [{"network": "fxprune", "ratio": 0.5, "batch": 4, "seconds": 0.002, "relative": 0.75}]
    rows.append({"network": "fxprune", "ratio": 0.25, "batch": 4, "seconds": 9.0, "relative": 9.0})
    dense, published, ours = table(points_of(runs, rows)).splitlines()[2:]
    assert "asked for" not in dense + ours
    assert "0.520 (asked for 0.5)" in published
    assert ours.endswith("| 0.75 (2.00 ms) |")


def test_pictures(tmp_path: Path) -> None:
    runs = [
        a_run(method, share, seed, 0.8) for method in ("dense", "fxprune") for share in (0.4, 0.6) for seed in (0, 1)
    ]
    rows = [{"network": "fxprune", "ratio": 0.4, "batch": 1, "seconds": 1.0, "relative": 0.5}]
    points: list[Point] = points_of(runs, rows)
    for file in draw_fronts(points, tmp_path / "all", "all of them"):
        assert file.stat().st_size > 10_000
    text = (tmp_path / "all.svg").read_text()
    assert "time at batch 1" in text


# --- images and batches -----------------------------------------------------------------------------------------------


def test_methods_share_images_and_batches_and_seeds_do_not() -> None:
    data = open_data("digits", validation=200)
    request = ComparisonRequest(
        model="net", data="digits", output=Path(), recipe=Recipe(epochs=1), train_images=300, calibration_images=100
    )
    setting = Setting(network(), data, request)
    one, same, other = setting.case(1, 0.6), setting.case(1, 0.4), setting.case(2, 0.6)
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.labels, same.labels)
    assert not torch.equal(one.images, other.images)
    training = setting.training(1)
    assert training.train_count == 300
    assert training.validation_count == 0
    assert torch.equal(training.plain_batch(torch.arange(100))[0], one.images)
    assert len(set(training.training.tolist()) & set(data.validation.tolist())) == 0
    assert torch.equal(training.order(0), setting.training(1).order(0))
    assert not torch.equal(training.order(0), setting.training(2).order(0))
    evaluated = {}
    for part in ("test", "validation"):
        chosen = replace(setting, request=replace(request, evaluate=part))
        evaluated[part] = sum(len(labels) for _, labels in chosen.evaluation_batches())
    assert evaluated == {"test": 360, "validation": 200}


# --- the command ------------------------------------------------------------------------------------------------------


SMALL = (
    "--model test_compare:network --data digits --validation 200 --train-images 512 --calibration-images 64 "
    "--shares 0.6 --epochs 1 --batch 16 --lr 0.1 --schedule constant"
)


def command(folder: Path, *more: str) -> list[str]:
    return [*SMALL.split(), "--output", str(folder), *more]


PAIR = ("--methods", "dense,filters", "--seeds", "0,1")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds; not to be changed."""
    folder = tmp_path_factory.mktemp("done")
    assert main(command(folder, *PAIR)) == 0
    return folder


@pytest.fixture
def undrawn(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all else; `done` has some."""
    monkeypatch.setattr(accuracy, "draw_fronts", lambda *arguments: [])


def forbidden(*arguments: object) -> tuple[Run, Pruned]:
    raise AssertionError("ran what is done")


def test_a_comparison(done: Path) -> None:
    record = json.loads((done / "comparison.json").read_text())
    assert [(run["method"], run["seed"]) for run in record["runs"]] == [
        ("dense", 0), ("filters", 0), ("dense", 1), ("filters", 1),
    ]  # fmt: skip
    dense, pruned = record["runs"][:2]
    assert dense["macs_share"] == 1
    assert pruned["macs_share"] == pytest.approx(0.6, rel=0.01)
    assert pruned["parameters"] < dense["parameters"]
    assert all(run["before"] < 0.2 < run["after"] for run in record["runs"])
    assert dense["train_loss"] != record["runs"][2]["train_loss"]  # another seed, other batches
    assert [point["seeds"] for point in record["points"]] == [2, 2]
    assert all((done / f"comparison.{suffix}").stat().st_size for suffix in ("md", "png", "svg"))


@pytest.mark.usefixtures("undrawn")
def test_what_is_done_is_not_repeated(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "run", forbidden)
    assert main(command(done, *PAIR)) == 0
    with pytest.raises(AssertionError, match="ran what is done"):  # control
        main(command(done, "--methods", "dense", "--seeds", "2"))


@pytest.mark.usefixtures("undrawn")
def test_a_repeated_run_is_the_same(done: Path, tmp_path: Path) -> None:
    assert main(command(tmp_path, "--methods", "filters", "--seeds", "1")) == 0
    name = "runs/filters-0.6-1.json"
    ours, theirs = (json.loads((folder / name).read_text())["run"] for folder in (tmp_path, done))
    for key in ("prune_seconds", "train_seconds"):
        assert ours.pop(key) != theirs.pop(key)
    assert ours == theirs


@pytest.mark.usefixtures("undrawn")
def test_one_plan_serves_all_seeds_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = []
    method = METHODS["filters"]

    def seen(case: Case) -> Pruned:
        cases.append(case)
        return method.prune(case)

    monkeypatch.setitem(METHODS, "filters", replace(method, prune=seen))
    for more, times in ((("--plan-seed", "0"), 1), ((), 2)):  # and the control, where each seed plans
        cases.clear()
        folder = tmp_path / str(times)
        assert main(command(folder, "--methods", "filters", "--seeds", "0,1", *more)) == 0
        assert len(cases) == times
        first, second = json.loads((folder / "comparison.json").read_text())["runs"]
        assert (first["prune_seconds"] == second["prune_seconds"]) is (times == 1)
        assert first["train_loss"] != second["train_loss"]


def test_other_settings_are_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(done, *PAIR, "--lr", "0.5")) == 2
    assert "lr 0.1 there, 0.5 here" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_latency_is_a_step_of_its_own(
    tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(done, tmp_path)
    monkeypatch.setattr(accuracy, "run", forbidden)
    monkeypatch.setenv("FXPRUNE_NATIVE", "0")  # building the kernel takes longer than all of this
    step = command(folder, "--latency-only", "--rounds", "1", "--batches", "2")
    assert main(step) == 0
    rows = json.loads((folder / "comparison.json").read_text())["latency"]["rows"]
    assert [(row["network"], row["ratio"], row["error"]) for row in rows] == [("dense", None, ""), ("filters", 0.6, "")]
    assert "time, batch 2" in (folder / "comparison.md").read_text()
    capsys.readouterr()
    edit(folder / "runs" / "filters-0.6-0.json", lambda record: record["run"].update(macs=1))
    assert main(step) == 2
    assert "1 in its run" in capsys.readouterr().err


def test_latency_needs_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--latency-only")) == 2
    assert "no run is done" in capsys.readouterr().err


def test_a_damaged_record_is_named(tmp_path: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(done, tmp_path)
    broken = folder / "runs" / "dense-1-0.json"
    broken.write_text(broken.read_text()[:40])
    assert main(command(folder, *PAIR)) == 2
    assert "dense-1-0.json: is no record" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_method_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case) -> Pruned:
        raise fxprune.PlanError("not today")

    monkeypatch.setitem(METHODS, "filters", Method("filters", "filters", fails))
    assert main(command(tmp_path, "--methods", "filters,dense", "--seeds", "0")) == 1
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["failed"] == {"filters-0.6-0": "PlanError: not today"}
    assert [run["method"] for run in record["runs"]] == ["dense"]


def test_entries_do_a_seed_of_all_methods_first() -> None:
    assert entries(["dense", "fxprune"], [0.6, 0.4], [0, 1])[:4] == [
        Entry(0, 1.0, "dense"), Entry(0, 0.6, "fxprune"), Entry(0, 0.4, "fxprune"), Entry(1, 1.0, "dense"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong, word",
    [
        (("--methods", "fxprune,best"), "'best'"),
        (("--methods", "tmi"), "--snapshots"),
        (("--shares", "0.5,1.5"), "no share"),
        (("--validation", "0", "--evaluate", "validation"), "--validation 0"),
    ],
)
def test_wrong_arguments(wrong: tuple[str, ...], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command(tmp_path, *wrong))
    assert word in capsys.readouterr().err


def test_too_many_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--train-images", "5000")) == 2
    assert "there are 1237 training images" in capsys.readouterr().err


def copied(folder: Path, to: Path) -> Path:
    """A copy of the runs that may be changed."""
    (to / "runs").mkdir()
    for path in (folder / "runs").iterdir():
        (to / "runs" / path.name).write_bytes(path.read_bytes())
    return to


def edit(path: Path, change: Callable[[Any], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
