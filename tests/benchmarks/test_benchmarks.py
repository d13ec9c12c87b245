"""The benchmarks: their own arithmetic on made-up input, and short runs on ../shared where it is present."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import fx, nn

import fxprune
from benchmarks import accuracy, compile_time, planning, recovery
from benchmarks._cost import reset_peak_mb, timed, with_peak
from benchmarks._images import Images, open_disjoint, open_images
from fxprune.criteria.snapshots import Snapshot
from fxprune.environment import environment
from fxprune.training.data.pictures import CIFAR10, IMAGENET, Normalization

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("FXPRUNE_SHARED", ROOT.parent / "shared"))
    if not (folder / "weights").is_dir():
        pytest.skip(f"no trained weights: {folder.name}/weights is absent; set FXPRUNE_SHARED to a folder that has it")
    return folder


class First(nn.Module):
    """Logits for two classes: the first pixel, and 0.5."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.gain * x[:, 0, 0, 0]
        return torch.stack([first, torch.full_like(first, 0.5)], dim=1)


def five_images() -> Images:
    pixels = torch.tensor([0.1, 0.2, 0.6, 0.8, 0.9]).reshape(5, 1, 1, 1).expand(5, 3, 1, 1)
    labels = torch.tensor([1, 0, 0, 0, 1])
    return Images(5, lambda chosen: (pixels[list(chosen)], labels[list(chosen)]))


NOT_NORMALIZED = Normalization((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_comparison_counts_every_image_once(batch: int) -> None:
    found = accuracy.compare(First(), First(0.7), First(0.65), five_images(), NOT_NORMALIZED, batch)
    assert found.images == 5
    assert found.dense == pytest.approx(3 / 5)
    assert found.masked == pytest.approx(2 / 5)
    assert found.compiled == pytest.approx(2 / 5)
    assert found.agreeing == 5
    assert found.difference == pytest.approx(0.05 * 0.9)
    assert found.scale == pytest.approx(0.63)
    assert found.classes == 2
    assert found.agreeing_with_dense == 4  # at 0.6, dense is above 0.5 and masked below
    assert "agreement with the dense model: 4 of 5" in str(found)


def test_comparison_sees_a_disagreement() -> None:
    found = accuracy.compare(First(), First(), First(0.7), five_images(), NOT_NORMALIZED, 2)
    assert found.agreeing == 4
    assert found.agreeing_with_dense == 5


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("accuracy_*.json")), ids=lambda p: p.stem
)
def test_records_can_be_read_back(path: Path) -> None:
    found = accuracy.Comparison(**json.loads(path.read_text())["result"])
    assert found.agreeing == found.images
    assert f"{found.dense:.2%}" in str(found)


def write_sheet(path: Path, seed: int) -> torch.Tensor:
    """Write 5,000 random images of few colours; return them, `(5000, 3, 32, 32)` uint8."""
    colours = np.random.default_rng(seed).integers(0, 256, (5000, 1, 1, 3), dtype=np.uint8)
    images = colours + np.arange(32, dtype=np.uint8)[None, :, None, None] * np.arange(32, dtype=np.uint8)[:, None]
    sheet = images.reshape(50, 100, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1600, 3200, 3)
    Image.fromarray(sheet).save(path, lossless=True, quality=0, method=0)
    return torch.tensor(images).permute(0, 3, 1, 2)


def test_cifar_sheets(tmp_path: Path) -> None:
    images = write_sheet(tmp_path / "cifar10_test_00.webp", 0)
    np.savez(tmp_path / "labels.npz", y_test=np.arange(5000) % 10)
    found = open_images(f"cifar10:{tmp_path}")
    pixels, labels = found.read(range(123, 125))
    assert found.count == 5000
    assert torch.equal((pixels * 255).round().byte(), images[123:125])
    assert labels.tolist() == [3, 4]


def test_training_sheets_are_decoded_when_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.cat([write_sheet(tmp_path / f"cifar10_train_0{number}.webp", number) for number in range(2)])
    np.savez(tmp_path / "labels.npz", y_train=np.arange(50_000) % 7)
    opened: list[str] = []
    open_file = Image.open

    def record(path: Path) -> Any:
        opened.append(path.name)
        return open_file(path)

    monkeypatch.setattr(Image, "open", record)
    found = open_images(f"cifar10-train:{tmp_path}")
    chosen = [7001, 3, 5000, 4999]
    assert found.count == 10_000
    some = found.take(chosen)
    assert opened == []
    pixels, labels = some.read(range(4))
    assert sorted(opened) == ["cifar10_train_00.webp", "cifar10_train_01.webp"]
    assert torch.equal((pixels * 255).round().byte(), images[chosen])
    assert labels.tolist() == [i % 7 for i in chosen]
    assert torch.equal(some.read([2])[0], pixels[2:3])


def test_no_training_sheets(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cifar10_train_00"):
        open_images(f"cifar10-train:{tmp_path}")


def test_photos(tmp_path: Path) -> None:
    Image.new("RGB", (512, 300), (255, 0, 51)).save(tmp_path / "207_dog.jpg", quality=100)
    Image.new("L", (300, 300)).save(tmp_path / "003_grey.jpg")
    Image.new("L", (300, 300)).save(tmp_path / "unnamed.jpg")
    found = open_images(f"photos:{tmp_path}")
    pixels, labels = found.read([0, 1])
    assert labels.tolist() == [3, 207]
    assert pixels.shape == (2, 3, 224, 224)
    assert pixels[1].mean((1, 2)).tolist() == pytest.approx([1, 0, 0.2], abs=0.02)


@pytest.mark.parametrize("source", ["cifar10", "cifar10:", "mnist:x", "x"])
def test_a_source_of_another_kind(source: str) -> None:
    with pytest.raises(ValueError, match="must be cifar10:DIR, cifar10-train:DIR, photos:DIR"):
        open_images(source)


def test_a_folder_without_photos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photo"):
        open_images(f"photos:{tmp_path}")


def test_first_images() -> None:
    assert five_images().first(3).count == 3
    assert five_images().first(None).count == five_images().first(9).count == 5
    assert [len(labels) for _, labels in five_images().first(3).batches(2)] == [2, 1]


def test_chosen_images_of_chosen_images() -> None:
    chosen = five_images().take([4, 0, 2]).take([2, 0])
    assert chosen.count == 2
    assert chosen.read([0, 1])[0][:, 0, 0, 0].tolist() == pytest.approx([0.6, 0.9])
    assert torch.equal(chosen.pixels(), chosen.read([0, 1])[0])


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Twenty photos, each of its own shade of grey and its own class."""
    folder = tmp_path / "album"
    folder.mkdir()
    for shade in range(20):
        Image.new("L", (230, 230), 12 * shade).save(folder / f"{shade:03}_grey.jpg")
    return folder


def classes(images: Images) -> list[int]:
    return images.read(range(images.count))[1].tolist()


def test_no_photo_is_both_calibrated_with_and_evaluated(album: Path) -> None:
    evaluated, calibration = open_disjoint(f"photos:{album}", f"photos:{album}/../album", 8, seed=1)
    assert calibration.count == 8
    assert sorted(classes(evaluated) + classes(calibration)) == list(range(20))
    assert classes(evaluated) == sorted(classes(evaluated))
    assert classes(calibration) != sorted(classes(calibration)), "drawn images stay shuffled: halves are fair samples"
    again, other = (open_disjoint(f"photos:{album}", f"photos:{album}", 8, seed)[1] for seed in (1, 2))
    assert classes(again) == classes(calibration)
    assert sorted(classes(other)) != sorted(classes(calibration))


def test_photos_of_another_folder_are_all_evaluated(album: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    Image.new("L", (230, 230)).save(tmp_path / "second" / "900_black.jpg")
    evaluated, calibration = open_disjoint(f"photos:{tmp_path / 'second'}", f"photos:{album}", 20, seed=0)
    assert (evaluated.count, calibration.count) == (1, 20)


def test_more_calibration_images_than_there_are(album: Path) -> None:
    assert open_disjoint(f"photos:{album}", f"photos:{album}", 19, 0)[0].count == 1
    with pytest.raises(ValueError, match="photos has 20, of which some must remain to evaluate; ask for fewer"):
        open_disjoint(f"photos:{album}", f"photos:{album}", 20, 0)


def test_normalization() -> None:
    pixels = torch.tensor(CIFAR10.mean).reshape(1, 3, 1, 1) + torch.tensor(CIFAR10.std).reshape(1, 3, 1, 1)
    torch.testing.assert_close(CIFAR10(pixels), torch.ones(1, 3, 1, 1))
    assert not torch.allclose(IMAGENET(pixels), torch.ones(1, 3, 1, 1))


def test_absent_data_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--model", "resnet20", "--data", "cifar10:absent"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("benchmarks.accuracy: error: ")
    assert len(captured.err.splitlines()) == 1


def tiny() -> nn.Module:
    """A network for photos whose classes are shades of grey; random weights, nothing trained."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.AvgPool2d(28),
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 20),
    ).eval()


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model tiny`."""

    def build(name: str, weights: Path | None) -> tuple[nn.Module, Normalization]:
        assert (name, weights) == ("tiny", None)
        return tiny(), IMAGENET

    for benchmark in (accuracy, recovery):
        monkeypatch.setattr(benchmark, "build", build)
    monkeypatch.setattr(planning, "build", build)


@pytest.mark.usefixtures("tiny_model")
def test_recovery_record(album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, record = f"photos:{album}", tmp_path / "record.json"
    arguments = ["--model", "tiny", "--data", source, "--calibration", source, "--calibration-images", "4"]
    arguments += ["--ratio", "0.5", "--steps", "2", "--augment", "flip", "--seeds", "0", "1", "--output", str(record)]
    first = [*arguments, "--refits", str(tmp_path / "refits")]
    assert recovery.main(first) == 0
    assert "sd" in capsys.readouterr().out
    document = json.loads(record.read_text())
    assert document["settings"]["augment"] == "flip"
    assert document["settings"]["steps"] == 2
    assert [run["seed"] for run in document["runs"]] == [0, 1]
    assert [run["recovery"]["steps"] for run in document["runs"]] == [2, 2]
    assert all(0 < run["macs_share"] < 1 and run["time_share"] is None for run in document["runs"])
    assert len(list((tmp_path / "refits").iterdir())) == 2
    assert recovery.main(first) == 0  # from the files
    again = json.loads(record.read_text())["runs"]
    for key in ("before", "after"):
        assert [run["recovery"][key] for run in again] == [run["recovery"][key] for run in document["runs"]]
    wrong = ["--model", "tiny", "--data", "photos:absent", "--calibration", source, "--ratio", "0.5"]
    assert recovery.main(wrong) == 2
    assert capsys.readouterr().err.startswith("benchmarks.recovery: error: ")


@pytest.mark.usefixtures("tiny_model")
def test_recovery_of_a_share_of_time(album: Path, tmp_path: Path) -> None:
    source, record = f"photos:{album}", tmp_path / "record.json"
    arguments = ["--model", "tiny", "--data", source, "--calibration", source, "--calibration-images", "4"]
    arguments += ["--latency", "0.99", "--steps", "2", "--seeds", "0", "--output", str(record)]
    assert recovery.main(arguments) == 0
    (run,) = json.loads(record.read_text())["runs"]
    assert run["time_share"] > 0
    assert json.loads(record.read_text())["settings"]["latency"] == 0.99


@pytest.mark.usefixtures("tiny_model")
def test_accuracy_with_calibration(album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    photos = f"photos:{album}"
    arguments = ["--model", "tiny", "--data", photos, "--output", str(record)]
    documents = []
    for more in ([], ["--calibration", photos, "--calibration-images", "12", "--criterion", "l1", "--variety", "soft"]):
        assert accuracy.main([*arguments, *more]) == 0
        document = json.loads(record.read_text())
        assert document["seconds"].keys() == {"plan", "mask"}
        assert all(seconds > 0 for seconds in document["seconds"].values())
        assert str(album) not in record.read_text()
        documents.append(document)
    dense, refitted = documents
    errors = [[layer["error"] is not None for layer in document["report"]["layers"]] for document in documents]
    assert errors == [[False, False, False], [False, True, True]]
    settings = refitted["settings"]
    assert refitted["result"]["images"] == 8
    assert (settings["calibration"], settings["calibration_images"]) == ("photos", 12)
    assert (settings["method"], settings["criterion"]) == ("cocluster", "l1, variety soft")
    assert dense["settings"]["calibration"] is None
    assert dense["result"]["images"] == 20
    out = capsys.readouterr().out
    assert "top-1 agreement with the dense model" in out
    assert "planning" in out


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize(
    "arguments,expected",
    [(["--macs", "0.6"], {"macs": 0.6}), ([], {"ratio": 0.5}), (["--ratio", "0.3"], {"ratio": 0.3})],
)
def test_a_budget_replaces_the_ratio(
    album: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: dict[str, float]
) -> None:
    given: dict[str, Any] = {}

    def stop(model: nn.Module, **options: Any) -> None:
        given.update(options)
        raise fxprune.PlanError("enough")

    monkeypatch.setattr(fxprune, "make_plan", stop)
    assert accuracy.main(["--model", "tiny", "--data", f"photos:{album}", *arguments]) == 2
    assert {name: given[name] for name in ("ratio", "macs", "params") if name in given} == expected
    assert given.keys().isdisjoint({"method", "criterion", "variety", "snapshots"}), "left to the defaults of make_plan"


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize("only,grouped", [("1x1", ["6"]), ("3", ["3"]), ("[0-5]", ["3"])])
def test_only_some_convolutions(album: Path, tmp_path: Path, only: str, grouped: list[str]) -> None:
    record = tmp_path / "record.json"
    assert accuracy.main(["--model", "tiny", "--data", f"photos:{album}", "--only", only, "--output", str(record)]) == 0
    document = json.loads(record.read_text())
    assert [layer["name"] for layer in document["report"]["layers"] if layer["form"] != "dense"] == grouped
    assert document["settings"]["only"] == only


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--method", "magic"], "magic"),
        (["--method", "tmi"], "snapshots"),
        (["--snapshots", "absent.pt"], "absent.pt"),
        (["--only", "nowhere"], "nowhere"),
    ],
)
def test_what_accuracy_refuses(
    album: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert accuracy.main(["--model", "tiny", "--data", f"photos:{album}", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [["--limit", "0"], ["--batch", "-1"], ["--ratio", "0.5", "--macs", "0.5"], ["--calibration-images", "x"]],
)
def test_malformed_options(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--model", "resnet20", "--data", "cifar10:absent", *arguments])
    assert arguments[-2] in capsys.readouterr().err


STRUCTURE = {"ratio": 0.5, "groups": 8, "form": "overlap", "ignore": ()}


def earlier(model: nn.Module) -> list[Snapshot]:
    generator = torch.Generator().manual_seed(1)
    return [{k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items() if v.dim()}]


def test_all_variants_have_one_structure() -> None:
    shapes = planning.check_structure(planning.VARIANTS, tiny(), STRUCTURE, earlier(tiny()))
    found = {name: (shape.form, shape.groups, shape.kept) for name, shape in shapes.items()}
    assert found == {"3": ("overlap", 8, 8), "6": ("overlap", 8, 16)}


def test_another_structure_is_refused() -> None:
    variants = planning.choose_variants("l2,srgkp", snapshots=False)
    with pytest.raises(fxprune.PlanError, match=r"3: srgkp plans 8 groups of 8 channels \(overlap\), l2 2 groups"):
        planning.check_structure(variants, tiny(), STRUCTURE | {"groups": "auto"})
    with pytest.raises(fxprune.PlanError, match=r"srgkp: .* overlap form.*; --variants leaves it out"):
        planning.check_structure(variants, tiny(), STRUCTURE | {"groups": "auto", "form": "partition"})


def test_variants_by_name() -> None:
    assert planning.choose_variants(None, snapshots=True) == list(planning.VARIANTS)
    assert [v.name for v in planning.VARIANTS if v not in planning.choose_variants(None, snapshots=False)] == ["tmi"]
    assert [v.name for v in planning.choose_variants("l2,masks,l2", snapshots=False)] == ["l2", "masks"]
    with pytest.raises(ValueError, match="no 'magic'; choose from masks, plain"):
        planning.choose_variants("masks,magic", snapshots=False)


def test_each_refit_leaves_less_error_than_the_one_before() -> None:
    """Of the last pruned convolution, which also has to repair what the one before it spoils."""
    model, x = tiny(), torch.rand(64, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    variants = planning.choose_variants("masks,plain,l2", snapshots=False)
    errors = []
    for variant in variants:
        compiled = variant.refit(model, x, planning.options_of(variant, STRUCTURE, None, 0)).eval()
        with torch.no_grad():
            errors.append(float((compiled(x) - model(x)).square().mean()))
    assert errors[0] > 2 * errors[1]
    assert errors[1] > errors[2]


def test_the_plain_refit_keeps_the_masks() -> None:
    model, x = tiny(), torch.rand(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (variant,) = planning.choose_variants("l2", snapshots=False)
    options = planning.options_of(variant, STRUCTURE, None, 0)
    plans = []
    for refit in (planning.without_refit, planning.plain_refit, planning.full_refit):
        compiled = refit(model, x, options)
        plans.append(compiled.meta["fxprune"].plan.layers)
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("variants,seeds", [(planning.VARIANTS, [3]), (planning.VARIANTS[:3], [3, 5])])
def test_runs_of_every_variant_with_every_seed(variants: Sequence[planning.Variant], seeds: list[int]) -> None:
    model = tiny()
    drawn: list[int] = []

    def sources(seed: int) -> tuple[Images, Images]:
        drawn.append(seed)
        pixels = torch.rand(12, 3, 84, 84, generator=torch.Generator().manual_seed(seed))
        images = Images(12, lambda chosen: (pixels[list(chosen)], torch.zeros(len(chosen), dtype=torch.int64)))
        return images.take(range(4)), images.take(range(4, 12))

    found = list(planning.runs(variants, model, sources, NOT_NORMALIZED, STRUCTURE, seeds, earlier(model), batch=3))
    names = ["dense", *(variant.name for variant in variants)]
    assert [(run.variant, run.seed) for run in found] == [(name, seed) for seed in seeds for name in names]
    assert drawn == seeds
    assert all(run.images == 4 and 0 <= run.agreement <= 1 for run in found)
    assert all((run.seconds > 0) == (run.variant != "dense") for run in found)


def test_a_run_counts_right_and_agreeing_predictions() -> None:
    given: list[Mapping[str, Any]] = []

    def worse(model: nn.Module, calibration: torch.Tensor, options: Mapping[str, Any]) -> fx.GraphModule:
        given.append(options)
        return fx.symbolic_trace(First(0.7))

    variant = planning.Variant("worse", worse)
    dense, run = planning.runs([variant], First(), lambda seed: (five_images(),) * 2, NOT_NORMALIZED, {}, [4], batch=2)
    assert [dense.accuracy, dense.agreement] == pytest.approx([3 / 5, 1])
    assert [run.accuracy, run.agreement] == pytest.approx([2 / 5, 4 / 5])
    assert given == [{"seed": 4}]


def test_summaries_and_their_table() -> None:
    runs = [planning.Run("l2", seed, 10, accuracy, 0.5, 2.0) for seed, accuracy in enumerate((0.5, 0.7))]
    (one,) = planning.summarize(runs)
    assert [one.accuracy, one.deviation] == pytest.approx([0.6, 0.1 * 2**0.5])
    (alone,) = planning.summarize(runs[:1])
    assert alone.deviation is None
    assert planning.table([one]).splitlines()[1].split() == ["l2", "60.00%", "14.14%", "50.00%", "2.0"]
    assert planning.table([alone]).splitlines()[1].split() == ["l2", "50.00%", "-", "50.00%", "2.0"]


@pytest.mark.usefixtures("tiny_model")
def test_planning_writes_a_record(album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "deep" / "record.json"
    photos = f"photos:{album}"
    arguments = ["--model", "tiny", "--data", photos, "--calibration", photos, "--calibration-images", "12"]
    arguments += ["--seeds", "0,1", "--variants", "masks,reconstruction", "--output", str(record)]
    assert planning.main(arguments) == 0
    document = json.loads(record.read_text())
    assert [(run["variant"], run["seed"]) for run in document["runs"]] == [
        (name, seed) for seed in (0, 1) for name in ("dense", "masks", "reconstruction")
    ]
    assert {run["images"] for run in document["runs"]} == {8}
    assert [row["variant"] for row in document["summary"]] == ["dense", "masks", "reconstruction"]
    assert document["settings"]["seeds"] == [0, 1]
    assert document["environment"]["torch"] == torch.__version__
    assert str(album) not in record.read_text()
    captured = capsys.readouterr()
    assert "reconstruction" in captured.out
    assert captured.err == ""


@pytest.mark.usefixtures("tiny_model")
def test_what_planning_refuses(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", "tiny", "--data", f"photos:{album}"]
    calibrated = [*base, "--calibration", f"photos:{album}"]
    for arguments, message in (
        (base, "--calibration is needed"),
        ([*calibrated, "--variants", "magic"], "choose from masks"),
        ([*calibrated, "--seeds", "a"], "are no seeds"),
    ):
        with pytest.raises(SystemExit):
            planning.main(arguments)
        assert message in capsys.readouterr().err
    assert planning.main(calibrated) == 2
    assert "512 images to calibrate with: photos has 20" in capsys.readouterr().err
    assert planning.main([*calibrated, "--variants", "tmi"]) == 2
    assert "tmi: method 'tmi' compares" in capsys.readouterr().err


def test_environment_fits_json() -> None:
    record = json.loads(json.dumps(environment()))
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()


def test_medians() -> None:
    runs: list[compile_time.Measurement] = [{"a": 1.0, "b": None}, {"a": 5.0}, {"a": 2.0, "b": None, "c": 4.0}]
    assert compile_time.medians(runs) == {"a": 2.0, "b": None, "c": 4.0}


def test_scaling_takes_the_least_of_the_runs_and_divides_by_the_convolutions() -> None:
    steps = dict.fromkeys(compile_time.STEPS, 0.5)
    runs: list[compile_time.Measurement] = [{**steps, "plan": 2.0, "convolutions": 10}, {**steps, "convolutions": 10}]
    found = compile_time.scaling(runs)
    assert found == {
        "convolutions": 10, "seconds": steps, "total_seconds": 2.0, "ms_per_convolution": 200.0,
    }  # fmt: skip
    slow = compile_time.scaling([{**steps, "plan": 6.0, "convolutions": 10}])
    assert compile_time.growth(("a", "b"), {"a": found, "b": slow}) == 3.75
    results = {name: found for family in compile_time.FAMILIES.values() for name in family}
    lines = compile_time.scaling_table({**results, "resnet152": slow}).splitlines()
    assert next(line for line in lines if line.startswith("resnet:")).endswith("x 3.75!")
    assert next(line for line in lines if line.startswith("densenet:")).endswith("x 1.00")


def test_the_memory_limit() -> None:
    assert compile_time.memory_limit_mb(nn.Linear(1000, 1000, bias=False)) == pytest.approx(212)
    assert compile_time.memory_limit_mb(nn.Linear(1000, 1000, bias=False).half()) == pytest.approx(206)


def test_the_table_marks_what_is_above_its_limit() -> None:
    result: dict[str, float | None] = {"analysis": 0.5, "plan": 1.0, "mask": 0.1, "rewrite": 1.0, "compile": 9.0}
    result |= {"verified": None, "compile peak MB": 100.0, "verified peak MB": 900.0}
    line = compile_time.table({"net": {**result, "limit_mb": 300.0, "target_seconds": 2.0}}).splitlines()[1]
    assert line.split() == ["net", "0.50", "1.00", "0.10", "1.00", "9.00!", "-", "100", "900!", "300"]


def test_the_peak_is_above_the_level() -> None:
    if reset_peak_mb() is None:
        pytest.skip("this system does not let a process reset its peak memory")
    (seconds, _), peak = with_peak(lambda: timed(lambda: torch.ones(30_000_000)))  # 120 MB
    assert seconds > 0
    assert peak is not None
    assert 100 < peak < 200
    _, nothing = with_peak(lambda: None)
    assert nothing is not None
    assert nothing < 20


@pytest.mark.slow
def test_a_measurement_in_a_fresh_process() -> None:
    found = compile_time.measure_in_fresh_process("squeezenet1_1", "steps", threads=1)
    assert set(found) == {"analysis", "plan", "mask", "rewrite"}
    assert all(seconds is not None and seconds > 0 for seconds in found.values())
    with pytest.raises(RuntimeError, match="no such model"):
        compile_time.measure_in_fresh_process("squeezenet9", "steps", threads=1)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    "model,weights,at_least",
    [
        ("resnet20", "resnet20-12fca82f.th", 0.90),
        ("resnet20_zeros_after", "resnet20_choH_sd.pt", 0.91),
        ("resnet56", "resnet56-4bfd9763.th", 0.91),
    ],
)
def test_trained_networks(shared: Path, tmp_path: Path, model: str, weights: str, at_least: float) -> None:
    record = tmp_path / "record.json"
    code = accuracy.main(
        [
            *("--model", model, "--weights", str(shared / "weights" / "cifar10" / weights)),
            *("--data", f"cifar10:{shared / 'data' / 'cifar10'}", "--limit", "500", "--output", str(record)),
            *("--ratio", "0.25", "--form", "overlap"),  # gentle enough that predictions still vary without fine-tuning
        ]
    )
    assert code == 0
    document = json.loads(record.read_text())
    assert document["result"]["agreeing"] == document["result"]["images"] == 500
    assert document["result"]["dense"] >= at_least
    assert document["result"]["classes"] >= 8
    assert document["report"]["params_pruned"] < 0.8 * document["report"]["params_dense"]
    assert str(shared) not in record.read_text()


@pytest.mark.shared
@pytest.mark.slow
def test_photos_agree(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = accuracy.main(
        [
            *("--model", "mobilenet_v2", "--weights", str(shared / "weights/imagenet/mobilenet_v2-b0353104.pth")),
            *("--data", f"photos:{shared / 'data' / 'photos'}", "--limit", "40", "--batch", "20"),
        ]
    )
    assert code == 0
    assert "agree on 40 of 40 images" in capsys.readouterr().out


@pytest.mark.shared
@pytest.mark.slow
def test_a_refit_beats_the_masks(shared: Path, tmp_path: Path) -> None:
    record, data = tmp_path / "record.json", shared / "data" / "cifar10"
    code = planning.main(
        [
            *("--model", "resnet20", "--weights", str(shared / "weights" / "cifar10" / "resnet20-12fca82f.th")),
            *("--data", f"cifar10:{data}", "--limit", "500", "--output", str(record)),
            *("--calibration", f"cifar10-train:{data}", "--calibration-images", "128"),
            *("--variants", "masks,plain,l2,reconstruction"),
        ]
    )
    assert code == 0
    accuracy = {row["variant"]: row["accuracy"] for row in json.loads(record.read_text())["summary"]}
    assert accuracy["masks"] < 0.4 < accuracy["plain"] < accuracy["l2"] < accuracy["reconstruction"] + 0.02
    assert str(shared) not in record.read_text()


@pytest.mark.shared
@pytest.mark.slow
def test_a_disagreement_is_exit_code_1(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = fxprune.rewrite

    def other(masked: nn.Module, plan: fxprune.PrunePlan, example: torch.Tensor) -> torch.fx.GraphModule:
        compiled = rewrite(masked, plan, example)
        nn.init.normal_(compiled.get_submodule("linear").get_parameter("bias"), std=100)
        return compiled

    monkeypatch.setattr(fxprune, "rewrite", other)
    data = f"cifar10:{shared / 'data' / 'cifar10'}"
    assert accuracy.main(["--model", "resnet20", "--data", data, "--limit", "50"]) == 1
