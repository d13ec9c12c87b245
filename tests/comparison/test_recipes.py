"""Recipes: the experiments of papers in files, run in short on data in the formats of their authors."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets_harness import accept_small, write_batches, write_hundred, write_photo

from fxprune.cli.program import main
from fxprune.comparison import accuracy
from fxprune.comparison.duration import training_seconds
from fxprune.comparison.experiments import DenseTraining, Experiment, parse_recipe, read_recipe, recipe_names
from fxprune.comparison.extras import ComparisonError
from fxprune.comparison.layer_calls import count_macs
from fxprune.comparison.methods import uniform_ratio
from fxprune.comparison.points import Run, beside_published, points_of
from fxprune.models import load_model
from fxprune.training.data.sources import SOURCES, open_data
from fxprune.training.recipe import Recipe

SMALL = """
title = "small"
paper = "nobody's"
model = "digits_resnet"
data = "digits"
methods = ["dense", "filters"]
shares = [0.6]
seeds = [0]
calibration_images = 32
train_images = 128
validation = 200
notes = ["Made up."]

[fine_tuning]
epochs = 1
batch = 32

[dense]
epochs = 4
lr = 0.1
batch = 128
snapshots = [1, 2]

[[published]]
method = "filters"
share = 0.6
dense = 99.0
before = 10.0
after = 98.5
source = "a page that was made up"

[[published]]
label = "another pruner"
share = 0.5
after = 97.0
source = "another page"
"""


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_can_be_followed(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.data in SOURCES
    with torch.device("meta"):
        model = load_model(recipe.model)
    classes = {"cifar10": 10, "cifar100": 100, "caltech101": 101, "folder": 1000}[recipe.data]
    assert list(model.parameters())[-1].shape == (classes,)
    assert recipe.notes, "no protocol is without faults"
    tickets = [method for method in recipe.methods if method.startswith("tmi")]
    assert bool(tickets) == (recipe.dense is not None and recipe.dense.snapshots is not None)
    assert recipe.differences({}, recipe.fine_tuning, recipe.dense) == ()
    assert all(found.source for found in recipe.published)
    assert bool(recipe.published) == name.startswith("tmi-gkp"), "of the other paper no figures are known"


def test_the_main_experiments_of_both_papers_are_there() -> None:
    names = {f"tmi-gkp-resnet{depth}" for depth in (20, 32, 56, 110)} | {"tmi-gkp-resnet50-imagenet"}
    data = ("cifar10", "cifar100", "caltech101")
    names |= {f"filter-variety-{net}-{source}" for net in ("vgg16", "resnet18") for source in data}
    assert names == set(recipe_names())


def test_the_published_share_leaves_nine_of_sixteen_kernel_groups() -> None:
    recipe = read_recipe("tmi-gkp-resnet20")
    model, example = load_model(recipe.model), torch.randn(2, 3, 32, 32)
    ratio = uniform_ratio(model, example, recipe.shares[0], {"method": "srgkp", "groups": 8, "form": "overlap"})
    assert 9 / 16 == pytest.approx(1 - ratio, abs=1 / 64)
    assert count_macs(model, example) == 40_551_040  # as the authors' network; with 9 of 16 it has 23,003,776
    assert 23_003_776 / 40_551_040 == pytest.approx(recipe.shares[0], abs=1e-4)


def test_an_unknown_name_is_told_its_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--recipe", "tmi-gkp-resnet65"]) == 2
    assert "no recipe 'tmi-gkp-resnet65' (near: 'tmi-gkp-resnet56'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, said",
    [
        (("methods = ", "method = "), "recipe x: unknown key 'method' (near: 'methods', 'model'); it may have "),
        (("batch = 32", "btach = 32"), "recipe x, [fine_tuning]: unknown key 'btach' (near: 'batch')"),
        (("label = ", "lable = "), "recipe x, [[published]]: unknown key 'lable' (near: 'label')"),
        (('"filters"]', '"filter"]'), "recipe x: there is no method 'filter' (near: 'filters'"),
        (("shares = [0.6]", 'shares = ["most"]'), "shares is ['most']; it must be a list of numbers"),
        (("seeds = [0]", "seeds = [true]"), "seeds is [True]; it must be a list of integers"),
        (('data = "digits"', ""), "recipe x: data must be there"),
        (("snapshots = [1, 2]", "snapshots = [1, 9]"), "snapshots from epoch 1 to 9: must be two of the epochs 0 to 4"),
        (("snapshots = [1, 2]", "snapshots = [1]"), "snapshots are the first and the last epoch"),
        (('label = "another pruner"', ""), "either 'method', one that is compared, or 'label'"),
        (("[dense]", 'weights = "DEFAULT"\n[dense]'), "[fine_tuning]: unknown key 'weights'"),
        (("shares = [0.6]", 'shares = [0.6]\nweights = "DEFAULT"'), "either [dense] says how"),
        (("[dense]", "[dense"), "recipe x: is no TOML: "),
    ],
)
def test_a_wrong_recipe_is_refused(wrong: tuple[str, str], said: str) -> None:
    assert SMALL.count(wrong[0]) >= 1
    assert parse_recipe("x", SMALL).methods == ("dense", "filters"), "control"
    with pytest.raises(ComparisonError) as caught:
        parse_recipe("x", SMALL.replace(*wrong))
    assert said in str(caught.value)


def test_a_recipe_of_ones_own_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--recipe", str(tmp_path / "mine.toml")]) == 2
    assert "mine.toml: cannot be read" in capsys.readouterr().err
    (tmp_path / "mine.toml").write_text(SMALL)
    assert read_recipe(str(tmp_path / "mine.toml")).name == "mine"


def test_a_shorter_training_keeps_the_same_part_of_it() -> None:
    usual = DenseTraining(recipe=Recipe(epochs=300), snapshots=(35, 70))
    assert usual.lasting(30).snapshots == (4, 7)
    assert list(usual.lasting(1).kept) == [0]
    assert len(usual.kept) == 36, "as published"


# --- what is told -----------------------------------------------------------------------------------------------------


def told(share: float, change: Callable[[Experiment], Experiment] = lambda recipe: recipe) -> str:
    recipe = change(parse_recipe("small", SMALL))
    runs = [Run("dense", 1.0, 0, 1000, 1.0, 9, 0.9, 0.9, 1.0, 1.0, 1.0)]
    runs.append(Run("filters", share, 0, 600, share, 9, 0.2, 0.8, 1.0, 1.0, 1.0))
    differences = recipe.differences({"seeds": (0, 1)}, Recipe(epochs=2, batch=32), recipe.dense)
    return beside_published(points_of(runs), recipe, differences)


def test_published_figures_stand_beside_those_of_the_same_share() -> None:
    text = told(0.6)
    assert "| filters, not refitted | 0.600 | 0.000 M | 20.00 | 80.00 | 10.00 | 10.00 | 98.50 | 0.50 |" in text
    assert "| another pruner | 0.500 |  |  | 97.00 | another page |" in text
    assert "1. Otherwise than in the recipe: seeds 0, 1 in place of 0.\n" in text
    assert "2. Otherwise than in the recipe: fine-tuning: epochs 2 in place of 1.\n" in text
    assert text.endswith("3. Made up.\n")
    other = told(0.4)  # control: of another share there is no figure, and so no column
    assert "published: before" not in other
    assert "98.50 | a page that was made up" in other, "it is in the list all the same"


def test_where_nothing_is_known_it_is_said() -> None:
    text = told(0.6, lambda recipe: replace(recipe, published=()))
    assert "No figures of the paper are known." in text
    assert "98.50" not in text


def test_what_it_will_take_is_measured_and_told() -> None:
    data = open_data("digits", validation=200)
    model = load_model("digits_resnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, many = (training_seconds(model, data, Recipe(epochs=epochs)) for epochs in (1, 1000))
    assert 0 < one < many
    assert training_seconds(model, data, Recipe(epochs=0)) == 0
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all else, and others look at them."""
    monkeypatch.setattr(accuracy, "draw_fronts", lambda *arguments: [])


def record_of(folder: Path) -> Any:
    return json.loads((folder / "comparison.json").read_text())


@pytest.fixture
def small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """A command that was run once."""
    (tmp_path / "small.toml").write_text(SMALL)
    command = ["compare", "--recipe", str(tmp_path / "small.toml"), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    return command


def test_a_recipe_is_one_command(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = capsys.readouterr().out
    assert "training the dense network first, 4 epochs, " in text
    assert "2 runs to do; fine-tuning takes " in text
    folder = tmp_path / "out"
    record = record_of(folder)
    assert [(run["method"], run["share"]) for run in record["runs"]] == [("dense", 1.0), ("filters", 0.6)]
    assert record["runs"][0]["before"] > 0.5, "the dense network was trained"
    assert record["recipe"]["differences"] == []
    assert record["recipe"]["published"][0]["after"] == 98.5
    assert {path.name for path in (folder / "dense").glob("epoch_*.pt")} == {"epoch_1.pt", "epoch_2.pt"}
    assert [name.partition(" ")[0] for name in record["settings"]["snapshots"]] == ["epoch_1.pt", "epoch_2.pt"]
    assert "published: before" in (folder / "comparison.md").read_text()


def test_options_come_before_the_recipe_and_are_told(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dense network is not trained again; the runs are others."""
    monkeypatch.setattr("fxprune.comparison.dense_training.train", lambda request: pytest.fail("trained again"))
    more = ["--methods", "filters-refit", "--shares", "0.5", "--seeds", "1"]
    assert main([*small, *more]) == 0
    assert len(record_of(tmp_path / "out")["runs"]) == 3, "beside those of before"
    assert record_of(tmp_path / "out")["recipe"]["differences"] == [
        "methods filters-refit in place of dense, filters",
        "shares 0.5 in place of 0.6",
        "seeds 1 in place of 0",
    ]
    capsys.readouterr()
    assert main([*small, "--epochs", "2"]) == 2, "runs of other settings"
    assert "epochs 1 there, 2 here" in capsys.readouterr().err
    assert main([*small, "--dense-epochs", "2"]) == 2
    assert "epochs 4 there, 2 here" in capsys.readouterr().err


def test_given_weights_are_not_trained(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = ["--weights", str(tmp_path / "out" / "dense" / "model.pt")]
    command = [*small[:-1], str(tmp_path / "other"), *weights]
    assert main([*command, "--methods", "dense"]) == 0
    record = record_of(tmp_path / "other")
    assert not (tmp_path / "other" / "dense").exists()
    assert "the dense network was given, not trained" in record["recipe"]["differences"]
    assert record["runs"][0]["before"] == record_of(tmp_path / "out")["runs"][0]["before"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--dense-epochs", "1"])
    assert "leave --dense-epochs out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, more",
    [
        ("tmi-gkp-resnet20", ("--methods", "dense,srgkp")),
        ("filter-variety-vgg16-cifar100", ("--methods", "dense,pairs", "--shares", "0.5", "resnet20?classes=100")),
        ("filter-variety-resnet18-caltech101", ("--methods", "dense", "--batch", "8")),
    ],
)
def test_recipes_run_in_short_on_data_of_their_format(
    name: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_small(monkeypatch)
    (tmp_path / "data").mkdir()
    recipe = read_recipe(name)
    where = recipe.data
    if where == "caltech101":
        for label, kind in enumerate(("BACKGROUND_Google", "ant", "bee", "cat")):
            for number in range(1, 6):
                photo = tmp_path / "data" / "caltech101" / "101_ObjectCategories" / kind / f"image_{number:04d}.jpg"
                write_photo(photo, 40 * label)
        where = f"{where}:{tmp_path / 'data'}?size=32"
    else:
        (write_batches if where == "cifar10" else write_hundred)(tmp_path / "data")
        where = f"{where}:{tmp_path / 'data'}"
    command = ["compare", "--recipe", name, "--data", where, "--output", str(tmp_path / "out"), "--seeds", "0"]
    command += ["--calibration-images", "8", "--train-images", "8", "--dense-epochs", "1", "--epochs", "1"]
    assert main([*command, *more]) == 0
    record = record_of(tmp_path / "out")
    assert len(record["runs"]) == more[1].count(",") + 1
    assert f"fine-tuning: epochs 1 in place of {recipe.fine_tuning.epochs}" in record["recipe"]["differences"]
    model = "model resnet20?classes=100 in place of cifar_vgg16?classes=100"
    assert (model in record["recipe"]["differences"]) == (more[-1] == "resnet20?classes=100"), "VGG-16 takes long"
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert all(note in text for note in recipe.notes)
    if name == "tmi-gkp-resnet20":
        assert "| 25.40 | 91.98 |" in text, "published for SR-GKP, beside what was measured"
        assert record["runs"][1]["parameters"] == 152_794, "as the authors count"


def test_without_the_usual_folder_it_is_said_where_images_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--recipe", "tmi-gkp-resnet56"]) == 2
    assert "--data cifar10:DIR says where they are, and --download fetches them" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_run_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "compare", lambda request, *rest: asked.append(request.methods))
    asked: list[list[str]] = []
    (tmp_path / "small.toml").write_text(SMALL.replace('"filters"]', '"filters", "tmi"]'))
    (tmp_path / "w.pt").write_bytes(b"")
    command = ["compare", "--recipe", str(tmp_path / "small.toml"), "--output", str(tmp_path / "out")]
    for more, methods in (([], ["dense", "filters", "tmi"]), (["--weights", "w.pt"], ["dense", "filters"])):
        assert main([*command, *more]) == 0
        assert asked.pop() == methods
    assert "left out, for want of --snapshots or of a package: tmi" in capsys.readouterr().err


def test_without_a_recipe_all_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "resnet20", "--data", "digits"])
    assert "--output and --epochs are needed, or --recipe" in capsys.readouterr().err


def test_the_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
